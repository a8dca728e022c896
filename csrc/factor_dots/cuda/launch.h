// The launch of factor_dots on raw device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastif {

// scale may be null: 1. ends[i]: the factors of examples 0 to i. products [q, F] is scratch.
void factor_dots_launch(const int8_t* left, const int8_t* right, const float* scale, const int64_t* ends,
                        const float* queries, int64_t factors, int64_t o, int64_t d, int64_t n, int64_t q,
                        float* products, float* out, cudaStream_t stream);

}  // namespace fastif
