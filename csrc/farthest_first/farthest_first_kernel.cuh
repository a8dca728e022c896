// farthest_first on the GPU: one cooperative launch makes all k picks. The contract is farthest_first.h's.
//
// Who owns what. A warp owns 4 neighbouring rows at a time: rows 4 w .. 4 w + 3, then those a whole grid of warps
// further on, the same ones in every pick. Lane l owns columns l, l + 32, ... of them, as the definition of the
// distance asks. Lanes 0, 8, 16, 24 own sq_dists and nearest of rows 0, 1, 2, 3: no other thread ever reads or writes
// these while the kernel runs, so they need no fence. In every pick each row is read once, and distance, minimum,
// nearest and argmax are all taken from that one read; what the blocks tell one another is one (value, index) each.
//
// Nothing depends on the number of blocks: a row's distance is one lane-ordered sum, and the argmax is over a total
// order.
#pragma once

#include "../common/cuda_utils.cuh"

namespace fastif {

inline constexpr int kFarthestThreads = 512;
inline constexpr int kFarthestRows = 4;      // rows a warp has in flight
inline constexpr int kFarthestColumns = 4;   // times 32: columns in flight, 16 loads per lane
inline constexpr double kPickedMark = -1.0;  // stands in sq_dists for the 0 of a point already picked, until the end

// Adds (x - c)^2, each operation rounded on its own (the intrinsics are never fused).
__device__ inline double add_square(double sum, double x, double c) {
  const double difference = __dsub_rn(x, c);
  return __dadd_rn(sum, __dmul_rn(difference, difference));
}

// Squared distance to the centre of row i0 + lane / 8 (or of the last row, where there is no such row).
template <typename T, typename Centre>
__device__ inline double group_distance(const T* __restrict__ points, int64_t n, int64_t d, int64_t i0, int lane,
                                        Centre centre) {
  const T* row[kFarthestRows];
  double sum[kFarthestRows];
#pragma unroll
  for (int r = 0; r < kFarthestRows; ++r) {
    row[r] = points + (i0 + r < n ? i0 + r : n - 1) * d;
    sum[r] = 0.0;
  }
  constexpr int span = kFarthestColumns * kWarp;
  int64_t j = lane;
  for (; j - lane + span <= d; j += span) {
    T x[kFarthestColumns][kFarthestRows];
#pragma unroll
    for (int u = 0; u < kFarthestColumns; ++u)
#pragma unroll
      for (int r = 0; r < kFarthestRows; ++r) x[u][r] = row[r][j + u * kWarp];
#pragma unroll
    for (int u = 0; u < kFarthestColumns; ++u) {
      const double c = centre(j + u * kWarp);
#pragma unroll
      for (int r = 0; r < kFarthestRows; ++r) sum[r] = add_square(sum[r], static_cast<double>(x[u][r]), c);
    }
  }
  for (; j < d; j += kWarp) {
    const double c = centre(j);
#pragma unroll
    for (int r = 0; r < kFarthestRows; ++r) sum[r] = add_square(sum[r], static_cast<double>(row[r][j]), c);
  }
  // The halvings 16 and 8 of all four rows at once: a lane gives away the rows it does not keep and adds what it is
  // given for those it keeps. The sums are those of s_l += s_{l+16}, s_l += s_{l+8} (addition commutes to the bit),
  // with 6 exchanges in all instead of 20.
  static_assert(kFarthestRows == 4);
  const bool upper = lane & 16, odd = lane & 8;
  const double even_sum = __dadd_rn(upper ? sum[2] : sum[0], __shfl_xor_sync(kAllLanes, upper ? sum[0] : sum[2], 16));
  const double odd_sum = __dadd_rn(upper ? sum[3] : sum[1], __shfl_xor_sync(kAllLanes, upper ? sum[1] : sum[3], 16));
  double own = __dadd_rn(odd ? odd_sum : even_sum, __shfl_xor_sync(kAllLanes, odd ? even_sum : odd_sum, 8));
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) own = __dadd_rn(own, __shfl_xor_sync(kAllLanes, own, offset));
  return own;
}

// kCached: the centre's row fits shared memory (d doubles, dynamic) and is read from there. `slots` is [2, gridDim.x]:
// the blocks write one half while a slow block may still read the other; a grid.sync lies between two uses of a half.
template <typename T, bool kCached>
__global__ void __launch_bounds__(kFarthestThreads, 2)
    farthest_first_kernel(const T* __restrict__ points,  // [n, d]
                          int64_t n, int64_t d, int64_t k, int64_t start,
                          int64_t* __restrict__ indices,  // [k]
                          double* __restrict__ sq_radii,  // [k]
                          double* __restrict__ sq_dists,  // [n], need not be set
                          int64_t* __restrict__ nearest,  // [n], need not be set
                          Best* slots) {
  struct Shared {
    Best in_block[kWarp], in_grid[kWarp];
  };
  FASTIF_SHARED(Shared, shared);
  FASTIF_DYNAMIC_SHARED(double, centre);
  const auto grid = cooperative_groups::this_grid();
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp;
  const int64_t first = warp * kFarthestRows, stride = static_cast<int64_t>(gridDim.x) * warps * kFarthestRows;

  int64_t pick = start;
  for (int64_t t = 0; t < k; ++t) {
    const T* const centre_row = points + pick * d;
    if constexpr (kCached) {
      for (int64_t j = threadIdx.x; j < d; j += blockDim.x) centre[j] = static_cast<double>(centre_row[j]);
      __syncthreads();
    }
    Best best = no_best();
    for (int64_t i0 = first; i0 < n; i0 += stride) {
      const int64_t i = i0 + lane / 8;
      const bool owner = lane % 8 == 0 && i < n;
      double before = INFINITY;
      if (owner && t > 0) before = sq_dists[i];  // asked for ahead of the row, needed after it
      const double distance = group_distance(
          points, n, d, i0, lane, [&](int64_t j) { return kCached ? centre[j] : static_cast<double>(centre_row[j]); });
      if (owner) {
        double after = before;
        if (distance < before) {  // never for a picked point: its mark is negative
          after = distance;
          nearest[i] = t;
        }
        if (i == pick) after = kPickedMark;
        if (after != before) sq_dists[i] = after;
        if (after > best.value && after >= 0) best = {after, i};  // i grows: the first of equals stays
      }
    }
    best = block_best(best, shared.in_block);
    Best* const half = slots + (t % 2) * gridDim.x;
    if (threadIdx.x == 0) half[blockIdx.x] = best;
    grid.sync();
    best = no_best();
    for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) best = better(best, half[b]);
    best = block_best(best, shared.in_grid);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      indices[t] = pick;
      sq_radii[t] = best.value > 0 ? best.value : 0.0;  // picked points are at distance 0, so the rest decide
    }
    pick = best.index;  // after the last pick: unused
  }
  for (int64_t i = first + lane / 8; i < n; i += stride)
    if (lane % 8 == 0 && sq_dists[i] < 0) sq_dists[i] = 0.0;
}

}  // namespace fastif
