// Squares of per-sample gradients that are never stored: tiles of one example's gradient are formed in registers,
// squared there, and added up. n t o d multiply-adds; the same bits for any number of threads.
#pragma once

#include <optional>

#include "../../common/tensor.h"

namespace fastif {

// out += sum_i w_i g_i^2, entry by entry. All float32 or all float64, contiguous.
void add_squares_by_tiles(const Tensor& inputs,        // [n, t, d]
                          const Tensor& output_grads,  // [n, t, o]
                          const Tensor& weights,       // [n]
                          const Tensor& out);          // [o, d]

// out_i = sum_od R_od (g_i)_od^2, R = scale or 1.
void sq_norms_by_tiles(const Tensor& inputs, const Tensor& output_grads,
                       const std::optional<Tensor>& scale,  // [o, d], any strides
                       const Tensor& out);                  // [n]

}  // namespace fastif
