// farthest_first on the GPU, one read of all points per pick. The contract is farthest_first.h's.
//
// A cloud is worked on by the whole grid (a cooperative launch) or, where there are many small ones, by a block of its
// own; what follows calls either of them the team. A launch makes some picks and leaves the rest to later ones.
//
// Who owns what. A warp owns 4 neighbouring rows at a time: rows 4 w .. 4 w + 3, then those a whole team of warps
// further on, the same ones in every pick. Lane l owns columns l, l + 32, ... of them, as the definition of the
// distance asks. Lanes 0, 8, 16, 24 own sq_dists and nearest of rows 0, 1, 2, 3: no other thread ever reads or writes
// these while the kernel runs, so they need no fence. In every pick each row is read once, and distance, minimum,
// nearest and argmax are all taken from that one read; what the blocks tell one another is one (value, index) each.
//
// Nothing depends on the number of blocks: a row's distance is one lane-ordered sum, and the argmax is over a total
// order.
#pragma once

#include "clouds.h"
#include "distance.cuh"

namespace fastif {

inline constexpr int kFarthestThreads = 512, kFarthestBlockThreads = 256;  // of a block of the grid, of one by itself
inline constexpr int kFarthestColumns = 4;  // times 32: columns in flight, 16 loads per lane

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
  return halve_four(sum, lane);
}

// Before the first pick, all b clouds: no point has a distance yet, and what is masked out never gets one.
__global__ void farthest_first_begin_kernel(Clouds clouds, int64_t b) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = thread; i < b * clouds.n; i += threads) {
    clouds.sq_dists[i] = clouds.mask == nullptr || clouds.mask[i] ? INFINITY : kNoCandidate;
    clouds.nearest[i] = -1;
  }
  for (int64_t cloud = thread; cloud < b; cloud += threads) clouds.progress[cloud] = {0, -1, false};
}

// After the last pick: marks become zeros; places after a cloud's last pick hold -1 and its last radius.
__global__ void farthest_first_end_kernel(Clouds clouds, int64_t b) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = thread; i < b * clouds.n; i += threads)
    if (clouds.sq_dists[i] < 0) clouds.sq_dists[i] = 0.0;
  for (int64_t i = thread; i < b * clouds.k; i += threads) {
    const int64_t cloud = i / clouds.k, made = clouds.progress[cloud].made;
    if (i % clouds.k < made) continue;
    clouds.indices[i] = -1;
    clouds.sq_radii[i] = clouds.sq_radii[cloud * clouds.k + made - 1];
  }
}

// kWholeGrid: the team is the grid, on one cloud; else block b has cloud first_cloud + b. kCached: the centre's row
// fits shared memory (d doubles, dynamic) and is read from there. Picks are made up to number `last` (more than are
// made already, unless the cloud is done). `slots` is [2, gridDim.x], of the whole grid alone: the blocks write one
// half while a slow block may still read the other; a grid.sync lies between two uses of a half.
template <typename T, bool kCached, bool kWholeGrid>
__global__ void __launch_bounds__(kWholeGrid ? kFarthestThreads : kFarthestBlockThreads, kWholeGrid ? 2 : 3)
    farthest_first_kernel(const T* __restrict__ points,  // [b, n, d]
                          Clouds clouds, int64_t first_cloud, int64_t last, Best* slots) {
  struct Shared {
    Best in_block[2][kWarp], in_grid[kWarp];
  };
  FASTIF_SHARED(Shared, shared);
  FASTIF_DYNAMIC_SHARED(double, centre);
  const int64_t n = clouds.n, d = clouds.d, cloud = kWholeGrid ? 0 : first_cloud + blockIdx.x;
  const unsigned block = kWholeGrid ? blockIdx.x : 0, blocks = kWholeGrid ? gridDim.x : 1;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t warp = static_cast<int64_t>(block) * warps + threadIdx.x / kWarp;
  const int64_t first = warp * kFarthestRows, stride = static_cast<int64_t>(blocks) * warps * kFarthestRows;
  points += cloud * n * d;
  double* const sq_dists = clouds.sq_dists + cloud * n;
  int64_t* const nearest = clouds.nearest + cloud * n;

  bool done = clouds.progress[cloud].done;
  if (done) return;
  int64_t t = clouds.progress[cloud].made, next = clouds.progress[cloud].next;
  for (; t < last && !done; ++t) {
    const int64_t pick = t < clouds.given ? clouds.starts[cloud * clouds.given + t] : next;
    const T* const centre_row = points + pick * d;
    if constexpr (kCached) {
      for (int64_t j = threadIdx.x; j < d; j += blockDim.x) centre[j] = static_cast<double>(centre_row[j]);
      __syncthreads();
    }
    Best best = no_best();
    for (int64_t i0 = first; i0 < n; i0 += stride) {
      const int64_t i = i0 + lane / 8;
      const bool owner = lane % 8 == 0 && i < n;
      double before = 0;
      if (owner) before = sq_dists[i];  // asked for ahead of the row, needed after it
      const double distance = group_distance(
          points, n, d, i0, lane, [&](int64_t j) { return kCached ? centre[j] : static_cast<double>(centre_row[j]); });
      if (owner) {
        double after = before;
        if (distance < before) {  // never where before is kNoCandidate, nor if the distance is NaN (masked out)
          after = distance;
          nearest[i] = t;
        }
        if (i == pick) after = kNoCandidate;
        if (after != before) sq_dists[i] = after;
        if (after > best.value && after >= 0) best = {after, i};  // i grows: the first of equals stays
      }
    }
    best = block_best(best, shared.in_block[t % 2]);
    if constexpr (kWholeGrid) {
      Best* const half = slots + (t % 2) * blocks;
      if (threadIdx.x == 0) half[block] = best;
      cooperative_groups::this_grid().sync();
      best = no_best();
      for (unsigned b = threadIdx.x; b < blocks; b += blockDim.x) best = better(best, half[b]);
      best = block_best(best, shared.in_grid);
    }
    // All threads of the team know the same. Picked points are at distance 0, so the rest decide the radius.
    next = best.index;
    const double radius = best.value > 0 ? best.value : 0.0;
    const int64_t k = clouds.picks == nullptr ? clouds.k : clouds.picks[cloud];
    done = t + 1 == k || (t + 1 >= clouds.given && radius <= clouds.stop);
    if (block == 0 && threadIdx.x == 0) {
      clouds.indices[cloud * clouds.k + t] = pick;
      clouds.sq_radii[cloud * clouds.k + t] = radius;
    }
  }
  if (block == 0 && threadIdx.x == 0) clouds.progress[cloud] = {t, next, done};  // all read it before the first barrier
}

}  // namespace fastif
