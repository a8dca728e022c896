// farthest_first: greedy k-center (farthest-first traversal; Gonzalez 1985), of one cloud or of b clouds.
//
// Each pick is the point not yet picked that is farthest (Euclidean) from the picks before it, lowest index on ties;
// the first s picks are given. Of a cloud of n points, of which a mask may leave some out:
// clang-format off
//   indices  int64   [k]  the picks, in order, all distinct, indices[:s] = start; -1 after the last pick
//   sq_radii float64 [k]  squared covering radius after each pick, max of sq_dists; after the last, repeated
//   sq_dists float64 [n]  squared distance of each point to its nearest pick; 0 where masked out
//   nearest  int64   [n]  position (0..k-1) of that pick, the earliest on ties; -1 where masked out
// clang-format on
// The last pick is the picks-th (k-th without picks), or from the s-th on the first with sq_radius <= until_radius^2.
// b clouds have an axis [b] before these.
//
// A squared distance is DEFINED in float64, whatever the dtype of the points, with one order of summation, so that
// every kernel on every device returns the same bits: lane l (0..31) adds (x_j - c_j)^2 over j = l, l+32, l+64, ... in
// increasing j, subtraction, product and sum each rounded (no fused multiply-add), then the 32 partial sums are halved:
// s_l += s_{l+16}, then 8, 4, 2, 1.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/checks.h"

namespace fastif {

// The type of the op's kernels, which every device's is held against where it is registered: torch would notice one
// that does not fit the schema only when it is called.
using FarthestFirstResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using FarthestFirstOp = FarthestFirstResults(const Tensor& points, int64_t k, const Tensor& start,
                                             const std::optional<Tensor>& picks, const std::optional<Tensor>& mask,
                                             std::optional<double> until_radius);

inline constexpr int kLanes = 32;

// What the caller gave, in the one form that kernels read; one cloud is b = 1. What is on the CPU is there whatever the
// device of the points.
struct FarthestFirstArguments {
  Tensor points;                // [b, n, d] float32 or float64, contiguous; 16-bit floats as float32, which is exact
  Tensor start;                 // [b, s] int64, contiguous, on the CPU
  std::optional<Tensor> mask;   // [b, n] bool, contiguous, on the device of points; none: every row is a point
  std::vector<int64_t> counts;  // [b] points of each cloud: n, or what its mask lets in
  std::vector<int64_t> picks;   // [b] picks of each cloud, at most: s <= picks <= k, picks <= counts
  int64_t k;
  double until_sq_radius;  // a cloud stops at this squared radius; -1 (no radius is that small): never
  bool batched;            // whether results have the axis [b]

  int64_t clouds() const { return points.size(0); }
  int64_t n() const { return points.size(1); }
  int64_t d() const { return points.size(2); }
  int64_t starts() const { return start.size(1); }
  // The shape [length] or [b, length] of a result.
  std::vector<int64_t> shape(int64_t length) const {
    return batched ? std::vector{clouds(), length} : std::vector{length};
  }
};

// Checks all rules but that of the values of the points, for which check_farthest_first_points is.
inline FarthestFirstArguments check_farthest_first(const Tensor& points,  // [n, d] or [b, n, d], any float
                                                   int64_t k,
                                                   const Tensor& start,                 // [s] or [b, s] int64
                                                   const std::optional<Tensor>& picks,  // [b] int64
                                                   const std::optional<Tensor>& mask,   // [n] or [b, n] bool
                                                   std::optional<double> until_radius) {
  constexpr auto op = "farthest_first";
  const bool batched = points.dim() == 3;
  CHECK_VALUE(batched || points.dim() == 2, op, ": points must be [n, d] or [b, n, d], got shape ", points.sizes());
  check_memory(op, "points", points);
  const auto dtype = points.scalar_type();
  CHECK_TYPE(dtype == kFloat || dtype == kDouble || dtype == kHalf || dtype == kBFloat16, op,
             ": points must be float16, bfloat16, float32 or float64, got ", dtype);
  CHECK_VALUE(points.numel() > 0, op, ": points must have at least one ", batched ? "cloud, one row" : "row",
              " and one column, got shape ", points.sizes());
  const int64_t clouds = batched ? points.size(0) : 1, n = points.size(-2);
  CHECK_VALUE(1 <= k && k <= n, op, ": k must be in [1, n=", n, "], got k=", k);
  const auto in_cloud = [batched](int64_t j) { return batched ? " in cloud " + std::to_string(j) : std::string(); };
  const auto check_device = [&](const char* name, const Tensor& x, bool or_cpu) {
    CHECK_VALUE(x.device() == points.device() || (or_cpu && x.is_cpu()), op, ": ", name,
                or_cpu ? " must be on the CPU or" : " must be", " on the device of points (", points.device(),
                "), got ", x.device());
  };

  CHECK_TYPE(start.scalar_type() == kLong, op, ": start must be int64, got ", start.scalar_type());
  CHECK_VALUE(start.dim() == (batched ? 2 : 1) && start.numel() > 0 && (!batched || start.size(0) == clouds), op,
              ": start must be ", batched ? "[b, s]" : "[s]", ", s >= 1, with points ", points.sizes(), ", got shape ",
              start.sizes());
  check_device("start", start, true);
  check_memory(op, "start", start);
  const int64_t starts = start.size(-1);
  CHECK_VALUE(starts <= k, op, ": k must be at least the number of starts, ", starts, ", got k=", k);

  FarthestFirstArguments made{.points = points.contiguous().view({clouds, n, points.size(-1)}),
                              .start = start.cpu().contiguous().view({clouds, starts}),
                              .mask = {},
                              .counts = std::vector<int64_t>(clouds, n),
                              .picks = std::vector<int64_t>(clouds, k),
                              .k = k,
                              .until_sq_radius = -1,
                              .batched = batched};
  if (mask) {
    CHECK_TYPE(mask->scalar_type() == kBool, op, ": mask must be bool, got ", mask->scalar_type());
    auto shape_of_mask = points.sizes();
    shape_of_mask.pop_back();
    CHECK_VALUE(mask->sizes() == shape_of_mask, op, ": mask must be ", batched ? "[b, n]" : "[n]", " with points ",
                points.sizes(), ", got shape ", mask->sizes());
    check_device("mask", *mask, false);
    check_memory(op, "mask", *mask);
    made.mask = mask->contiguous().view({clouds, n});
    const auto counts = sum(*made.mask, {1}).cpu();
    std::copy_n(counts.const_data_ptr<int64_t>(), clouds, made.counts.begin());
  }
  if (picks) {
    CHECK_TYPE(picks->scalar_type() == kLong, op, ": picks must be int64, got ", picks->scalar_type());
    CHECK_VALUE(batched && picks->dim() == 1 && picks->size(0) == clouds, op,
                ": picks must be [b], with points [b, n, d], got shape ", picks->sizes(), " with points ",
                points.sizes());
    check_device("picks", *picks, true);
    check_memory(op, "picks", *picks);
    const auto values = picks->cpu().contiguous();
    std::copy_n(values.const_data_ptr<int64_t>(), clouds, made.picks.begin());
  }
  if (until_radius) {
    CHECK_VALUE(*until_radius >= 0, op, ": until_radius must be at least 0, got ", *until_radius);
    made.until_sq_radius = *until_radius * *until_radius;
  }
  for (int64_t j = 0; j < clouds; ++j) {
    CHECK_VALUE(starts <= made.picks[j] && made.picks[j] <= k, op, ": picks must be in [s=", starts, ", k=", k,
                "], got ", made.picks[j], in_cloud(j));
    CHECK_VALUE(made.picks[j] <= made.counts[j], op, picks ? ": picks" : ": k", " must be at most the number of ",
                "points that mask lets in, ", made.counts[j], in_cloud(j), ", got ", made.picks[j]);
    const int64_t* given = made.start.const_data_ptr<int64_t>() + j * starts;
    for (int64_t t = 0; t < starts; ++t) {
      CHECK_VALUE(0 <= given[t] && given[t] < n, op, ": start must be in [0, n=", n, "), got start=", given[t],
                  in_cloud(j));
    }
    std::vector<int64_t> sorted(given, given + starts);
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    CHECK_VALUE(twice == sorted.end(), op, ": start must not repeat a point, got start=", *twice, " twice",
                in_cloud(j));
  }
  if (mask) {
    const auto let_in =
        call("aten::gather", "", *made.mask, int64_t{1}, made.start.to(points.device()), false).cpu().contiguous();
    const bool* is_point = let_in.const_data_ptr<bool>();
    for (int64_t i = 0; i < let_in.numel(); ++i) {
      CHECK_VALUE(is_point[i], op, ": start must be a point, got start=", made.start.const_data_ptr<int64_t>()[i],
                  ", which mask leaves out", in_cloud(i / starts));
    }
  }
  if (dtype == kHalf || dtype == kBFloat16) made.points = made.points.to(kFloat);
  made.points = made.points.contiguous();
  return made;
}

// Raises if a point has an entry that is NaN, Inf, or (float64) above 1e150 in size, and names the first such row.
inline void name_bad_point(const FarthestFirstArguments& arguments) {
  constexpr auto op = "farthest_first";
  for (int64_t j = 0; j < arguments.clouds(); ++j) {
    const auto rows = arguments.points[j];
    const auto [least, most] = aminmax(rows, 1);
    const auto low = least.to(kDouble).cpu(), high = most.to(kDouble).cpu();
    const auto mask = arguments.mask ? std::optional((*arguments.mask)[j].cpu()) : std::nullopt;
    for (int64_t i = 0; i < arguments.n(); ++i) {
      if (mask && !mask->const_data_ptr<bool>()[i]) continue;
      const double size = std::max(high.const_data_ptr<double>()[i], -low.const_data_ptr<double>()[i]);  // NaN stays
      const auto cloud = arguments.batched ? " of cloud " + std::to_string(j) : std::string();
      CHECK_VALUE(std::isfinite(size), op, ": points must be finite, row ", i, cloud, " holds NaN or Inf");
      CHECK_VALUE(size <= 1e150, op, ": |points| must be at most 1e150 (squares overflow), got ", size, " in row ", i,
                  cloud);
    }
  }
}

// The rule of the values, in one pass over the points; a kernel that sees it broken in its own pass calls
// name_bad_point instead. (A float32 square cannot overflow float64: with float32, a distance that is not finite is
// enough to see it.)
inline void check_farthest_first_points(const FarthestFirstArguments& arguments) {
  const auto [low, high] = aminmax(arguments.points);
  const double least = low.item<double>(), most = high.item<double>();
  if (!(-1e150 <= least && most <= 1e150)) name_bad_point(arguments);  // unless what is there is masked out
}

}  // namespace fastif
