// How ggn_block_ and kronecker_block_ cut their work on the GPU, from the shapes alone: the result must not depend on
// the model of the GPU. Host code without CUDA headers: the emulator's tests run the plans that the GPU runs.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastif {

inline constexpr int64_t kScratchBytes = int64_t{256} << 20;
inline constexpr int64_t kEnoughBlocks = 1024;  // a few for each place of the largest GPUs
inline constexpr int64_t kSplitUnit = 512;      // examples: whole chunks of register_tile.cuh

struct GgnPlan {
  bool tensor_cores = false;  // multiply: float32 only
  int side = 0;               // of a tile: 64 or 128
  int64_t tiles = 0;          // of one lower triangle
  int64_t grams = 0;          // c (c - 1) / 2, and c more where the diagonal blocks are computed on their own
  bool sum_diagonal = false;  // the diagonal blocks are summed from the scratch of all pairs
  int64_t splits = 1, split_length = 0;
  int64_t batch = 0;    // items (tiles of Gram matrices) with scratch at a time
  int64_t scratch = 0;  // entries
};

// rows_sum_to_zero: those of every H_i, so that the diagonal blocks follow from the others.
inline GgnPlan ggn_plan(int64_t n, int64_t d, int64_t c, int64_t element_bytes, bool rows_sum_to_zero) {
  const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  const auto triangle = [&](int side) { return parts(d, side) * (parts(d, side) + 1) / 2; };
  GgnPlan plan;
  plan.tensor_cores = element_bytes == 4;
  // The large tile does half the loads and splits of operands per product, which on tensor cores is about half of all
  // instructions (counted, not timed): it is worth up to half more products at the edges. float64 has the small one
  // only: the large one's accumulators do not fit the registers.
  const int64_t small = triangle(64) * 64 * 64, large = triangle(128) * 128 * 128;
  plan.side = element_bytes == 4 && 2 * large <= 3 * small ? 128 : 64;
  plan.tiles = triangle(plan.side);
  const int64_t tile_bytes = element_bytes * plan.side * plan.side, pairs = c * (c - 1) / 2;
  plan.sum_diagonal = rows_sum_to_zero && pairs * plan.tiles * tile_bytes <= kScratchBytes;
  plan.grams = plan.sum_diagonal ? pairs : pairs + c;
  const int64_t items = plan.grams * plan.tiles;
  if (items == 0) return plan;  // one class, whose H_i is zero
  const int64_t room = kScratchBytes / (items * tile_bytes);
  const int64_t wanted = std::max<int64_t>(1, std::min({parts(kEnoughBlocks, items), parts(n, kSplitUnit), room}));
  plan.split_length = parts(parts(n, kSplitUnit), wanted) * kSplitUnit;
  plan.splits = parts(n, plan.split_length);
  plan.batch = std::min(items, std::max<int64_t>(1, kScratchBytes / (plan.splits * tile_bytes)));
  plan.scratch = plan.batch * plan.splits * plan.side * plan.side;
  return plan;
}

}  // namespace fastif
