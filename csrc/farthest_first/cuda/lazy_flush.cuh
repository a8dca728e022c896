// What a launch of lazy_kernel.cuh works on and keeps, and how rows meet the picks that they have not
// seen.
#pragma once

#include "clouds.h"
#include "codes.cuh"
#include "distance.cuh"

namespace fastif {

inline constexpr int kLazyThreads = 512;
inline constexpr int kPoolRows = 16;  // of a warp; one of its first 16 lanes owns each
inline constexpr int kPool = kLazyThreads / kWarp * kPoolRows;
inline constexpr int kMiddle = 16384;
inline constexpr int kCentres = 256;  // most centres of a flush at a time, and most picks of a turn
inline constexpr int kDirect = 2;     // up to so many pending centres, a flush computes every distance
inline constexpr int kDigits = 256;

enum class Step : int { pick, flush_middle, flush_all, finish };

// Kept in global memory. Between two of its writes to `made` and `step`, or to one half of `pause`, lies a grid.sync
// after everybody's reads.
struct LazyState {
  int64_t made, all_seen, middle_seen;
  Best outside_middle;  // block 0's
  Step step;
  int middle_count;
  bool pause[2];
  unsigned long long compared;  // pairs whose distance was computed: for tests
};

template <typename T>
struct LazyCloud {
  const T* points;  // [n, d]
  Clouds cloud;     // one cloud: k are its picks, and the pointers its own
  RowCodes codes;
  bool* picked;      // [n]
  int64_t* middle;   // [middle_room]
  Best* slots;       // [gridDim.x]
  unsigned* counts;  // [3, kDigits]
  LazyState* state;
  int middle_room, pool_room;  // at most kMiddle, and kPoolRows per warp
  int staged_rows, pitch;  // codes that shared memory takes, and quads from one to the next: an odd number of chunks
};

struct LazyShared {
  Best parts[2][kWarp];
  CentreTerms terms[kCentres];
  int64_t centre[kCentres], pool[kPool];
  unsigned counts[kDigits];
  int pool_count;
};

// What a lane owns of its warp's tile.
struct Row {
  int64_t index = -1;    // nobody
  double sq_dist = 0;    // nothing is below it
  int64_t nearest = -1;  // not changed
  int compared = 0;
};

template <typename T>
__device__ inline Row load_row(const LazyCloud<T>& a, int64_t index) {
  const double sq_dist = a.cloud.sq_dists[index];
  return {index, sq_dist > 0 ? sq_dist : 0.0, -1, 0};
}

template <typename T>
__device__ inline void store_row(const LazyCloud<T>& a, const Row& row) {
  if (row.nearest >= 0) {
    a.cloud.sq_dists[row.index] = row.sq_dist;
    a.cloud.nearest[row.index] = row.nearest;
  }
  const int compared = warp_sum(row.compared);
  if (threadIdx.x % kWarp == 0 && compared > 0)
    atomicAdd(&a.state->compared, static_cast<unsigned long long>(compared));
}

// Squared distances of four rows from a centre each; lane l gets that of pair l / 8.
template <typename T>
__device__ inline double pair_distance(const T* const (&row)[kFarthestRows], const T* const (&centre)[kFarthestRows],
                                       int64_t d, int lane) {
  constexpr int columns = sizeof(T) == 4 ? 4 : 2;
  double sum[kFarthestRows] = {};
  int64_t j = lane;
  for (; j - lane + columns * kWarp <= d; j += columns * kWarp) {
    T x[columns][kFarthestRows], c[columns][kFarthestRows];
#pragma unroll
    for (int u = 0; u < columns; ++u)
#pragma unroll
      for (int r = 0; r < kFarthestRows; ++r) {
        x[u][r] = row[r][j + u * kWarp];
        c[u][r] = centre[r][j + u * kWarp];
      }
#pragma unroll
    for (int u = 0; u < columns; ++u)
#pragma unroll
      for (int r = 0; r < kFarthestRows; ++r)
        sum[r] = add_square(sum[r], static_cast<double>(x[u][r]), static_cast<double>(c[u][r]));
  }
  for (; j < d; j += kWarp)
#pragma unroll
    for (int r = 0; r < kFarthestRows; ++r)
      sum[r] = add_square(sum[r], static_cast<double>(row[r][j]), static_cast<double>(centre[r][j]));
  return halve_four(sum, lane);
}

// A warp's rows meet the centres of the set bits of `open`, which each lane has for its own row, in their order. Bit c
// stands for pick first + c, which is row centre_of(c).
template <typename T, typename CentreOf>
__device__ inline void compare_exactly(const LazyCloud<T>& a, Row& own, uint64_t open, int64_t first,
                                       CentreOf centre_of) {
  const int lane = threadIdx.x % kWarp;
  if (!(own.sq_dist > 0)) open = 0;
  while (unsigned ready = __ballot_sync(kAllLanes, open != 0)) {
    const int c = open ? __ffsll(static_cast<long long>(open)) - 1 : 0;
    const int64_t own_centre = centre_of(c);
    int owner[kFarthestRows];  // four lanes with a pair left, or the last of them again
    const T *row[kFarthestRows], *centre[kFarthestRows];
#pragma unroll
    for (int r = 0; r < kFarthestRows; ++r) {
      owner[r] = __ffs(static_cast<int>(ready)) - 1;
      if (const unsigned rest = ready & (ready - 1)) ready = rest;
      row[r] = a.points + __shfl_sync(kAllLanes, own.index, owner[r]) * a.cloud.d;
      centre[r] = a.points + __shfl_sync(kAllLanes, own_centre, owner[r]) * a.cloud.d;
    }
    const double distance = pair_distance(row, centre, a.cloud.d, lane);
    bool met = false;
    double own_distance = 0;
#pragma unroll
    for (int r = 0; r < kFarthestRows; ++r) {
      const double of_pair = __shfl_sync(kAllLanes, distance, 8 * r);
      if (lane == owner[r]) {
        met = true;
        own_distance = of_pair;
      }
    }
    if (met) {
      open &= open - 1;
      ++own.compared;
      if (own_distance < own.sq_dist) {
        own.sq_dist = own_distance;
        own.nearest = first + c;
        if (!(own_distance > 0)) open = 0;
      }
    }
  }
}

// Stages codes of `count` rows, of_slot(s) each, for the whole block, which needs a barrier after it; before it there
// was the grid.sync at the end of the last turn.
template <typename T, typename OfSlot>
__device__ inline void stage_codes(const LazyCloud<T>& a, CodeQuad* staged, int count, OfSlot of_slot) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int s = threadIdx.x / kWarp; s < count; s += warps) {
    const CodeQuad* const code = a.codes.code + of_slot(s) * a.codes.stride;
    for (int q = lane; q < a.codes.stride; q += kWarp) staged[s * a.pitch + q] = code[q];
  }
}

// Compares picks [first, last), at most a.staged_rows, with the members, or with all points if members is null. N: the
// warp takes 8 N centres at a time. The same rows are the same warp's whatever the picks.
template <int N, typename T>
__device__ inline void flush(const LazyCloud<T>& a, const int64_t* members, int64_t count, int64_t first, int64_t last,
                             LazyShared& shared, CodeQuad* staged) {
  constexpr int M = 2;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int centres = static_cast<int>(last - first);
  for (int c = threadIdx.x; c < centres; c += blockDim.x) {
    shared.centre[c] = a.cloud.indices[first + c];
    shared.terms[c] = centre_terms(a.codes, shared.centre[c]);
  }
  stage_codes(a, staged, centres, [&](int c) { return a.cloud.indices[first + c]; });
  __syncthreads();
  const int64_t all_warps = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp; tile * 16 * M < count;
       tile += all_warps) {
    const int64_t place = tile * 16 * M + lane;
    Row own;
    if (place < count) own = load_row(a, members == nullptr ? place : members[place]);
    if (__ballot_sync(kAllLanes, own.sq_dist > 0) == 0) continue;
    for (int group = 0; group < centres; group += 8 * N) {
      const int real = centres - group < 8 * N ? centres - group : 8 * N;
      uint64_t open = ~uint64_t{0} >> (64 - real);
      if (centres > kDirect) {
        unsigned code[2 * M];
#pragma unroll
        for (int i = 0; i < 2 * M; ++i) {
          const int64_t row = __shfl_sync(kAllLanes, own.index, 8 * i + lane / 4);
          code[i] = static_cast<unsigned>((row < 0 ? 0 : row) * a.codes.stride) + lane % 4;
        }
        int dots[M][N][4];
        code_dots<M, N>(a.codes.code, code, staged + (group + lane / 4) * a.pitch + lane % 4, a.pitch,
                        a.codes.stride / kChunkQuads, dots);
        // Bounds tighten as distances fall; kept from group to group, the terms would not fit the registers.
        const RowTerms terms = own.sq_dist > 0 ? row_terms(a.codes, own.index, own.sq_dist) : RowTerms{};
        open &= undecided<M, N>(dots, terms, [&](int c) { return shared.terms[group + c]; });
      }
      compare_exactly(a, own, open, first + group, [&](int c) { return shared.centre[group + c]; });
    }
    store_row(a, own);
  }
}

template <typename T>
__device__ inline void flush(const LazyCloud<T>& a, const int64_t* members, int64_t count, int64_t first, int64_t last,
                             LazyShared& shared, CodeQuad* staged) {
  if (a.staged_rows >= 64) {
    flush<8>(a, members, count, first, last, shared, staged);
  } else {
    flush<1>(a, members, count, first, last, shared, staged);
  }
}

}  // namespace fastif
