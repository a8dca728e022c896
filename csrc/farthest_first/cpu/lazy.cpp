// A point's minimum distance over SOME of the picks is an upper bound of its distance to all of them, so a pick need
// not be compared with points that cannot be next. Points live on three levels:
//   pool    kPool points: their sq_dists count every pick so far: exact
//   middle  kMiddle points, the pool among them: sq_dists count the picks before middle_seen_
//   all     n points: sq_dists count the picks before all_seen_
// A level is chosen as the best of its parent in the order of Farthest (value, then lowest index), and what is left out
// is remembered by its best, outside_*. Since sq_dists only fall, outside_* stays an upper bound in this order: a point
// outside that had the same distance as outside_* at the end would have had it from the start and a higher index. Hence
// the pool's best is the next pick, ties included, whenever it beats both outside_*. When it does not, the parent is
// flushed: the picks it has not seen are compared with all its points in one blocked pass, in which the filter
// (filter.h) settles nearly all pairs. After a flush of all n points the best is exact by definition, so
// every pick is found. A pick compared twice with a point changes nothing the second time ("if D < sq_dist").
//
// Threads share out the rows of a pass, and a row's result depends on nothing else: no bit depends on their number.
#include "lazy.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "../../common/progress.h"
#include "../../common/simd.h"
#include "cloud.h"

namespace fastif {
namespace {

// The cost is flat around these sizes. kDirect: up to so many picks, a flush computes every distance.
constexpr int64_t kPool = 96, kMiddle = 2048, kDirect = 2;
// Pairs by which the axes are judged, where there are enough points to pay for finding them.
constexpr int64_t kTrialRows = 85 * Filter::kRows, kTrialPicks = Filter::kGroup, kTrialPoints = 16384;
constexpr int64_t kWorthWaking = int64_t{1} << 27;  // products: half a millisecond, while idle threads spin for several
constexpr size_t kAhead = 8192;                     // bytes of a row to fetch before its undecided picks are computed

FASTIF_CLONES double sq_dist_f32(const float* row, const float* centre, int64_t d) { return sq_dist(row, centre, d); }
FASTIF_CLONES double sq_dist_f64(const double* row, const double* centre, int64_t d) { return sq_dist(row, centre, d); }
double exact(const float* row, const float* centre, int64_t d) { return sq_dist_f32(row, centre, d); }
double exact(const double* row, const double* centre, int64_t d) { return sq_dist_f64(row, centre, d); }

// A float32 pass over the two rows, some four times cheaper than the exact one, that settles most pairs that the filter
// leaves: true only if the float64 distance is at least m. Its sum S is of non-negative terms, each rounded at most
// d/64 + 10 times with u = 2^-24 (a difference of float32 has a small relative error, whatever the offset), and
// underflow adds less than d 2^-125; so |x - c|^2 >= S (1 - (d/64 + 16) 2^-23) - d 2^-125, which must reach
// m (1 + 2^-30) + 1e-280 (the float64 distance's own rounding, filter.h). Overflow settles nothing.
FASTIF_CLONES bool settled_f32(const float* row, const float* centre, int64_t d, double m) {
  constexpr int kWide = 64;
  float lane[kWide] = {};
  int64_t j = 0;
  for (; j + kWide <= d; j += kWide) {
    for (int l = 0; l < kWide; ++l) {
      const float t = row[j + l] - centre[j + l];
      lane[l] += t * t;
    }
  }
  for (int l = 0; j < d; ++j, ++l) {
    const float t = row[j] - centre[j];
    lane[l] += t * t;
  }
  for (int half = kWide / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  const double slack = (static_cast<double>(d) / kWide + 16) * 0x1p-23;
  const double least = static_cast<double>(lane[0]) * (1 - slack) - static_cast<double>(d) * 0x1p-125;
  return least <= std::numeric_limits<double>::max() && least >= m * (1 + 0x1p-30) + 1e-280;
}
bool settled(const float* row, const float* centre, int64_t d, double m) {
  return d >= 128 && m < std::numeric_limits<double>::infinity() && settled_f32(row, centre, d, m);
}
bool settled(const double*, const double*, int64_t, double) { return false; }

template <typename T>
class Traversal {
 public:
  Traversal(Cloud<T>& cloud, const Tensor& points, Filter& filter, FilterKind kind)
      : cloud_(cloud),
        points_(points),
        x_(cloud.points),
        n_(cloud.n),
        d_(cloud.d),
        filter_(filter),
        kind_(kind),
        indices_(cloud.indices),
        sq_dists_(cloud.sq_dists),
        nearest_(cloud.nearest),
        picked_(cloud.picked.data()) {
    middle_.reserve(std::min(n_, 4 * kMiddle));
    pool_.reserve(std::min(n_, kMiddle));
  }

  int64_t run() {
    int64_t made = 1;
    while (made < cloud_.picks) {
      const Farthest next = next_after(made - 1);
      cloud_.sq_radii[made - 1] = next.sq_dist;
      if (cloud_.complete(made, next.sq_dist)) break;
      cloud_.pick(made++, next.index);
      Progress::advance();
    }
    flush(nullptr, n_, all_seen_, made);
    Farthest last{0, n_};  // every point picked: radius 0
    for (int64_t i = 0; i < n_; ++i) {
      if (!picked_[i]) last.offer(sq_dists_[i], i);
    }
    cloud_.sq_radii[made - 1] = last.sq_dist;
    return made;
  }

 private:
  // The point farthest from picks 0..t: one is left, as t + 1 < picks <= n.
  Farthest next_after(int64_t t) {
    const T* centre = x_ + indices_[t] * d_;
    parallel_for(0, std::ssize(pool_), std::max<int64_t>(8, 262144 / d_), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) compare(pool_[m].index, centre, t);
    });
    Farthest next = best_of_pool();
    if (!next.beats(outside_pool_) && outside_pool_.beats(outside_middle_)) {
      flush(middle_.data(), std::ssize(middle_), middle_seen_, t + 1);
      middle_seen_ = t + 1;
      choose_pool();
      next = best_of_pool();
    }
    if (!next.beats(outside_pool_) || !next.beats(outside_middle_)) {
      flush(nullptr, n_, all_seen_, t + 1);
      all_seen_ = middle_seen_ = t + 1;
      choose_middle();
      choose_pool();
      next = best_of_pool();
    }
    return next;
  }

  bool compare(int64_t i, const T* centre, int64_t pick) {
    if (filter_.pairwise() && !filter_.undecided(i, indices_[pick], filter_.bound(i, sq_dists_[i]))) return false;
    return update(i, centre, pick);
  }

  bool update(int64_t i, const T* centre, int64_t pick) {
    if (settled(x_ + i * d_, centre, d_, sq_dists_[i])) return false;
    const double s = exact(x_ + i * d_, centre, d_);
    if (!(s < sq_dists_[i])) return false;
    sq_dists_[i] = s;
    nearest_[i] = pick;
    return true;
  }

  Farthest best_of_pool() const {
    Farthest best;
    for (const Farthest& member : pool_) {
      if (!picked_[member.index]) best.offer(sq_dists_[member.index], member.index);
    }
    return best;
  }

  // Keeps the `room` best of the members and returns the best of the others.
  static Farthest keep_best(std::vector<Farthest>& members, int64_t room) {
    if (std::ssize(members) <= room) return {};
    const auto cut = members.begin() + room;
    std::nth_element(members.begin(), cut, members.end(),
                     [](const Farthest& a, const Farthest& b) { return a.beats(b); });
    const Farthest outside = *cut;
    members.resize(room);
    return outside;
  }

  void choose_middle() {
    middle_.clear();
    outside_middle_ = {};
    for (int64_t i = 0; i < n_; ++i) {
      const Farthest point{sq_dists_[i], i};
      if (picked_[i] || !point.beats(outside_middle_)) continue;  // beaten by kMiddle others and by outside_middle_
      middle_.push_back(point);
      if (std::ssize(middle_) == 4 * kMiddle) outside_middle_ = keep_best(middle_, kMiddle);
    }
    if (std::ssize(middle_) > kMiddle) outside_middle_ = keep_best(middle_, kMiddle);
  }

  void choose_pool() {
    pool_.clear();
    for (const Farthest& member : middle_) {
      if (!picked_[member.index]) pool_.push_back({sq_dists_[member.index], member.index});
    }
    outside_pool_ = keep_best(pool_, kPool);
  }

  // Compares picks [first, last) with the members, or with all points if members is null.
  void flush(const Farthest* members, int64_t count, int64_t first, int64_t last) {
    const auto row = [members](int64_t m) { return members ? members[m].index : m; };
    if (last - first <= kDirect) {
      Progress::parallel_for(0, count, std::max<int64_t>(1, 65536 / d_), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
          for (int64_t t = first; t < last; ++t) compare(row(m), x_ + indices_[t] * d_, t);
        }
      });
      return;
    }
    if (!members) consider_axes(first, last);
    Filter& stage = coordinates_ ? *coordinates_ : filter_;
    for (int64_t block = first; block < last; block += stage.block()) {
      const int64_t centres = std::min(stage.block(), last - block);
      stage.pack(indices_ + block, centres);
      const int64_t grain = std::max<int64_t>(8 * Filter::kRows, kWorthWaking / (centres * stage.coordinates()));
      Progress::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m += Filter::kRows) {
          const int rows = static_cast<int>(std::min<int64_t>(Filter::kRows, end - m));
          int64_t tile[Filter::kRows];
          for (int r = 0; r < Filter::kRows; ++r) tile[r] = row(m + std::min(r, rows - 1));
          flush_tile(stage, tile, rows, block);
        }
      });
    }
  }

  // The packed centres are picks block, block + 1, ...; a row meets them in this order. Bounds tighten as distances
  // fall.
  void flush_tile(const Filter& stage, const int64_t* tile, int rows, int64_t block) {
    Filter::Bound bound[Filter::kRows], second[Filter::kRows];
    Dots dots;
    bool any = false, fetched[Filter::kRows] = {};
    for (int r = 0; r < rows; ++r) {
      bound[r] = stage.bound(tile[r], sq_dists_[tile[r]]);
      any |= sq_dists_[tile[r]] > 0;
    }
    if (!any) return;
    for (int64_t group = 0; group < stage.groups(); ++group) {
      stage.dots(tile, group, dots);
      uint64_t undecided[Filter::kRows];
      for (int r = 0; r < rows; ++r) {
        undecided[r] = stage.undecided(dots, r, bound[r], group);
        if (undecided[r] && !fetched[r]) {  // the filter has only read the codes
          fetched[r] = true;
          if (coordinates_ && filter_.pairwise()) {
            second[r] = filter_.bound(tile[r], sq_dists_[tile[r]]);
            filter_.prefetch(tile[r]);
          } else {
            fetch(tile[r]);
          }
        }
      }
      for (int r = 0; r < rows; ++r) {
        for (uint64_t left = undecided[r]; left;) {
          const int c = std::countr_zero(left);
          left &= left - 1;
          const int64_t pick = block + group * Filter::kGroup + c;
          if (coordinates_ && filter_.pairwise() && !filter_.undecided(tile[r], indices_[pick], second[r])) continue;
          if (!update(tile[r], x_ + indices_[pick] * d_, pick)) continue;
          bound[r] = stage.bound(tile[r], sq_dists_[tile[r]]);
          if (coordinates_) second[r] = filter_.bound(tile[r], sq_dists_[tile[r]]);
          if (left) left &= stage.undecided(dots, r, bound[r], group);
        }
      }
    }
  }

  void fetch(int64_t row) const {
    const char* bytes = reinterpret_cast<const char*>(x_ + row * d_);
    for (size_t b = 0; b < kAhead && b < d_ * sizeof(T); b += 64) __builtin_prefetch(bytes + b);
  }

  // Puts the axes first once they pay, in cycles per row: what they save on the pairs to come, judged by the last picks
  // and rows spread evenly, against what coordinates cost. The constants are measured, and the balance is flat.
  void consider_axes(int64_t first, int64_t last) {
    if (coordinates_ || kind_.axes == FilterKind::Stage::never) return;
    if (kind_.axes == FilterKind::Stage::sampled) {
      const auto d = static_cast<double>(d_), to_come = static_cast<double>(cloud_.picks - first);
      const double saved = d / Filter::kGroup - 1, cost = 1.2 * (4 * d + 2500);
      if (n_ < kTrialPoints || last < kTrialPicks || to_come * saved < cost) return;
      const double undecided = undecided_share(last);
      if (undecided > 0.5) kind_.axes = FilterKind::Stage::never;
      if (!(to_come * (saved - undecided * (40 + d / 25)) >= cost)) return;
    }
    if (axes().usable()) coordinates_.emplace(points_, kind_.codes, axes());
  }

  // Of trial rows and the last picks, the share of pairs that the axes leave; all, if there are no axes.
  double undecided_share(int64_t last) {
    if (!axes().usable()) return 1;
    std::vector<int64_t> rows(kTrialRows + kTrialPicks), centres(kTrialPicks);
    for (int64_t i = 0; i < kTrialRows; ++i) rows[i] = i * n_ / kTrialRows;
    std::copy_n(indices_ + last - kTrialPicks, kTrialPicks, rows.begin() + kTrialRows);
    std::iota(centres.begin(), centres.end(), kTrialRows);
    const auto sample = empty({std::ssize(rows), d_}, points_);
    for (int64_t i = 0; i < std::ssize(rows); ++i) {
      std::copy_n(x_ + rows[i] * d_, d_, sample.template mutable_data_ptr<T>() + i * d_);
    }
    Filter trial(sample, kind_.codes, axes());
    trial.pack(centres.data(), kTrialPicks);
    int64_t undecided = 0;
    Dots dots;
    for (int64_t i = 0; i < kTrialRows; i += Filter::kRows) {
      int64_t tile[Filter::kRows];
      std::iota(tile, tile + Filter::kRows, i);
      trial.dots(tile, 0, dots);
      for (int r = 0; r < Filter::kRows; ++r) {
        undecided += std::popcount(trial.undecided(dots, r, trial.bound(i + r, sq_dists_[rows[i + r]]), 0));
      }
    }
    return static_cast<double>(undecided) / (kTrialRows * kTrialPicks);
  }

  const Axes& axes() {
    if (!axes_) axes_.emplace(points_, filter_.mu(), filter_.length_unit());
    return *axes_;
  }

  Cloud<T>& cloud_;
  const Tensor& points_;
  const T* x_;
  int64_t n_, d_;
  Filter& filter_;
  FilterKind kind_;
  std::optional<Axes> axes_;
  std::optional<Filter> coordinates_;  // the filter's first stage, once it pays
  int64_t* indices_;
  double* sq_dists_;
  int64_t* nearest_;
  const char* picked_;
  int64_t all_seen_ = 1, middle_seen_ = 1;
  std::vector<Farthest> middle_, pool_;
  Farthest outside_middle_, outside_pool_;  // nobody yet: the first pick chooses them
};

template <typename T>
std::optional<int64_t> lazy(Cloud<T>& cloud, FilterKind kind) {
  if (cloud.d > Filter::kMaxDim) return std::nullopt;
  const auto points = tensor_at(cloud.points, {cloud.n, cloud.d});
  Filter filter(points, kind.codes);
  if (!filter.usable()) return std::nullopt;
  return Traversal<T>(cloud, points, filter, kind).run();
}

}  // namespace

std::optional<int64_t> farthest_first_lazy(Cloud<float>& cloud, FilterKind filter) { return lazy(cloud, filter); }
std::optional<int64_t> farthest_first_lazy(Cloud<double>& cloud, FilterKind filter) { return lazy(cloud, filter); }

}  // namespace fastif
