// The lazy kernel of farthest_first on the CPU: the result of the plain one to the last bit, at a fraction of its
// distances.
#pragma once

#include <ATen/core/Tensor.h>

#include "farthest_first_filter.h"

namespace fastif {

// Fills what farthest_first.h defines; points are contiguous, sq_dists holds infinity and nearest zero. False, with
// nothing written, if the filter does not take the points (d > 2^20 or entries too large): the plain kernel does.
bool farthest_first_lazy(const at::Tensor& points,  // [n, d] float32 or float64
                         int64_t start, FilterKind filter, const at::Tensor& indices, const at::Tensor& sq_radii,
                         const at::Tensor& sq_dists, const at::Tensor& nearest);

}  // namespace fastif
