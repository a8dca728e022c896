// Matrix products whose operands are gathered or weighted on the way in and whose results are used in registers.
//
// A block of 256 threads, seen as 16 x 16, owns a tile of 16 RA x 16 RB results; thread (ty, tx) owns RA x RB of them,
// in groups of up to 4 neighbours, 16 groups apart, so that one 16-byte read of shared memory feeds 4 of them
// (tile_index). The summed axis goes through shared memory kDepth at a time, in two buffers: while a step is multiplied
// out of one, the next is on its way from global memory to registers and from there into the other; one barrier per
// step. Two products: `weighted_outer` sums over rows (results are columns x columns), `dot_tile` along rows (rows x
// rows).
//
// What multiplies a step, and where in the tile a thread's results are, is a type: CudaCores here, TensorCores in
// tensor_tile.cuh.
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

// Fused multiply-adds of T, the thread's results as tile_index has them.
struct CudaCores {
  static constexpr int pad = kTilePad;

  // Position in the tile of the thread's results [p][.] and [.][q].
  template <int RA>
  __device__ static int row(int p) {
    return tile_index<RA>(threadIdx.x / kTileSide, p);
  }
  template <int RB>
  __device__ static int column(int q) {
    return tile_index<RB>(threadIdx.x % kTileSide, q);
  }

  // acc += a^T b over one buffer.
  template <typename Buffer, typename T, int RA, int RB>
  __device__ static void multiply(const Buffer& buffer, T (&acc)[RA][RB]) {
#pragma unroll
    for (int s = 0; s < kDepth; ++s) {
      T a[RA], b[RB];
#pragma unroll
      for (int r = 0; r < RA; ++r) a[r] = buffer.a[s][row<RA>(r)];
#pragma unroll
      for (int r = 0; r < RB; ++r) b[r] = buffer.b[s][column<RB>(r)];
#pragma unroll
      for (int p = 0; p < RA; ++p)
#pragma unroll
        for (int q = 0; q < RB; ++q) acc[p][q] += a[p] * b[q];
    }
  }
};

template <typename T, int RA, int RB, typename Cores = CudaCores>
struct TileBuffers {
  struct alignas(16) Buffer {
    T a[kDepth][kTileSide * RA + Cores::pad];
    T b[kDepth][kTileSide * RB + Cores::pad];
  } buffer[2];
};

template <typename T, int RA, int RB, typename Cores = CudaCores>
struct OuterStorage {
  TileBuffers<T, RA, RB, Cores> tiles;
  static constexpr int chunk = sizeof(T) == 4 ? kChunk : kChunk / 2;  // float64 would not fit shared memory
  const T *a_row[chunk], *b_row[chunk];  // the chunk's rows of the operands, from the tile's first column on
  T coef[chunk];                         // and their weights
};

// acc += the product over `steps` steps. `load(step, a, b)` brings this thread's RA + RB entries of a step from global
// memory, `store(step, a, b, buffer)` puts them in their places. The caller's barrier must stand between earlier reads
// of the buffers and this call; the last barrier inside stands after the last read.
template <typename T, int RA, int RB, typename Cores, typename Load, typename Store>
__device__ inline void pipeline(TileBuffers<T, RA, RB, Cores>& tiles, int64_t steps, T (&acc)[RA][RB], Load load,
                                Store store) {
  T a[RA], b[RB];
  load(int64_t{0}, a, b);
  store(int64_t{0}, a, b, tiles.buffer[0]);
  __syncthreads();
  for (int64_t step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) load(step + 1, a, b);
    Cores::multiply(tiles.buffer[step % 2], acc);
    if (more) store(step + 1, a, b, tiles.buffer[(step + 1) % 2]);  // last read before the previous barrier
    __syncthreads();
  }
}

// total[p][q] += sum over r in [0, count) of coef_r A[row_r, a0 + p'] B[row_r, b0 + q'],   p' = Cores::row<RA>(p),
// q' = Cores::column<RB>(q). `row_of(r, row, coef)` names the r-th row and its weight; columns from a_cols, b_cols on
// count as 0. The order of summation is that of r. Loading, neighbouring threads own neighbouring columns of a row:
// coalesced in any layout.
template <typename T, int RA, int RB, typename Cores, typename RowOf>
__device__ inline void weighted_outer(OuterStorage<T, RA, RB, Cores>& shared, const T* __restrict__ A, int64_t a_stride,
                                      int64_t a0, int64_t a_cols, const T* __restrict__ B, int64_t b_stride, int64_t b0,
                                      int64_t b_cols, int64_t count, RowOf row_of, T (&total)[RA][RB]) {
  constexpr bool second_set = sizeof(T) == 4;
  constexpr int rows = OuterStorage<T, RA, RB, Cores>::chunk;
  const int tid = threadIdx.x;
  // Of every step a thread brings one column of either operand, every so many rows of it.
  constexpr int a_apart = kTileSide / RA, b_apart = kTileSide / RB;
  const int a_column = tid % (kTileSide * RA), a_first = tid / (kTileSide * RA);
  const int b_column = tid % (kTileSide * RB), b_first = tid / (kTileSide * RB);
  const bool a_inside = a0 + a_column < a_cols, b_inside = b0 + b_column < b_cols;
  for (int64_t chunk = 0; chunk < count; chunk += rows) {
    const int length = static_cast<int>(count - chunk < rows ? count - chunk : rows);
    for (int r = tid; r < rows; r += kTileThreads) {  // what the chunk lacks is row 0 with weight 0
      int64_t row = 0;
      T coef = 0;
      if (r < length) row_of(chunk + r, row, coef);
      shared.a_row[r] = A + (row * a_stride + a0);
      shared.b_row[r] = B + (row * b_stride + b0);
      shared.coef[r] = coef;
    }
    __syncthreads();
    T sum[RA][RB] = {};
    auto load = [&](int64_t step, T(&a)[RA], T(&b)[RB]) {
      const int s0 = static_cast<int>(step) * kDepth;
#pragma unroll
      for (int m = 0; m < RA; ++m) a[m] = a_inside ? shared.a_row[s0 + a_first + m * a_apart][a_column] : T(0);
#pragma unroll
      for (int m = 0; m < RB; ++m) b[m] = b_inside ? shared.b_row[s0 + b_first + m * b_apart][b_column] : T(0);
    };
    // Weighting waits for what was loaded, so it belongs here and not above.
    auto store = [&](int64_t step, const T(&a)[RA], const T(&b)[RB],
                     typename TileBuffers<T, RA, RB, Cores>::Buffer& buffer) {
      const int s0 = static_cast<int>(step) * kDepth;
#pragma unroll
      for (int m = 0; m < RA; ++m) {
        const int s = a_first + m * a_apart;
        buffer.a[s][a_column] = shared.coef[s0 + s] * a[m];
      }
#pragma unroll
      for (int m = 0; m < RB; ++m) buffer.b[b_first + m * b_apart][b_column] = b[m];
    };
    const int64_t steps = ceil_div(length, kDepth);
    if constexpr (second_set) {
      pipeline(shared.tiles, steps, sum, load, store);
#pragma unroll
      for (int p = 0; p < RA; ++p)
#pragma unroll
        for (int q = 0; q < RB; ++q) total[p][q] += sum[p][q];
    } else {
      pipeline(shared.tiles, steps, total, load, store);
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
  auto store = [&](int64_t, const T(&a)[RA], const T(&b)[RB], typename TileBuffers<T, RA, RB>::Buffer& buffer) {
#pragma unroll
    for (int m = 0; m < RA; ++m) buffer.a[s][first + m * kTileSide] = a[m];
#pragma unroll
    for (int m = 0; m < RB; ++m) buffer.b[s][first + m * kTileSide] = b[m];
  };
  pipeline(tiles, ceil_div(depth, kDepth), acc, load, store);
}

}  // namespace fastif
