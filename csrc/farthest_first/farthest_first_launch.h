// Launches of farthest_first on raw device pointers; instantiated for float and double.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastif {

// Blocks of one launch (all that `device` holds at once, fewer where n is small), and the bytes of `slots` for them.
template <typename T>
cudaError_t farthest_first_plan(int64_t n, int64_t d, int device, int* blocks, int64_t* slot_bytes);

template <typename T>
cudaError_t farthest_first_launch(const T* points, int64_t n, int64_t d, int64_t k, int64_t start, int64_t* indices,
                                  double* sq_radii, double* sq_dists, int64_t* nearest, void* slots, int blocks,
                                  cudaStream_t stream);

}  // namespace fastif
