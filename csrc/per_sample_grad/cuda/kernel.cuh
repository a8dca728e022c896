// per_sample_grad on the GPU. The contract is per_sample_grad.h's.
//
// All kernels hold tiles of the products in registers (../common/register_tile.cuh) and use them there: neither the
// gradients [n, o, d] nor the Gram matrices [n, t, t] nor the products A V^T [n t, q o] are ever in memory. A row is
// one position of one example: row = example * t + position. Every sum has one owner and one order.
#pragma once

#include "../../common/register_tile.cuh"

namespace fastif {

// accumulate. `order` holds the examples sorted by group, offsets[g] .. offsets[g + 1] those of group g. Item =
// ((split * groups + g) * o_tiles + o_tile) * d_tiles + d_tile: a block owns that tile of one group, over one of
// `splits` equal ranges of the group's rows (several where tiles alone would leave most of the GPU idle), and takes the
// rows in order. Groups without examples get zeros.
template <typename T, int RO, int RD>
__global__ void __launch_bounds__(kTileThreads)
    accumulate_kernel(const T* __restrict__ inputs,         // [n, t, d]
                      const T* __restrict__ output_grads,   // [n, t, o]
                      const T* __restrict__ weights,        // [n]
                      const int64_t* __restrict__ order,    // [n]
                      const int64_t* __restrict__ offsets,  // [groups + 1]
                      int64_t t, int64_t d, int64_t o, int64_t groups, int64_t splits,
                      T* __restrict__ out) {  // [splits, groups, o, d]
  using Shared = OuterStorage<T, RO, RD>;
  FASTIF_SHARED(Shared, shared);
  const int64_t o_tiles = ceil_div(o, kTileSide * RO), d_tiles = ceil_div(d, kTileSide * RD);
  const int64_t items = splits * groups * o_tiles * d_tiles;
  const int ty = threadIdx.x / kTileSide, tx = threadIdx.x % kTileSide;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t d0 = item % d_tiles * (kTileSide * RD), o0 = item / d_tiles % o_tiles * (kTileSide * RO);
    const int64_t slab = item / d_tiles / o_tiles, group = slab % groups, split = slab / groups;
    const int64_t example0 = offsets[group], rows = (offsets[group + 1] - example0) * t;
    const int64_t length = ceil_div(rows, splits), begin = split * length;
    const int64_t end = begin + length < rows ? begin + length : rows;
    T total[RO][RD] = {};
    weighted_outer<T, RO, RD>(
        shared, output_grads, o, o0, o, inputs, d, d0, d, end - begin,
        [&](int64_t r, int64_t& row, T& coef) {
          const int64_t example = order[example0 + (begin + r) / t];
          row = example * t + (begin + r) % t;
          coef = weights[example];
        },
        total);
    T* const mine = out + slab * o * d;  // slab = split * groups + group
#pragma unroll
    for (int p = 0; p < RO; ++p)
#pragma unroll
      for (int q = 0; q < RD; ++q) {
        const int64_t i = o0 + tile_index<RO>(ty, p), j = d0 + tile_index<RD>(tx, q);
        if (i < o && j < d) mine[i * d + j] = total[p][q];
      }
  }
}

// accumulate_squares. Item = (split * o_tiles + o_tile) * d_tiles + d_tile: a block owns that tile over one of `splits`
// equal ranges of the examples. It forms the tile of one example's gradient after another in registers and adds its
// weighted squares to a second set of accumulators; for float32 that set is emptied into a third, in global memory that
// is the block's own, after every kSquares examples, so that no sum is long.
inline constexpr int kSquares = 512;

template <typename T, int RO, int RD>
__global__ void __launch_bounds__(kTileThreads, 1)
    accumulate_squares_kernel(const T* __restrict__ inputs,        // [n, t, d]
                              const T* __restrict__ output_grads,  // [n, t, o]
                              const T* __restrict__ weights,       // [n]
                              int64_t n, int64_t t, int64_t d, int64_t o, int64_t splits,
                              T* __restrict__ out) {  // [splits, o, d]
  using Shared = OuterStorage<T, RO, RD>;
  FASTIF_SHARED(Shared, shared);
  const int64_t o_tiles = ceil_div(o, kTileSide * RO), d_tiles = ceil_div(d, kTileSide * RD);
  const int64_t items = splits * o_tiles * d_tiles;
  const int ty = threadIdx.x / kTileSide, tx = threadIdx.x % kTileSide;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t d0 = item % d_tiles * (kTileSide * RD), o0 = item / d_tiles % o_tiles * (kTileSide * RO);
    const int64_t split = item / d_tiles / o_tiles, begin = n * split / splits, end = n * (split + 1) / splits;
    T* const mine = out + split * o * d;
    for (int64_t first = begin; first < end; first += kSquares) {
      const int64_t last = first + kSquares < end ? first + kSquares : end;
      T squares[RO][RD] = {};
      for (int64_t example = first; example < last; ++example) {
        T total[RO][RD] = {};
        weighted_outer<T, RO, RD>(
            shared, output_grads, o, o0, o, inputs, d, d0, d, t,
            [&](int64_t r, int64_t& row, T& coef) {
              row = example * t + r;
              coef = T(1);
            },
            total);
        const T weight = weights[example];
#pragma unroll
        for (int p = 0; p < RO; ++p)
#pragma unroll
          for (int q = 0; q < RD; ++q) squares[p][q] += weight * total[p][q] * total[p][q];
      }
#pragma unroll
      for (int p = 0; p < RO; ++p)
#pragma unroll
        for (int q = 0; q < RD; ++q) {
          const int64_t i = o0 + tile_index<RO>(ty, p), j = d0 + tile_index<RD>(tx, q);
          if (i < o && j < d) mine[i * d + j] = first == begin ? squares[p][q] : mine[i * d + j] + squares[p][q];
        }
    }
  }
}

// sq_norms for t = 1: |u|^2 |a|^2, a warp per example.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    sq_norms_single_kernel(const T* __restrict__ inputs, const T* __restrict__ output_grads, int64_t n, int64_t d,
                           int64_t o, double* __restrict__ out) {  // [n]
  const int lane = threadIdx.x % kWarp, warps = kTileThreads / kWarp;
  const auto sq_norm = [&](const T* __restrict__ x, int64_t length) {
    T sum = 0;
    for (int64_t j = lane; j < length; j += kWarp) sum += x[j] * x[j];
    return static_cast<double>(warp_sum(sum));
  };
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp; i < n; i += stride) {
    const double product = sq_norm(inputs + i * d, d) * sq_norm(output_grads + i * o, o);
    if (lane == 0) out[i] = product;
  }
}

// sq_norms by Gram matrices, t^2 (d + o) / 2 products: a block owns one row of tiles of the t x t matrices of one
// example, on and below the diagonal; item = example * strips + strip. Both matrices' tiles are in registers at once
// and are multiplied there; what is below the diagonal counts twice.
template <typename T, int R>
__global__ void __launch_bounds__(kTileThreads)
    sq_norms_gram_kernel(const T* __restrict__ inputs, const T* __restrict__ output_grads, int64_t n, int64_t t,
                         int64_t d, int64_t o, double* __restrict__ partial) {  // [n, strips]
  constexpr int side = kTileSide * R;
  struct Shared {
    TileBuffers<T, R, R> tiles;
    double parts[kWarp];
  };
  FASTIF_SHARED(Shared, shared);
  const int64_t strips = ceil_div(t, side), items = n * strips;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const T* const a = inputs + item / strips * t * d;
    const T* const u = output_grads + item / strips * t * o;
    const int64_t strip = item % strips;
    double sum = 0;
    for (int64_t other = 0; other <= strip; ++other) {
      T gram_a[R][R] = {}, gram_u[R][R] = {};
      dot_tile<T, R, R>(shared.tiles, a, strip * side, t, a, other * side, t, d, gram_a);
      dot_tile<T, R, R>(shared.tiles, u, strip * side, t, u, other * side, t, o, gram_u);
      double tile = 0;
#pragma unroll
      for (int p = 0; p < R; ++p)
#pragma unroll
        for (int q = 0; q < R; ++q) tile += static_cast<double>(gram_a[p][q]) * static_cast<double>(gram_u[p][q]);
      sum += other < strip ? 2 * tile : tile;
    }
    sum = block_sum(sum, shared.parts);
    if (threadIdx.x == 0) partial[item] = sum;
  }
}

// sq_norms by the gradient itself, t o d products, less where positions are many and the only way with a scale: a block
// owns one tile of one example's gradient, in registers, and squares it; item = (example * o_tiles + o_tile) * d_tiles
// + d_tile. scale: null stands for 1.
template <typename T, int RO, int RD>
__global__ void __launch_bounds__(kTileThreads)
    sq_norms_outer_kernel(const T* __restrict__ inputs, const T* __restrict__ output_grads,
                          const T* __restrict__ scale,  // [o, d]
                          int64_t n, int64_t t, int64_t d, int64_t o,
                          double* __restrict__ partial) {  // [n, o_tiles * d_tiles]
  struct Shared {
    OuterStorage<T, RO, RD> outer;
    double parts[kWarp];
  };
  FASTIF_SHARED(Shared, shared);
  const int64_t o_tiles = ceil_div(o, kTileSide * RO), d_tiles = ceil_div(d, kTileSide * RD);
  const int64_t items = n * o_tiles * d_tiles;
  const int ty = threadIdx.x / kTileSide, tx = threadIdx.x % kTileSide;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t d0 = item % d_tiles * (kTileSide * RD), o0 = item / d_tiles % o_tiles * (kTileSide * RO);
    const int64_t row0 = item / d_tiles / o_tiles * t;
    T total[RO][RD] = {};
    weighted_outer<T, RO, RD>(
        shared.outer, output_grads, o, o0, o, inputs, d, d0, d, t,
        [&](int64_t r, int64_t& row, T& coef) {
          row = row0 + r;
          coef = T(1);
        },
        total);
    double sum = 0;
#pragma unroll
    for (int p = 0; p < RO; ++p)
#pragma unroll
      for (int q = 0; q < RD; ++q) {
        const int64_t i = o0 + tile_index<RO>(ty, p), j = d0 + tile_index<RD>(tx, q);
        const T factor = scale && i < o && j < d ? scale[i * d + j] : T(1);  // past the edges total is 0
        sum += static_cast<double>(factor) * static_cast<double>(total[p][q]) * static_cast<double>(total[p][q]);
      }
    sum = block_sum(sum, shared.parts);  // the next item's barriers come before its use of parts
    if (threadIdx.x == 0) partial[item] = sum;
  }
}

// dots. A block owns one direction and E = max(1, side / t) neighbouring examples (side = 16 RR rows), whole examples
// only; item = direction * example_tiles + example_tile. For its rows, `side` at a time, it forms tiles of T = A V^T,
// multiplies them by U at once, and sums over o: thread (ty, tx) owns rows tile_index(ty, .), the 16 neighbours tx
// share them. Thread e < E then adds the rows of example e in order of position.
template <typename T, int RR, int RO>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 4 && RR * RO < 64 ? 2 : 1)
    dots_kernel(const T* __restrict__ inputs,        // [n, t, d]
                const T* __restrict__ output_grads,  // [n, t, o]
                const T* __restrict__ directions,    // [q, o, d]
                int64_t n, int64_t t, int64_t d, int64_t o, int64_t q,
                T* __restrict__ out) {  // [q, n]
  constexpr int side = kTileSide * RR, o_side = kTileSide * RO;
  struct Shared {
    TileBuffers<T, RR, RO> tiles;
    double row_sum[side];
  };
  FASTIF_SHARED(Shared, shared);
  const int ty = threadIdx.x / kTileSide, tx = threadIdx.x % kTileSide;
  const int64_t owned = side / t > 1 ? side / t : 1, example_tiles = ceil_div(n, owned), items = q * example_tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t direction = item / example_tiles, example0 = item % example_tiles * owned;
    const int64_t examples = example0 + owned < n ? owned : n - example0;
    const int64_t row_end = (example0 + examples) * t, my_row = (example0 + threadIdx.x) * t;
    const T* const v = directions + direction * o * d;
    double mine = 0;
    for (int64_t row0 = example0 * t; row0 < row_end; row0 += side) {
      double sum[RR] = {};
      for (int64_t o0 = 0; o0 < o; o0 += o_side) {
        T product[RR][RO] = {};
        dot_tile<T, RR, RO>(shared.tiles, inputs, row0, row_end, v, o0, o, d, product);
#pragma unroll
        for (int p = 0; p < RR; ++p) {
          const int64_t row = row0 + tile_index<RR>(ty, p);
          T part = 0;
#pragma unroll
          for (int r = 0; r < RO; ++r) {
            const int64_t i = o0 + tile_index<RO>(tx, r);
            if (row < row_end && i < o) part += output_grads[row * o + i] * product[p][r];
          }
          sum[p] += static_cast<double>(part);
        }
      }
#pragma unroll
      for (int p = 0; p < RR; ++p) {
#pragma unroll
        for (int offset = kTileSide / 2; offset > 0; offset /= 2) sum[p] += __shfl_xor_sync(kAllLanes, sum[p], offset);
        if (tx == 0) shared.row_sum[tile_index<RR>(ty, p)] = sum[p];
      }
      __syncthreads();  // the next tile's barriers come before row_sum is written again
      if (threadIdx.x < examples) {
        const int64_t from = my_row > row0 ? my_row : row0;
        const int64_t to = my_row + t < row0 + side ? my_row + t : row0 + side;
        for (int64_t row = from; row < to; ++row) mine += shared.row_sum[row - row0];
      }
    }
    if (threadIdx.x < examples) out[direction * n + example0 + threadIdx.x] = static_cast<T>(mine);
  }
}

}  // namespace fastif
