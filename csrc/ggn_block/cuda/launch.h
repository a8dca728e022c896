// Launches of ggn_block_ and kronecker_block_ on raw device pointers; instantiated for float and double.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "plan.h"

namespace fastif {

// plan = ggn_plan(n, d, c, sizeof(T), /*rows_sum_to_zero=*/true), on tensor cores or not
template <typename T>
void ggn_block_launch(const GgnPlan& plan, const T* features, const T* probs, const T* weights, int64_t n, int64_t d,
                      int64_t c, T* scratch, T* out, cudaStream_t stream);

// plan = ggn_plan(n, d, c, sizeof(T), /*rows_sum_to_zero=*/false), likewise
template <typename T>
void kronecker_block_launch(const GgnPlan& plan, const T* features, const T* outer, int64_t n, int64_t d, int64_t c,
                            T* scratch, T* out, cudaStream_t stream);

}  // namespace fastif
