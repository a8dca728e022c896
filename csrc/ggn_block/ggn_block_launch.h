// Launches of ggn_block_ on raw device pointers; instantiated for float and double.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastif {

// How the work is cut, from the shapes alone: the result must not depend on the model of the GPU.
struct GgnPlan {
  int side = 0;              // of a tile: 64 or 128
  int64_t tiles = 0;         // of one lower triangle
  int64_t grams = 0;         // c (c - 1) / 2, and c more where the diagonal blocks are computed on their own
  bool sum_diagonal = true;  // the diagonal blocks are summed from the scratch of all pairs
  int64_t splits = 1, split_length = 0;
  int64_t batch = 0;    // items (tiles of Gram matrices) with scratch at a time
  int64_t scratch = 0;  // entries
};

GgnPlan ggn_plan(int64_t n, int64_t d, int64_t c, int64_t element_bytes);

template <typename T>
void ggn_block_launch(const GgnPlan& plan, const T* features, const T* probs, const T* weights, int64_t n, int64_t d,
                      int64_t c, T* scratch, T* out, cudaStream_t stream);

}  // namespace fastif
