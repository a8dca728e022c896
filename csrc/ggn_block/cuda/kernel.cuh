// ggn_block_ and kronecker_block_ on the GPU. The contract is ggn_block.h's.
//
// The work is a list of weighted Gram matrices G = sum_i H_i[a, b] x_i x_i^T of the features, one per class pair, each
// cut into the square tiles of its lower triangle. What tells the two ops apart is where H_i[a, b] comes from: a
// parameter of the kernel (SoftmaxHessians, GivenHessians). An item is one tile of one Gram matrix: item = gram * tiles
// + tile. Two kernels run over a range of items:
//   ggn_gram     a block owns an item and one of `splits` ranges of the examples; it writes the tile to scratch.
//   ggn_combine  a block owns a 32 x 32 part of an item; it sums the splits in order and adds the result to the blocks
//                (a, b) and (b, a) of `out` and, turned in shared memory, to their mirror images: every access to `out`
//                coalesced.
// float32 is multiplied on tensor cores, in split operands (tensor_tile.cuh), float64 on CUDA cores.
// No entry of `out` has two owners and nothing is accumulated atomically: the same input gives the same bits.
//
// The diagonal blocks. In kronecker_block_ they are Gram matrices as the others are. In ggn_block_ (a, a) is minus the
// sum over b != a of the blocks (a, b). Where the scratch of all pairs fits (kScratchBytes, in plan.h),
// ggn_combine_diagonal forms that sum from scratch: c (c - 1) / 2 Gram matrices and no more. Where it does not, c is
// large, and c further Gram matrices join the list, a share of 2 / (c - 1), with no scratch that grows with c.
#pragma once

#include "../../common/tensor_tile.cuh"

namespace fastif {

inline constexpr int kCombineTile = 32;
inline constexpr int kCombineRows = 8;  // a combining block is 32 x 8 threads: thread (y, x) owns rows y, y + 8, ...

// Gram matrix `gram` belongs to classes a < b, or to a = b from c (c - 1) / 2 on.
struct ClassPair {
  int64_t a, b;
};

__host__ __device__ inline int64_t pair_index(int64_t a, int64_t b) { return b * (b - 1) / 2 + a; }

__host__ __device__ inline ClassPair class_pair(int64_t gram, int64_t c) {
  const int64_t pairs = c * (c - 1) / 2;
  if (gram >= pairs) return {gram - pairs, gram - pairs};
  const int64_t row = triangle_row(gram);
  return {gram - row * (row + 1) / 2, row + 1};
}

// Tile number `tile` of the lower triangle: rows from j0, columns from k0 <= j0, in units of tiles.
struct TilePlace {
  int64_t j, k;
};

__host__ __device__ inline TilePlace tile_place(int64_t tile) {
  const int64_t row = triangle_row(tile);
  return {row, tile - row * (row + 1) / 2};
}

// H_i = w_i (diag(p_i) - p_i p_i^T), the diagonal as the sum of the others.
template <typename T>
struct SoftmaxHessians {
  const T* probs;    // [n, c]
  const T* weights;  // [n]

  __device__ T entry(int64_t i, ClassPair pair, int64_t c) const {
    const T* const p = probs + i * c;
    if (pair.a != pair.b) return -weights[i] * p[pair.a] * p[pair.b];
    T others = 0;
    for (int64_t b = 0; b < c; ++b)
      if (b != pair.a) others += p[b];
    return weights[i] * p[pair.a] * others;
  }
};

// H_i as it is given. a <= b in every pair: the lower triangle is read.
template <typename T>
struct GivenHessians {
  const T* outer;  // [n, c, c]

  __device__ T entry(int64_t i, ClassPair pair, int64_t c) const { return outer[(i * c + pair.b) * c + pair.a]; }
};

// One-dimensional grid: block = (item - first_item) * splits + split. Split s of the examples is
// [s, s + 1) * split_length.
template <typename T, int R, typename Cores, typename Hessians>
__global__ void __launch_bounds__(kTileThreads)
    ggn_gram_kernel(const T* __restrict__ features,  // [n, d]
                    const Hessians hessians, int64_t n, int64_t d, int64_t c, int64_t first_item, int64_t tiles,
                    int64_t splits, int64_t split_length,
                    T* __restrict__ scratch) {  // [items, splits, 16 R, 16 R]
  constexpr int side = kTileSide * R;
  using Shared = OuterStorage<T, R, R, Cores>;
  FASTIF_SHARED(Shared, shared);
  const int64_t item = first_item + blockIdx.x / splits, split = blockIdx.x % splits;
  const ClassPair pair = class_pair(item / tiles, c);
  const TilePlace place = tile_place(item % tiles);
  const int64_t begin = split * split_length, end = begin + split_length < n ? begin + split_length : n;
  T total[R][R] = {};
  weighted_outer(
      shared, features, d, place.j * side, d, features, d, place.k * side, d, end - begin,
      [&](int64_t r, int64_t& row, T& coef) {
        row = begin + r;
        coef = hessians.entry(row, pair, c);
      },
      total);
  T* const mine = scratch + static_cast<int64_t>(blockIdx.x) * side * side;
#pragma unroll
  for (int p = 0; p < R; ++p)
#pragma unroll
    for (int q = 0; q < R; ++q) mine[Cores::template row<R>(p) * side + Cores::template column<R>(q)] = total[p][q];
}

// The part of a tile that a combining block owns: block = (number * parts + part), parts = (side / 32)^2.
struct CombinePlace {
  int64_t number;   // of the item, or of the (class, tile)
  int row, column;  // within the tile
};

__device__ inline CombinePlace combine_place(int side) {
  const int across = side / kCombineTile, parts = across * across;
  const int part = static_cast<int>(blockIdx.x % parts);
  return {static_cast<int64_t>(blockIdx.x / parts), part / across * kCombineTile, part % across * kCombineTile};
}

// Adds value(row, column) of a 32 x 32 part, a part of the lower triangle starting at (j0, k0), to block (a, b) and,
// where b != a, to block (b, a), and its mirror image to both.
template <typename T, typename Value>
__device__ inline void add_mirrored(T* __restrict__ out, int64_t d, int64_t c, ClassPair pair, int64_t j0, int64_t k0,
                                    T (&turned)[kCombineTile][kCombineTile + 1], Value value) {
  const int x = threadIdx.x % kCombineTile, y = threadIdx.x / kCombineTile;
  const auto add = [&](int64_t a, int64_t j, int64_t b, int64_t k, T v) { out[((a * d + j) * c + b) * d + k] += v; };
  for (int r = y; r < kCombineTile; r += kCombineRows) {
    const int64_t j = j0 + r, k = k0 + x;
    T v = 0;
    if (j < d && k <= j) {
      v = value(r, x);
      add(pair.a, j, pair.b, k, v);
      if (pair.a != pair.b) add(pair.b, j, pair.a, k, v);
    }
    turned[r][x] = v;
  }
  __syncthreads();
  for (int r = y; r < kCombineTile; r += kCombineRows) {  // now r counts columns and x rows: neighbours in `out` again
    const int64_t j = j0 + x, k = k0 + r;
    if (j < d && k < j) {
      const T v = turned[x][r];
      add(pair.a, k, pair.b, j, v);
      if (pair.a != pair.b) add(pair.b, k, pair.a, j, v);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kCombineTile* kCombineRows)
    ggn_combine_kernel(const T* __restrict__ scratch, int64_t d, int64_t c, int64_t first_item, int64_t tiles,
                       int64_t splits, int side, T* __restrict__ out) {
  struct Shared {
    T turned[kCombineTile][kCombineTile + 1];
  };
  FASTIF_SHARED(Shared, shared);
  const CombinePlace part = combine_place(side);
  const int64_t item = first_item + part.number;
  const TilePlace place = tile_place(item % tiles);
  const T* const tile = scratch + part.number * splits * side * side;
  add_mirrored(out, d, c, class_pair(item / tiles, c), place.j * side + part.row, place.k * side + part.column,
               shared.turned, [&](int r, int x) {
                 double sum = 0;
                 for (int64_t s = 0; s < splits; ++s) sum += tile[(s * side + part.row + r) * side + part.column + x];
                 return static_cast<T>(sum);
               });
}

// Block (a, a) from the scratch of all pairs. One-dimensional grid: block = (a * tiles + tile) * parts + part.
template <typename T>
__global__ void __launch_bounds__(kCombineTile* kCombineRows)
    ggn_combine_diagonal_kernel(const T* __restrict__ scratch, int64_t d, int64_t c, int64_t tiles, int64_t splits,
                                int side, T* __restrict__ out) {
  struct Shared {
    T turned[kCombineTile][kCombineTile + 1];
  };
  FASTIF_SHARED(Shared, shared);
  const CombinePlace part = combine_place(side);
  const int64_t a = part.number / tiles, tile = part.number % tiles;
  const TilePlace place = tile_place(tile);
  add_mirrored(out, d, c, {a, a}, place.j * side + part.row, place.k * side + part.column, shared.turned,
               [&](int r, int x) {
                 double sum = 0;
                 for (int64_t b = 0; b < c; ++b) {
                   if (b == a) continue;
                   const int64_t gram = a < b ? pair_index(a, b) : pair_index(b, a);
                   const T* const from = scratch + (gram * tiles + tile) * splits * side * side;
                   for (int64_t s = 0; s < splits; ++s) sum -= from[(s * side + part.row + r) * side + part.column + x];
                 }
                 return static_cast<T>(sum);
               });
}

}  // namespace fastif
