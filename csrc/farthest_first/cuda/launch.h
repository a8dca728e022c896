// Launches of farthest_first on raw device pointers; instantiated for float and double. Between begin and end, every
// cloud's picks are made, in as many launches as the caller likes, by the kernels here or by those of
// lazy_launch.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "clouds.h"

namespace fastif {

struct FarthestPlan {
  int blocks = 0;              // of a launch on one cloud: all that the device holds at once, fewer where n is small
  int64_t slot_bytes = 0;      // scratch of a launch on one cloud
  int64_t clouds_at_once = 0;  // that the device holds in a launch with a block for each
};

template <typename T>
cudaError_t farthest_first_plan(int64_t n, int64_t d, int device, FarthestPlan* plan);

void farthest_first_begin(const Clouds& clouds, int64_t b, cudaStream_t stream);
void farthest_first_end(const Clouds& clouds, int64_t b, cudaStream_t stream);

// Picks up to number `last`, more than are made already: of one cloud by the whole device, or of b clouds by a block
// each.
template <typename T>
cudaError_t farthest_first_launch(const FarthestPlan& plan, const T* points, const Clouds& cloud, int64_t last,
                                  void* slots, cudaStream_t stream);
template <typename T>
void farthest_first_launch_blocks(const T* points, const Clouds& clouds, int64_t b, int64_t last, cudaStream_t stream);

}  // namespace fastif
