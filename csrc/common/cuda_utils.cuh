// What every kernel file starts from: the switch between nvcc and the emulator of tests/emulator, reductions whose
// result depends on neither the order nor the number of blocks, and the numbering of triangles. No torch headers.
#pragma once

#ifdef FASTIF_EMULATOR
#include "cuda_emu.h"  // defines FASTIF_SHARED and FASTIF_DYNAMIC_SHARED too
#else
#include <cooperative_groups.h>
#define FASTIF_SHARED(type, name) __shared__ type name
#define FASTIF_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char dynamic_bytes[]; \
  type* const name = reinterpret_cast<type*>(dynamic_bytes)
#endif

#include <cstdint>

namespace fastif {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Largest r with r (r + 1) / 2 <= t: entry t of a lower triangle, counted row by row, is (r, t - r (r + 1) / 2).
__host__ __device__ inline int64_t triangle_row(int64_t t) {
  int64_t r = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(t) + 1.0) - 1.0) / 2.0);
  while (r * (r + 1) / 2 > t) --r;  // the square root is rounded: at most a step off
  while ((r + 1) * (r + 2) / 2 <= t) ++r;
  return r;
}

// A candidate of an argmax. The order is total (larger value, then lower index), so any tree of comparisons over any
// split into lanes, warps and blocks ends at the same candidate. Values are >= 0; `none` loses to all of them.
struct alignas(16) Best {
  double value;
  int64_t index;
};

__device__ inline Best no_best() { return {-1.0, INT64_MAX}; }

__device__ inline Best better(Best a, Best b) {
  return (b.value > a.value || (b.value == a.value && b.index < a.index)) ? b : a;
}

__device__ inline Best warp_best(Best best) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Best other{__shfl_xor_sync(kAllLanes, best.value, offset), __shfl_xor_sync(kAllLanes, best.index, offset)};
    best = better(best, other);
  }
  return best;
}

// The best of the block, returned to every thread. `parts` has a slot per warp (blockDim.x a multiple of 32) and
// belongs to this call until the block's next barrier after it: one barrier inside, none at the end.
__device__ inline Best block_best(Best best, Best* parts) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  best = warp_best(best);
  if (lane == 0) parts[warp] = best;
  __syncthreads();
  return warp_best(lane < warps ? parts[lane] : no_best());
}

template <typename T>
__device__ inline T warp_sum(T sum) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  return sum;
}

// The sum over the block in one fixed tree, returned to every thread; `parts` as in block_best.
__device__ inline double block_sum(double sum, double* parts) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  sum = warp_sum(sum);
  if (lane == 0) parts[warp] = sum;
  __syncthreads();
  return warp_sum(lane < warps ? parts[lane] : 0.0);
}

}  // namespace fastif
