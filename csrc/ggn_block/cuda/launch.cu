#include <algorithm>

#include "kernel.cuh"
#include "launch.h"

namespace fastif {
namespace {

static_assert(kSplitUnit % kChunk == 0);

template <typename T, int R, typename Cores, typename Hessians>
void gram(const GgnPlan& plan, const T* features, Hessians hessians, int64_t n, int64_t d, int64_t c, int64_t first,
          int64_t items, T* scratch, cudaStream_t stream) {
  ggn_gram_kernel<T, R, Cores, Hessians><<<static_cast<unsigned>(items * plan.splits), kTileThreads, 0, stream>>>(
      features, hessians, n, d, c, first, plan.tiles, plan.splits, plan.split_length, scratch);
}

template <typename T, typename Hessians>
void launch(const GgnPlan& plan, const T* features, Hessians hessians, int64_t n, int64_t d, int64_t c, T* scratch,
            T* out, cudaStream_t stream) {
  const int64_t all = plan.grams * plan.tiles;
  const int64_t parts = static_cast<int64_t>(plan.side / kCombineTile) * (plan.side / kCombineTile);
  constexpr int threads = kCombineTile * kCombineRows;
  for (int64_t first = 0; first < all; first += plan.batch) {
    const int64_t items = std::min(plan.batch, all - first);
    if constexpr (sizeof(T) == 8) {
      gram<T, 4, CudaCores>(plan, features, hessians, n, d, c, first, items, scratch, stream);
    } else if (plan.side == 64) {
      (plan.tensor_cores
           ? gram<T, 4, TensorCores, Hessians>
           : gram<T, 4, CudaCores, Hessians>)(plan, features, hessians, n, d, c, first, items, scratch, stream);
    } else {
      (plan.tensor_cores
           ? gram<T, 8, TensorCores, Hessians>
           : gram<T, 8, CudaCores, Hessians>)(plan, features, hessians, n, d, c, first, items, scratch, stream);
    }
    ggn_combine_kernel<T><<<static_cast<unsigned>(items * parts), threads, 0, stream>>>(
        scratch, d, c, first, plan.tiles, plan.splits, plan.side, out);
  }
  if (plan.sum_diagonal && all > 0) {  // one batch held all pairs
    ggn_combine_diagonal_kernel<T><<<static_cast<unsigned>(c * plan.tiles * parts), threads, 0, stream>>>(
        scratch, d, c, plan.tiles, plan.splits, plan.side, out);
  }
}

}  // namespace

template <typename T>
void ggn_block_launch(const GgnPlan& plan, const T* features, const T* probs, const T* weights, int64_t n, int64_t d,
                      int64_t c, T* scratch, T* out, cudaStream_t stream) {
  launch(plan, features, SoftmaxHessians<T>{probs, weights}, n, d, c, scratch, out, stream);
}

template <typename T>
void kronecker_block_launch(const GgnPlan& plan, const T* features, const T* outer, int64_t n, int64_t d, int64_t c,
                            T* scratch, T* out, cudaStream_t stream) {
  launch(plan, features, GivenHessians<T>{outer}, n, d, c, scratch, out, stream);
}

#define FASTIF_INSTANTIATE(T)                                                                                        \
  template void ggn_block_launch<T>(const GgnPlan&, const T*, const T*, const T*, int64_t, int64_t, int64_t, T*, T*, \
                                    cudaStream_t);                                                                   \
  template void kronecker_block_launch<T>(const GgnPlan&, const T*, const T*, int64_t, int64_t, int64_t, T*, T*,     \
                                          cudaStream_t);
FASTIF_INSTANTIATE(float)
FASTIF_INSTANTIATE(double)

}  // namespace fastif
