// ggn_block_ adds the weighted Gauss-Newton block of a linear layer under softmax cross-entropy to `out`.
//
//   out[a, j, b, k] += sum_i w_i H_i[a, b] x_ij x_ik,   H_i = diag(p_i) - p_i p_i^T
//
// The rows of H_i sum to zero, so H_i[a, a] = p_ia * sum_{b != a} p_ib: this form is used (and is the definition),
// because p (1 - p) cancels for confident predictions and because only the c (c - 1) / 2 off-diagonal Gram matrices
// then need computing: the block (a, a) is minus the sum of the blocks (a, b). Each Gram matrix is symmetric: lower
// triangle only, then mirrored.
//
// kronecker_block_ does the same with any H_i [c, c] that is symmetric, of which the lower triangle is read:
//
//   out[a, j, b, k] += sum_i H_i[a, b] x_ij x_ik
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/checks.h"

namespace fastif {

// The type of each op's kernels, which every device's is held against where it is registered: torch would notice one
// that does not fit the schema only when it is called.
using GgnBlockOp = void(const Tensor& out, const Tensor& features, const Tensor& probs, const Tensor& weights);
using KroneckerBlockOp = void(const Tensor& out, const Tensor& features, const Tensor& outer);

inline void check_block(const char* op, const Tensor& out, int64_t c, int64_t d,
                        std::initializer_list<std::pair<const char*, const Tensor&>> inputs) {
  CHECK_VALUE((out.sizes() == Sizes{c, d, c, d}) && out.is_contiguous(), op,
              ": out must be a contiguous [c, d, c, d] = [", c, ", ", d, ", ", c, ", ", d, "], got ", out.sizes(),
              " with strides ", out.strides());
  check_out(op, out, inputs);
}

inline double largest_entry(const Tensor& x) {
  const auto [low, high] = aminmax(x);
  return std::max(high.item<double>(), -low.item<double>());  // NaN stays NaN
}

inline double overflow_limit(const Tensor& out) { return out.scalar_type() == kFloat ? 1e38 : 1e300; }

// Raises unless out, and all that is formed on the way to it, stays finite: kernels form products of two features, and
// sums of at most `added` in size. The limits leave room for rounding.
template <typename... Others>
void check_no_overflow(const char* op, const Tensor& out, double largest, double added, const Others&... others) {
  const double held = largest_entry(out), limit = overflow_limit(out);
  if (!std::isfinite(held)) check_finite_rows(op, "out", out);
  CHECK_VALUE(largest * largest <= limit && added <= limit && held + added <= (limit == 1e38 ? 3e38 : 1.5e308), op,
              ": the result overflows: the largest |feature| is ", largest, others..., ", the largest |out| is ", held);
}

inline void check_ggn_block(const Tensor& out,        // [c, d, c, d], contiguous
                            const Tensor& features,   // [n, d] float32 or float64
                            const Tensor& probs,      // [n, c], rows on the simplex
                            const Tensor& weights) {  // [n], >= 0
  constexpr auto op = "ggn_block";
  check_rank(op, "features", "[n, d]", features, 2);
  check_rank(op, "probs", "[n, c]", probs, 2);
  check_rank(op, "weights", "[n]", weights, 1);
  check_floating(op, "features", features);
  check_same_type(op, "probs", probs, "features", features);
  check_same_type(op, "weights", weights, "features", features);
  check_same_type(op, "out", out, "features", features);
  const int64_t n = features.size(0), d = features.size(1), c = probs.size(1);
  CHECK_VALUE(n >= 1 && d >= 1 && c >= 1, op, ": features [n, d] and probs [n, c] must not be empty, got ",
              features.sizes(), " and ", probs.sizes());
  CHECK_VALUE(probs.size(0) == n, op, ": probs must have n=", n, " rows, got ", probs.size(0));
  CHECK_VALUE(weights.size(0) == n, op, ": weights must have n=", n, " entries, got ", weights.size(0));
  check_block(op, out, c, d, {{"features", features}, {"probs", probs}, {"weights", weights}});
  check_finite_rows(op, "features", features);
  check_finite_rows(op, "probs", probs);
  check_finite_rows(op, "weights", weights);
  const double lowest = aminmax(weights).first.item<double>();
  CHECK_VALUE(lowest >= 0, op, ": weights must be >= 0, got ", lowest);
  const double largest = largest_entry(features), total = sum(weights).item<double>();
  check_no_overflow(op, out, largest, largest * largest * total, ", the weights sum to ", total);
  const double negative = aminmax(probs).first.item<double>();
  CHECK_VALUE(negative >= 0, op, ": probs must be >= 0, got ", negative);
  const auto sums = sum(probs, {1}).to(kDouble).cpu();
  const double* const of_rows = sums.const_data_ptr<double>();
  const double* const worst =
      std::max_element(of_rows, of_rows + n, [](double x, double y) { return std::abs(x - 1) < std::abs(y - 1); });
  CHECK_VALUE(std::abs(*worst - 1) <= 1e-3, op, ": each row of probs must sum to 1 (within 1e-3), row ",
              worst - of_rows, " is off by ", std::abs(*worst - 1));
}

inline void check_kronecker_block(const Tensor& out,       // [c, d, c, d], contiguous
                                  const Tensor& features,  // [n, d] float32 or float64
                                  const Tensor& outer) {   // [n, c, c]
  constexpr auto op = "kronecker_block";
  check_rank(op, "features", "[n, d]", features, 2);
  check_rank(op, "outer", "[n, c, c]", outer, 3);
  check_floating(op, "features", features);
  check_same_type(op, "outer", outer, "features", features);
  check_same_type(op, "out", out, "features", features);
  const int64_t n = features.size(0), d = features.size(1), c = outer.size(1);
  CHECK_VALUE(n >= 1 && d >= 1 && c >= 1, op, ": features [n, d] and outer [n, c, c] must not be empty, got ",
              features.sizes(), " and ", outer.sizes());
  CHECK_VALUE(outer.size(0) == n && outer.size(2) == c, op, ": outer must be [n, c, c] with n=", n, ", got ",
              outer.sizes());
  check_block(op, out, c, d, {{"features", features}, {"outer", outer}});
  check_finite_rows(op, "features", features);
  check_finite_rows(op, "outer", outer);
  const double largest = largest_entry(features), highest = largest_entry(outer);
  double added = static_cast<double>(n) * highest * largest * largest;
  if (!(added <= overflow_limit(out))) {  // row by row, as the largest of both may stand in different ones
    const auto largest_of_rows = [](const Tensor& rows) {
      const auto [low, high] = aminmax(rows, 1);
      return std::pair(low.to(kDouble).cpu(), high.to(kDouble).cpu());
    };
    const auto [least_x, most_x] = largest_of_rows(features);
    const auto [least_h, most_h] = largest_of_rows(readable(outer).view({n, c * c}));
    const auto size = [](const Tensor& least, const Tensor& most, int64_t i) {
      return std::max(most.const_data_ptr<double>()[i], -least.const_data_ptr<double>()[i]);
    };
    added = 0;
    for (int64_t i = 0; i < n; ++i) added += std::pow(size(least_x, most_x, i), 2) * size(least_h, most_h, i);
  }
  check_no_overflow(op, out, largest, added, ", the largest |outer| is ", highest);
}

}  // namespace fastif
