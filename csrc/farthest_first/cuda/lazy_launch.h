// Launches of the lazy kernel of farthest_first on raw device pointers; instantiated for float and double.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "clouds.h"

namespace fastif {

struct LazyPlan {
  bool usable = false;  // false: rows are too long, or the device has too little shared memory for them
  int blocks = 0, staged_rows = 0, stride = 0, pitch = 0;
  int64_t shared_bytes = 0, scratch_bytes = 0;
};

template <typename T>
cudaError_t farthest_first_lazy_plan(int64_t n, int64_t d, int device, LazyPlan* plan);

// Encodes the points of one cloud; farthest_first_begin came before.
template <typename T>
void farthest_first_lazy_begin(const LazyPlan& plan, const T* points, const Clouds& cloud, void* scratch,
                               cudaStream_t stream);

// Picks until the cloud is done or for about `budget` nanoseconds. `scratch` is that of the begin.
template <typename T>
cudaError_t farthest_first_lazy_launch(const LazyPlan& plan, const T* points, const Clouds& cloud, void* scratch,
                                       uint64_t budget, cudaStream_t stream);

}  // namespace fastif
