// farthest_first: greedy k-center (farthest-first traversal; Gonzalez 1985).
//
// Each pick is the point not yet picked that is farthest (Euclidean) from the picks before it, lowest index on ties.
//   indices  int64   [k]  the picks, in order; indices[0] = start; k distinct values
//   sq_radii float64 [k]  squared covering radius after each pick: max over all points of sq_dists
//   sq_dists float64 [n]  squared distance of each point to its nearest pick
//   nearest  int64   [n]  position (0..k-1) of that pick, the earliest on ties
//
// A squared distance is DEFINED in float64, whatever the dtype of the points, with one order of summation, so that
// every kernel on every device returns the same bits: lane l (0..31) adds (x_j - c_j)^2 over j = l, l+32, l+64, ... in
// increasing j, subtraction, product and sum each rounded (no fused multiply-add), then the 32 partial sums are halved:
// s_l += s_{l+16}, then 8, 4, 2, 1.
#pragma once

#include "../common/checks.h"

namespace fastif {

inline constexpr int kLanes = 32;

inline void check_farthest_first(const at::Tensor& points,  // [n, d] float32 or float64
                                 int64_t k, int64_t start) {
  constexpr auto op = "farthest_first";
  check_rank(op, "points", "[n, d]", points, 2);
  check_floating(op, "points", points);
  const int64_t n = points.size(0);
  TORCH_CHECK_VALUE(n >= 1 && points.size(1) >= 1, op, ": points must have at least one row and one column, got shape ",
                    points.sizes());
  TORCH_CHECK_VALUE(1 <= k && k <= n, op, ": k must be in [1, n=", n, "], got k=", k);
  TORCH_CHECK_VALUE(0 <= start && start < n, op, ": start must be in [0, n=", n, "), got start=", start);
  check_finite_rows(op, "points", points);
  if (points.scalar_type() == at::kDouble) {  // a float32 square cannot overflow float64
    const double largest = points.abs().max().item<double>();
    TORCH_CHECK_VALUE(largest <= 1e150, op, ": |points| must be at most 1e150 (squares overflow), got ", largest);
  }
}

}  // namespace fastif
