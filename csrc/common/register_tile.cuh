// Matrix products whose operands are gathered or weighted on the way in and whose results are used in registers.
//
// A block of 256 threads, seen as 16 x 16, owns a tile of 16 RA x 16 RB results; thread (ty, tx) owns RA x RB of them,
// in groups of up to 4 neighbours, 16 groups apart, so that one 16-byte read of shared memory feeds 4 of them
// (tile_index). The summed axis goes through shared memory kDepth at a time, in two buffers: while a step is multiplied
// out of one, the next is on its way from global memory to registers and from there into the other; one barrier per
// step. Two products: `weighted_outer` sums over rows (results are columns x columns), `dot_tile` along rows (rows x
// rows).
#pragma once

#include "cuda_utils.cuh"

namespace fastif {

inline constexpr int kTileSide = 16;
inline constexpr int kTileThreads = kTileSide * kTileSide;
inline constexpr int kDepth = 16;
inline constexpr int kTilePad =
    4;  // keeps rows 16-byte aligned and spreads the transposing stores of dot_tile over banks
// A float32 sum of a long row of terms loses digits with its length: the accumulators are emptied into a second set
// after this many rows, so that no sum is longer than kChunk + rows / kChunk. (float64 needs no second set.)
inline constexpr int kChunk = 512;

// Position in the tile of the r-th of the R entries that a thread at side position `t` (0..15) owns.
template <int R>
__device__ inline int tile_index(int t, int r) {
  constexpr int group = R < 4 ? R : 4;
  return (r / group) * (kTileSide * group) + t * group + r % group;
}

template <typename T, int RA, int RB>
struct TileBuffers {
  struct alignas(16) Buffer {
    T a[kDepth][kTileSide * RA + kTilePad];
    T b[kDepth][kTileSide * RB + kTilePad];
  } buffer[2];
};

template <typename T, int RA, int RB>
struct OuterStorage {
  TileBuffers<T, RA, RB> tiles;
  int64_t row[kChunk];  // the chunk's rows of the operands, and their weights
  T coef[kChunk];
};

// acc += a^T b over one buffer.
template <typename T, int RA, int RB>
__device__ inline void multiply(const typename TileBuffers<T, RA, RB>::Buffer& buffer, T (&acc)[RA][RB]) {
  const int ty = threadIdx.x / kTileSide, tx = threadIdx.x % kTileSide;
#pragma unroll
  for (int s = 0; s < kDepth; ++s) {
    T a[RA], b[RB];
#pragma unroll
    for (int r = 0; r < RA; ++r) a[r] = buffer.a[s][tile_index<RA>(ty, r)];
#pragma unroll
    for (int r = 0; r < RB; ++r) b[r] = buffer.b[s][tile_index<RB>(tx, r)];
#pragma unroll
    for (int p = 0; p < RA; ++p)
#pragma unroll
      for (int q = 0; q < RB; ++q) acc[p][q] += a[p] * b[q];
  }
}

// acc += the product over `steps` steps. `load(step, a, b)` brings this thread's RA + RB entries of a step from global
// memory, `store(a, b, buffer)` puts them in their places. The caller's barrier must stand between earlier reads of the
// buffers and this call; the last barrier inside stands after the last read.
template <typename T, int RA, int RB, typename Load, typename Store>
__device__ inline void pipeline(TileBuffers<T, RA, RB>& tiles, int64_t steps, T (&acc)[RA][RB], Load load,
                                Store store) {
  T a[RA], b[RB];
  load(int64_t{0}, a, b);
  store(a, b, tiles.buffer[0]);
  __syncthreads();
  for (int64_t step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) load(step + 1, a, b);
    multiply<T, RA, RB>(tiles.buffer[step % 2], acc);
    if (more) store(a, b, tiles.buffer[(step + 1) % 2]);  // last read before the previous barrier
    __syncthreads();
  }
}

// total[p][q] += sum over r in [0, count) of coef_r A[row_r, a0 + p'] B[row_r, b0 + q'],   p', q' the thread's places.
// `row_of(r, row, coef)` names the r-th row and its weight; columns from a_cols, b_cols on count as 0. The order of
// summation is that of r. Loading, neighbouring threads own neighbouring columns of a row: coalesced in any layout.
template <typename T, int RA, int RB, typename RowOf>
__device__ inline void weighted_outer(OuterStorage<T, RA, RB>& shared, const T* __restrict__ A, int64_t a_stride,
                                      int64_t a0, int64_t a_cols, const T* __restrict__ B, int64_t b_stride, int64_t b0,
                                      int64_t b_cols, int64_t count, RowOf row_of, T (&total)[RA][RB]) {
  constexpr int a_width = kTileSide * RA, b_width = kTileSide * RB;
  constexpr bool second_set = sizeof(T) == 4;
  const int tid = threadIdx.x;
  for (int64_t chunk = 0; chunk < count; chunk += kChunk) {
    const int length = static_cast<int>(count - chunk < kChunk ? count - chunk : kChunk);
    for (int r = tid; r < kChunk; r += kTileThreads) {  // what the chunk lacks is row 0 with weight 0
      int64_t row = 0;
      T coef = 0;
      if (r < length) row_of(chunk + r, row, coef);
      shared.row[r] = row;
      shared.coef[r] = coef;
    }
    __syncthreads();
    T sum[RA][RB] = {};
    auto load = [&](int64_t step, T(&a)[RA], T(&b)[RB]) {
      const int s0 = static_cast<int>(step) * kDepth;
#pragma unroll
      for (int m = 0; m < RA; ++m) {
        const int e = tid + m * kTileThreads, s = s0 + e / a_width;
        const int64_t column = a0 + e % a_width;
        a[m] = column < a_cols ? shared.coef[s] * A[shared.row[s] * a_stride + column] : T(0);
      }
#pragma unroll
      for (int m = 0; m < RB; ++m) {
        const int e = tid + m * kTileThreads, s = s0 + e / b_width;
        const int64_t column = b0 + e % b_width;
        b[m] = column < b_cols ? B[shared.row[s] * b_stride + column] : T(0);
      }
    };
    auto store = [&](const T(&a)[RA], const T(&b)[RB], typename TileBuffers<T, RA, RB>::Buffer& buffer) {
#pragma unroll
      for (int m = 0; m < RA; ++m) {
        const int e = tid + m * kTileThreads;
        buffer.a[e / a_width][e % a_width] = a[m];
      }
#pragma unroll
      for (int m = 0; m < RB; ++m) {
        const int e = tid + m * kTileThreads;
        buffer.b[e / b_width][e % b_width] = b[m];
      }
    };
    const int64_t steps = ceil_div(length, kDepth);
    if constexpr (second_set) {
      pipeline<T, RA, RB>(shared.tiles, steps, sum, load, store);
#pragma unroll
      for (int p = 0; p < RA; ++p)
#pragma unroll
        for (int q = 0; q < RB; ++q) total[p][q] += sum[p][q];
    } else {
      pipeline<T, RA, RB>(shared.tiles, steps, total, load, store);
    }
  }
}

// acc[p][q] += sum over j < depth of A[a0 + p', j] B[b0 + q', j]; rows from a_rows, b_rows on count as 0. Loading,
// 16 neighbouring threads own 16 neighbouring columns of a row; the store turns the tile.
template <typename T, int RA, int RB>
__device__ inline void dot_tile(TileBuffers<T, RA, RB>& tiles, const T* __restrict__ A, int64_t a0, int64_t a_rows,
                                const T* __restrict__ B, int64_t b0, int64_t b_rows, int64_t depth, T (&acc)[RA][RB]) {
  const int s = threadIdx.x % kDepth, first = threadIdx.x / kDepth;
  auto load = [&](int64_t step, T(&a)[RA], T(&b)[RB]) {
    const int64_t j = step * kDepth + s;
#pragma unroll
    for (int m = 0; m < RA; ++m) {
      const int64_t row = a0 + first + m * kTileSide;
      a[m] = j < depth && row < a_rows ? A[row * depth + j] : T(0);
    }
#pragma unroll
    for (int m = 0; m < RB; ++m) {
      const int64_t row = b0 + first + m * kTileSide;
      b[m] = j < depth && row < b_rows ? B[row * depth + j] : T(0);
    }
  };
  auto store = [&](const T(&a)[RA], const T(&b)[RB], typename TileBuffers<T, RA, RB>::Buffer& buffer) {
#pragma unroll
    for (int m = 0; m < RA; ++m) buffer.a[s][first + m * kTileSide] = a[m];
#pragma unroll
    for (int m = 0; m < RB; ++m) buffer.b[s][first + m * kTileSide] = b[m];
  };
  pipeline<T, RA, RB>(tiles, ceil_div(depth, kDepth), acc, load, store);
}

}  // namespace fastif
