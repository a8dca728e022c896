// The certified filter of the lazy farthest-first traversal: tells most pairs (row x, centre c) for which the float64
// distance of farthest_first.h, D(x, c), is at least the row's present sq_dist m, so that the update "if D < m" need
// not be tried. It never claims that wrongly; what it cannot decide is computed exactly.
//
// Every row has a code q_x (int8, or float32 where the processor has no VNNI: dots.h) and a scale s_x
// with
//     x = mu + s_x q_x + r_x,   |r_x| <= e_x,
// where mu is one vector, the interquartile mean of a sample of rows (it removes offsets and ignores outliers; any mu
// is correct). With the triangle inequality, in exact arithmetic,
//     |x - c| >= |s_x q_x - s_c q_c| - e_x - e_c,
//     |s_x q_x - s_c q_c|^2 = Q_x + Q_c - 2 s_x s_c q_x.q_c,   Q = |s q|^2,
// hence |x - c| >= R whenever Q_x + Q_c - 2 s_x s_c q_x.q_c >= (R + e_x + e_c)^2. What rounding takes, with
// u = 2^-53 and d <= 2^20 (kMaxDim):
//   D    adds non-negative terms: every term passes 3 roundings and at most d/32 + 5 additions, so
//        D >= |x - c|^2 (1 - 2^-37) - (2 d + 32) 2^-1022 (the last: underflow, even when denormals are flushed).
//        R = sqrt(m) (1 + 2^-30) + 1e-140 gives R^2 (1 - 2^-37) >= m + 1e-281: D >= m.
//   e_x  is a sum of squares of computed residuals t - s q, t = fl(x - mu): each entry is wrong by at most 3u of itself
//        and 3u |t|, the sums by d u relatively, underflow takes at most sqrt(d) 1.5e-154:
//        e_x = |residual| (1 + 2^-20) + |t| 2^-45 + 1e-150 is above the true one.
//   Q    is wrong by at most (d + 3) u Q <= 2^-32 Q before it is rounded to float32.
//   q.q  int8: integers below 2^31 (d <= 2^16), exact. float32: d products and sums in one chain, so the error is at
//        most gamma |q_x| |q_c| with gamma = (d + 1) 2^-24 / (1 - (d + 1) 2^-24) <= 1.07 (d + 1) 2^-24; underflow adds
//        d 2^-123, and |q| >= 1 (or q = 0): below 2^-75 of |q_x| |q_c|. Times 2 s_x s_c: gamma (Q_x + Q_c) at most.
// The test is made in float32, with lengths in units of a power of two such that sqrt(d) times the largest entry of all
// x - mu is in [1, 2), and with a slack lambda = 2^-20, plus 1.25 (d + 1) 2^-24 for float32 codes:
//     (s_x s_c) q_x.q_c <= alpha_x + beta_c - rho_x e_c,
//     alpha_x = ((1 - lambda) Q_x - (1 + lambda) r^2) / 2 - 2^-90,  rho_x = (1 + lambda) r,  r = R + e_x,
//     beta_c = ((1 - lambda) Q_c - (1 + lambda) e_c^2) / 2.
// s, Q and e are kept as float32 in these units: s is used as it is kept, Q is rounded, e is rounded up. No term passes
// more than 5 roundings, so that they cost at most 10 2^-24 (Q_x + Q_c + (r + e_c)^2) / 2, inside lambda; underflow
// costs at most 2^-95, as |q.q| < 2^31 and |s q| < 4. Nothing overflows: entries of x - mu above 1e140 make the filter
// refuse the points. NaN (m = infinity) fails the test: undecided. Rows with m = 0 (picks, duplicates of picks) are
// skipped: D < 0 is impossible.
//
// The same codes of a row's few coordinates y along principal axes (axes.h) make a first stage: e_x then
// holds the error of y too, and R is multiplied by the stretch, as |y - y_c| <= stretch |x - c|. With |y| <= 2.1 and
// hence |mu_y| <= 16.8 in units of the rows, a unit 32 times as long serves y - mu_y.
//
// Memory: int8 d bytes a row, 1/4 of float32 points, 1/8 of float64; float32 4 d bytes, once the size of float32
// points; besides 16 bytes a row (float32: 12), the larger part only below d = 16; and a block of packed centres. With
// the axes at most 64 + 16 bytes a row more for int8 codes, 256 + 12 for float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "axes.h"
#include "dots.h"

namespace fastif {

// What a Filter holds, and whether coordinates along the axes come first: once a sample says that they pay, always, or
// never.
struct FilterKind {
  enum class Stage { sampled, always, never };
  Codes codes;
  Stage axes;
};

// The best kind that this processor and d allow; the named one where the processor has it: vnni, vnni+axes, ...
FilterKind best_filter(int64_t d);
std::optional<FilterKind> filter_named(const std::string& name);

class Filter {
 public:
  static constexpr int64_t kMaxDim = 1 << 20, kMaxDimInt8 = 1 << 16;
  static constexpr int kRows = kTileRows, kGroup = fastif::kGroup;
  static constexpr int64_t kMinBlock = 256, kMaxBlock = 1024;

  // Encodes points [n, d], contiguous float32 or float64, or their coordinates along the axes.
  Filter(const Tensor& points, Codes codes);
  Filter(const Tensor& points, Codes codes, const Axes& axes);
  bool usable() const { return usable_; }
  const Tensor& mu() const { return mu_; }
  double length_unit() const { return unit_; }

  // Centres packed at a time: more where codes are short, as they should stay in the second-level cache.
  int64_t block() const {
    constexpr int64_t kPacked = 1 << 17;
    return std::clamp(kPacked / (kUnit * steps_) / kGroup * kGroup, kMinBlock, kMaxBlock);
  }
  int64_t coordinates() const { return d_; }

  // Makes rows `picks` of the points the centres 0..count-1 of what follows; count <= block().
  void pack(const int64_t* picks, int64_t count);
  int64_t groups() const { return (count_ + kGroup - 1) / kGroup; }

  // The row's side of the test, given its present sq_dist.
  struct Bound {
    float scale, alpha, rho;
  };
  Bound bound(int64_t row, double sq_dist) const;

  // q_x.q_c of rows[0..kRows-1] and the centres of a group.
  void dots(const int64_t* rows, int64_t group, Dots& out) const;
  // Bit c tells that centre c of the group is undecided for row `slot` of the tile.
  uint64_t undecided(const Dots& dots, int slot, const Bound& bound, int64_t group) const;
  // The same of one row and any other, packed or not.
  bool undecided(int64_t row, int64_t pick, const Bound& bound) const;
  // Whether that is worth its while: cheaper than the distance in float32.
  bool pairwise() const { return holds_int8(kind_); }
  void prefetch(int64_t row) const;

 private:
  int vectors(int64_t group) const {
    return static_cast<int>((std::min<int64_t>(kGroup, count_ - group * kGroup) + kVector - 1) / kVector);
  }
  void allocate(int64_t n);
  template <typename T>
  void encode(const Tensor& points);
  template <typename T>
  void encode(const Tensor& points, const Axes& axes);
  template <typename T>
  void encode_row(int64_t i, const T* row, double error);
  double beta(int64_t pick) const;

  Codes kind_;
  int64_t d_, steps_;  // a code is steps_ units of 4 bytes
  double slack_;       // lambda
  bool usable_ = true;
  double unit_ = 1, stretch_ = 1;
  Tensor mu_;                                              // [d] float64
  std::vector<Tensor> storage_;                            // of what follows
  char* codes_;                                            // [n, 4 steps]
  int32_t* offset_;                                        // [n]: -128 sum q
  float *scale_, *sq_norm_, *residual_;                    // [n]: s, Q, e, in units
  char* packed_;                                           // per group [steps, vectors, kVector] units
  float *centre_scale_, *centre_beta_, *centre_residual_;  // [block()]
  int64_t count_ = 0;
};

}  // namespace fastif
