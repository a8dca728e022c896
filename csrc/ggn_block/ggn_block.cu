#include <algorithm>

#include "ggn_block_kernel.cuh"
#include "ggn_block_launch.h"

namespace fastif {
namespace {

constexpr int64_t kScratchBytes = int64_t{256} << 20;
constexpr int64_t kEnoughBlocks = 1024;  // a few for each place of the largest GPUs

int64_t triangle(int64_t d, int side) {
  const int64_t across = ceil_div(d, side);
  return across * (across + 1) / 2;
}

template <typename T, int R>
void gram(const GgnPlan& plan, const T* features, const T* probs, const T* weights, int64_t n, int64_t d, int64_t c,
          int64_t first, int64_t items, T* scratch, cudaStream_t stream) {
  ggn_gram_kernel<T, R><<<static_cast<unsigned>(items * plan.splits), kTileThreads, 0, stream>>>(
      features, probs, weights, n, d, c, first, plan.tiles, plan.splits, plan.split_length, scratch);
}

}  // namespace

GgnPlan ggn_plan(int64_t n, int64_t d, int64_t c, int64_t element_bytes) {
  GgnPlan plan;
  // The large tile does half the loads per product; it is worth up to a fifth more products at the edges. float64 has
  // the small one only: the large one's accumulators do not fit the registers.
  const int64_t small = triangle(d, 64) * 64 * 64, large = triangle(d, 128) * 128 * 128;
  plan.side = element_bytes == 4 && 5 * large <= 6 * small ? 128 : 64;
  plan.tiles = triangle(d, plan.side);
  const int64_t tile_bytes = element_bytes * plan.side * plan.side, pairs = c * (c - 1) / 2;
  plan.sum_diagonal = pairs * plan.tiles * tile_bytes <= kScratchBytes;
  plan.grams = plan.sum_diagonal ? pairs : pairs + c;
  const int64_t items = plan.grams * plan.tiles;
  if (c < 2) return plan;  // the Hessian of one class is zero
  const int64_t room = plan.sum_diagonal ? kScratchBytes / (items * tile_bytes) : 1;
  const int64_t wanted = std::max<int64_t>(1, std::min({ceil_div(kEnoughBlocks, items), ceil_div(n, kChunk), room}));
  plan.split_length = ceil_div(ceil_div(n, kChunk), wanted) * kChunk;
  plan.splits = ceil_div(n, plan.split_length);
  plan.batch = std::min(items, std::max<int64_t>(1, kScratchBytes / (plan.splits * tile_bytes)));
  plan.scratch = plan.batch * plan.splits * plan.side * plan.side;
  return plan;
}

template <typename T>
void ggn_block_launch(const GgnPlan& plan, const T* features, const T* probs, const T* weights, int64_t n, int64_t d,
                      int64_t c, T* scratch, T* out, cudaStream_t stream) {
  const int64_t all = plan.grams * plan.tiles;
  const int64_t parts = static_cast<int64_t>(plan.side / kCombineTile) * (plan.side / kCombineTile);
  constexpr int threads = kCombineTile * kCombineRows;
  for (int64_t first = 0; first < all; first += plan.batch) {
    const int64_t items = std::min(plan.batch, all - first);
    if (plan.side == 64) {
      gram<T, 4>(plan, features, probs, weights, n, d, c, first, items, scratch, stream);
    } else if constexpr (sizeof(T) == 4) {
      gram<T, 8>(plan, features, probs, weights, n, d, c, first, items, scratch, stream);
    }
    ggn_combine_kernel<T><<<static_cast<unsigned>(items * parts), threads, 0, stream>>>(
        scratch, d, c, first, plan.tiles, plan.splits, plan.side, out);
  }
  if (plan.sum_diagonal && all > 0) {  // one batch held all pairs
    ggn_combine_diagonal_kernel<T><<<static_cast<unsigned>(c * plan.tiles * parts), threads, 0, stream>>>(
        scratch, d, c, plan.tiles, plan.splits, plan.side, out);
  }
}

#define FASTIF_INSTANTIATE(T)                                                                                        \
  template void ggn_block_launch<T>(const GgnPlan&, const T*, const T*, const T*, int64_t, int64_t, int64_t, T*, T*, \
                                    cudaStream_t);
FASTIF_INSTANTIATE(float)
FASTIF_INSTANTIATE(double)

}  // namespace fastif
