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

#include <ATen/ops/aminmax.h>
#include <ATen/ops/maximum.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../common/checks.h"

namespace fastif {

// The type of each op's kernels, which every device's is held against where it is registered: where two differ, torch
// aborts the process at import.
using GgnBlockOp = void(const at::Tensor& out, const at::Tensor& features, const at::Tensor& probs,
                        const at::Tensor& weights);
using KroneckerBlockOp = void(const at::Tensor& out, const at::Tensor& features, const at::Tensor& outer);

inline void check_block(const char* op, const at::Tensor& out, int64_t c, int64_t d,
                        std::initializer_list<std::pair<const char*, const at::Tensor&>> inputs) {
  TORCH_CHECK_VALUE(out.sizes() == at::IntArrayRef({c, d, c, d}) && out.is_contiguous(), op,
                    ": out must be a contiguous [c, d, c, d] = [", c, ", ", d, ", ", c, ", ", d, "], got ", out.sizes(),
                    " with strides ", out.strides());
  check_out(op, out, inputs);
}

inline double largest_entry(const at::Tensor& x) {
  const auto [low, high] = x.aminmax();
  return std::max(high.item<double>(), -low.item<double>());  // NaN stays NaN
}

inline double overflow_limit(const at::Tensor& out) { return out.scalar_type() == at::kFloat ? 1e38 : 1e300; }

// Raises unless out, and all that is formed on the way to it, stays finite: kernels form products of two features, and
// sums of at most `added` in size. The limits leave room for rounding.
template <typename... Others>
void check_no_overflow(const char* op, const at::Tensor& out, double largest, double added, const Others&... others) {
  const double held = largest_entry(out), limit = overflow_limit(out);
  if (!std::isfinite(held)) check_finite_rows(op, "out", out);
  TORCH_CHECK_VALUE(largest * largest <= limit && added <= limit && held + added <= (limit == 1e38 ? 3e38 : 1.5e308),
                    op, ": the result overflows: the largest |feature| is ", largest, others...,
                    ", the largest |out| is ", held);
}

inline void check_ggn_block(const at::Tensor& out,        // [c, d, c, d], contiguous
                            const at::Tensor& features,   // [n, d] float32 or float64
                            const at::Tensor& probs,      // [n, c], rows on the simplex
                            const at::Tensor& weights) {  // [n], >= 0
  constexpr auto op = "ggn_block";
  check_rank(op, "features", "[n, d]", features, 2);
  check_rank(op, "probs", "[n, c]", probs, 2);
  check_rank(op, "weights", "[n]", weights, 1);
  check_floating(op, "features", features);
  check_same_type(op, "probs", probs, "features", features);
  check_same_type(op, "weights", weights, "features", features);
  check_same_type(op, "out", out, "features", features);
  const int64_t n = features.size(0), d = features.size(1), c = probs.size(1);
  TORCH_CHECK_VALUE(n >= 1 && d >= 1 && c >= 1, op, ": features [n, d] and probs [n, c] must not be empty, got ",
                    features.sizes(), " and ", probs.sizes());
  TORCH_CHECK_VALUE(probs.size(0) == n, op, ": probs must have n=", n, " rows, got ", probs.size(0));
  TORCH_CHECK_VALUE(weights.size(0) == n, op, ": weights must have n=", n, " entries, got ", weights.size(0));
  check_block(op, out, c, d, {{"features", features}, {"probs", probs}, {"weights", weights}});
  check_finite_rows(op, "features", features);
  check_finite_rows(op, "probs", probs);
  check_finite_rows(op, "weights", weights);
  const double lowest = weights.min().item<double>();
  TORCH_CHECK_VALUE(lowest >= 0, op, ": weights must be >= 0, got ", lowest);
  const double largest = largest_entry(features), total = weights.sum().item<double>();
  check_no_overflow(op, out, largest, largest * largest * total, ", the weights sum to ", total);
  const double negative = probs.min().item<double>();
  TORCH_CHECK_VALUE(negative >= 0, op, ": probs must be >= 0, got ", negative);
  const auto off = probs.sum(1).sub(1).abs();
  const double worst = off.max().item<double>();
  TORCH_CHECK_VALUE(worst <= 1e-3, op, ": each row of probs must sum to 1 (within 1e-3), row ",
                    off.argmax().item<int64_t>(), " is off by ", worst);
}

inline void check_kronecker_block(const at::Tensor& out,       // [c, d, c, d], contiguous
                                  const at::Tensor& features,  // [n, d] float32 or float64
                                  const at::Tensor& outer) {   // [n, c, c]
  constexpr auto op = "kronecker_block";
  check_rank(op, "features", "[n, d]", features, 2);
  check_rank(op, "outer", "[n, c, c]", outer, 3);
  check_floating(op, "features", features);
  check_same_type(op, "outer", outer, "features", features);
  check_same_type(op, "out", out, "features", features);
  const int64_t n = features.size(0), d = features.size(1), c = outer.size(1);
  TORCH_CHECK_VALUE(n >= 1 && d >= 1 && c >= 1, op, ": features [n, d] and outer [n, c, c] must not be empty, got ",
                    features.sizes(), " and ", outer.sizes());
  TORCH_CHECK_VALUE(outer.size(0) == n && outer.size(2) == c, op, ": outer must be [n, c, c] with n=", n, ", got ",
                    outer.sizes());
  check_block(op, out, c, d, {{"features", features}, {"outer", outer}});
  check_finite_rows(op, "features", features);
  check_finite_rows(op, "outer", outer);
  const double largest = largest_entry(features), highest = largest_entry(outer);
  double added = static_cast<double>(n) * highest * largest * largest;
  if (!(added <= overflow_limit(out))) {  // row by row, as the largest of both may stand in different ones
    const auto largest_of_rows = [](const at::Tensor& rows) {
      const auto [low, high] = at::aminmax(rows, 1);
      return at::maximum(high, low.neg()).to(at::kDouble);
    };
    added = largest_of_rows(features).square().mul(largest_of_rows(outer.flatten(1))).sum().item<double>();
  }
  check_no_overflow(op, out, largest, added, ", the largest |outer| is ", highest);
}

}  // namespace fastif
