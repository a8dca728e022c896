// per_sample_grad: sums, norms and dot products of the per-sample gradients of a linear map, which are never stored.
//
// Example i has inputs a_it [d] and output gradients u_it [o] at positions t; its gradient is g_i = sum_t u_it a_it^T.
//   accumulate          [g, o, d]  out[s] = sum_{i : groups[i] = s} w_i g_i
//   accumulate_squares  [o, d]     sum_i w_i g_i^2, entry by entry
//   sq_norms            [n]        |g_i|^2 = sum_{t,t'} (u_it . u_it') (a_it . a_it');  sum_{od} R_od (g_i)_od^2 with a
//                                  scale R
//   dots                [q, n]     <V_q, g_i> = sum_t u_it^T V_q a_it
// inputs and output_grads may have 16 bits; everything else, and every sum, has the result's type: float32, or float64
// for float64 inputs.
#pragma once

#include <optional>

#include "../common/checks.h"

namespace fastif {

// The type of each op's kernels, which every device's is held against where it is registered: torch would notice one
// that does not fit the schema only when it is called.
using AccumulateOp = Tensor(const Tensor& inputs, const Tensor& output_grads, const Tensor& weights,
                            const Tensor& groups, int64_t num_groups);
using AccumulateSquaresOp = Tensor(const Tensor& inputs, const Tensor& output_grads, const Tensor& weights);
using SqNormsOp = Tensor(const Tensor& inputs, const Tensor& output_grads, const std::optional<Tensor>& scale);
using DotsOp = Tensor(const Tensor& inputs, const Tensor& output_grads, const Tensor& directions);

inline bool has_16_bits(const Tensor& x) { return x.scalar_type() == kHalf || x.scalar_type() == kBFloat16; }

inline ScalarType result_type(const Tensor& inputs) { return has_16_bits(inputs) ? kFloat : inputs.scalar_type(); }

// Examples [begin, end) of x in the type of the result. Blocks are copied one at a time: 16-bit inputs never stand
// whole in 32 bits.
inline Tensor block_of(const Tensor& x, int64_t begin, int64_t end) {
  return x.slice(0, begin, end).to(result_type(x)).contiguous();
}

// For weights, scale and directions.
inline void check_result_type(const char* op, const char* name, const Tensor& x, const Tensor& inputs) {
  CHECK_TYPE(x.scalar_type() == result_type(inputs), op, ": ", name, " must be ", result_type(inputs),
             " where inputs are ", inputs.scalar_type(), ", got ", x.scalar_type());
  CHECK_VALUE(x.device() == inputs.device(), op, ": ", name, " must be on the device of inputs (", inputs.device(),
              "), got ", x.device());
}

inline void check_linear_map(const char* op, const Tensor& inputs,  // [n, t, d] floating, 16 to 64 bits
                             const Tensor& output_grads) {          // [n, t, o]
  check_rank(op, "inputs", "[n, t, d]", inputs, 3);
  check_rank(op, "output_grads", "[n, t, o]", output_grads, 3);
  CHECK_TYPE(has_16_bits(inputs) || inputs.scalar_type() == kFloat || inputs.scalar_type() == kDouble, op,
             ": inputs must be floating with 16 to 64 bits, got ", inputs.scalar_type());
  check_same_type(op, "output_grads", output_grads, "inputs", inputs);
  CHECK_VALUE(inputs.numel() > 0 && output_grads.numel() > 0, op,
              ": inputs [n, t, d] and output_grads [n, t, o] must not be empty, got ", inputs.sizes(), " and ",
              output_grads.sizes());
  CHECK_VALUE(inputs.size(0) == output_grads.size(0) && inputs.size(1) == output_grads.size(1), op,
              ": inputs and output_grads must agree in [n, t], got ", inputs.sizes(), " and ", output_grads.sizes());
}

// Called with the result by every kernel: NaN and Inf in an input always reach the result, so that only a result that
// is not finite makes it worth to read the inputs again, and to tell them from an overflow.
inline void check_finite_result(const char* op, const Tensor& result, const Tensor& inputs,
                                const Tensor& output_grads) {
  if (std::isfinite(sum(result).item<double>()) || all(isfinite(result)).item<bool>()) return;
  check_finite_rows(op, "inputs", inputs);
  check_finite_rows(op, "output_grads", output_grads);
  fail("ValueError", op, ": the result overflows ", result.scalar_type(), "; pass float64 or scale the inputs");
}

inline void check_weights(const char* op, const Tensor& weights, const Tensor& inputs) {  // [n]
  check_rank(op, "weights", "[n]", weights, 1);
  check_result_type(op, "weights", weights, inputs);
  CHECK_VALUE(weights.size(0) == inputs.size(0), op, ": weights must have n=", inputs.size(0), " entries, got ",
              weights.size(0));
  check_finite_rows(op, "weights", weights);
}

inline void check_accumulate(const Tensor& inputs, const Tensor& output_grads,
                             const Tensor& weights,  // [n]
                             const Tensor& groups,   // [n] int64 in [0, num_groups)
                             int64_t num_groups) {
  constexpr auto op = "per_sample_grad.accumulate";
  check_linear_map(op, inputs, output_grads);
  check_weights(op, weights, inputs);
  check_rank(op, "groups", "[n]", groups, 1);
  CHECK_TYPE(groups.scalar_type() == kLong, op, ": groups must be int64, got ", groups.scalar_type());
  CHECK_VALUE(groups.device() == inputs.device(), op, ": groups must be on the device of inputs (", inputs.device(),
              "), got ", groups.device());
  const int64_t n = inputs.size(0);
  CHECK_VALUE(groups.size(0) == n, op, ": groups must have n=", n, " entries, got ", groups.size(0));
  CHECK_VALUE(num_groups >= 1, op, ": num_groups must be >= 1, got ", num_groups);
  const auto [least, most] = aminmax(groups);
  const int64_t lowest = least.item<int64_t>(), highest = most.item<int64_t>();
  CHECK_VALUE(0 <= lowest && highest < num_groups, op, ": groups must be in [0, num_groups=", num_groups, "), got ",
              lowest < 0 ? lowest : highest);
}

inline void check_accumulate_squares(const Tensor& inputs, const Tensor& output_grads,
                                     const Tensor& weights) {  // [n]
  constexpr auto op = "per_sample_grad.accumulate_squares";
  check_linear_map(op, inputs, output_grads);
  check_weights(op, weights, inputs);
}

inline void check_sq_norms(const Tensor& inputs, const Tensor& output_grads,
                           const std::optional<Tensor>& scale) {  // [o, d], >= 0
  constexpr auto op = "per_sample_grad.sq_norms";
  check_linear_map(op, inputs, output_grads);
  if (!scale) return;
  check_rank(op, "scale", "[o, d]", *scale, 2);
  check_result_type(op, "scale", *scale, inputs);
  CHECK_VALUE(scale->size(0) == output_grads.size(2) && scale->size(1) == inputs.size(2), op,
              ": scale must be [o=", output_grads.size(2), ", d=", inputs.size(2), "], got ", scale->sizes());
  check_finite_rows(op, "scale", *scale);
  const double lowest = aminmax(*scale).first.item<double>();
  CHECK_VALUE(lowest >= 0, op, ": scale must be >= 0, got ", lowest);
}

inline void check_dots(const Tensor& inputs, const Tensor& output_grads,
                       const Tensor& directions) {  // [q, o, d]
  constexpr auto op = "per_sample_grad.dots";
  check_linear_map(op, inputs, output_grads);
  check_rank(op, "directions", "[q, o, d]", directions, 3);
  check_result_type(op, "directions", directions, inputs);
  CHECK_VALUE(
      directions.size(0) >= 1 && directions.size(1) == output_grads.size(2) && directions.size(2) == inputs.size(2), op,
      ": directions must be [q, o=", output_grads.size(2), ", d=", inputs.size(2), "] with q >= 1, got ",
      directions.sizes());
  check_finite_rows(op, "directions", directions);
}

}  // namespace fastif
