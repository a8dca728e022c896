#include <algorithm>

#include "kernel.cuh"
#include "launch.h"

namespace fastif {
namespace {

constexpr int64_t kEnoughBlocks = 1024;  // a few for each place of the largest GPUs

unsigned blocks_for(int64_t items) { return static_cast<unsigned>(std::min<int64_t>(items, int64_t{1} << 30)); }

// Tiles of [o or positions] x [d or o]: 16 x 128 for last layers of few classes, 128 x 128 where both sides fill it and
// the accumulators fit the registers, else 64 x 64.
struct Tile {
  int rows, columns;
};

Tile tile_for(int64_t rows, int64_t columns, int64_t element_bytes) {
  if (rows <= 16 && columns > 64) return {1, 8};
  if (element_bytes == 4 && rows > 64 && columns > 64) return {8, 8};
  return {4, 4};
}

// The accumulators of accumulate_squares are of three sets (a chunk of positions, the gradient, the squares): no tile
// of 128 x 128 fits the registers.
Tile squares_tile_for(int64_t rows, int64_t columns, int64_t element_bytes) {
  const Tile tile = tile_for(rows, columns, element_bytes);
  return tile.rows == 8 ? Tile{4, 8} : tile;
}

int64_t tiles_of(Tile tile, int64_t rows, int64_t columns) {
  return ceil_div(rows, kTileSide * tile.rows) * ceil_div(columns, kTileSide * tile.columns);
}

enum class SqNorms { single, gram_small, gram, outer };

SqNorms sq_norms_route(int64_t t, int64_t d, int64_t o, bool scaled, int64_t element_bytes) {
  if (scaled) return SqNorms::outer;
  if (t == 1) return SqNorms::single;
  const Tile tile = tile_for(o, d, element_bytes);  // both counted with the padding of their tiles
  const int64_t outer = tiles_of(tile, o, d) * tile.rows * tile.columns * kTileThreads * t;
  const int64_t side = t <= kTileSide ? kTileSide : 4 * kTileSide, across = ceil_div(t, side);
  const int64_t gram = across * (across + 1) / 2 * side * side * (d + o);
  if (outer <= gram) return SqNorms::outer;
  return t <= kTileSide ? SqNorms::gram_small : SqNorms::gram;
}

}  // namespace

int64_t per_sample_grad_accumulate_splits(int64_t n, int64_t t, int64_t d, int64_t o, int64_t groups,
                                          int64_t element_bytes) {
  const int64_t blocks = groups * tiles_of(tile_for(o, d, element_bytes), o, d);
  return std::max<int64_t>(1, std::min(kEnoughBlocks / blocks, n * t / (groups * kChunk)));
}

template <typename T>
void per_sample_grad_accumulate_launch(const T* inputs, const T* output_grads, const T* weights, const int64_t* order,
                                       const int64_t* offsets, int64_t t, int64_t d, int64_t o, int64_t groups,
                                       int64_t splits, T* out, cudaStream_t stream) {
  const Tile tile = tile_for(o, d, sizeof(T));
  const unsigned blocks = blocks_for(splits * groups * tiles_of(tile, o, d));
  const auto launch = [&](auto kernel) {
    kernel<<<blocks, kTileThreads, 0, stream>>>(inputs, output_grads, weights, order, offsets, t, d, o, groups, splits,
                                                out);
  };
  if (tile.rows == 1) {
    launch(accumulate_kernel<T, 1, 8>);
  } else if (tile.rows == 4) {
    launch(accumulate_kernel<T, 4, 4>);
  } else if constexpr (sizeof(T) == 4) {
    launch(accumulate_kernel<T, 8, 8>);
  }
}

int64_t per_sample_grad_accumulate_squares_splits(int64_t n, int64_t t, int64_t d, int64_t o, int64_t element_bytes) {
  const int64_t blocks = tiles_of(squares_tile_for(o, d, element_bytes), o, d);
  return std::max<int64_t>(1, std::min({kEnoughBlocks / blocks, n, n * t / kChunk}));
}

template <typename T>
void per_sample_grad_accumulate_squares_launch(const T* inputs, const T* output_grads, const T* weights, int64_t n,
                                               int64_t t, int64_t d, int64_t o, int64_t splits, T* out,
                                               cudaStream_t stream) {
  const Tile tile = squares_tile_for(o, d, sizeof(T));
  const unsigned blocks = blocks_for(splits * tiles_of(tile, o, d));
  const auto launch = [&](auto kernel) {
    kernel<<<blocks, kTileThreads, 0, stream>>>(inputs, output_grads, weights, n, t, d, o, splits, out);
  };
  if (tile.rows == 1) {
    launch(accumulate_squares_kernel<T, 1, 8>);
  } else if (tile.columns == 4) {
    launch(accumulate_squares_kernel<T, 4, 4>);
  } else if constexpr (sizeof(T) == 4) {
    launch(accumulate_squares_kernel<T, 4, 8>);
  }
}

int64_t per_sample_grad_sq_norms_parts(int64_t t, int64_t d, int64_t o, bool scaled, int64_t element_bytes) {
  switch (sq_norms_route(t, d, o, scaled, element_bytes)) {
    case SqNorms::outer:
      return tiles_of(tile_for(o, d, element_bytes), o, d);
    case SqNorms::gram:
      return ceil_div(t, 4 * kTileSide);
    default:
      return 1;
  }
}

template <typename T>
void per_sample_grad_sq_norms_launch(const T* inputs, const T* output_grads, const T* scale, int64_t n, int64_t t,
                                     int64_t d, int64_t o, double* partial, cudaStream_t stream) {
  const SqNorms route = sq_norms_route(t, d, o, scale != nullptr, sizeof(T));
  if (route == SqNorms::single) {
    sq_norms_single_kernel<T><<<blocks_for(ceil_div(n, kTileThreads / kWarp)), kTileThreads, 0, stream>>>(
        inputs, output_grads, n, d, o, partial);
    return;
  }
  const unsigned blocks = blocks_for(n * per_sample_grad_sq_norms_parts(t, d, o, scale != nullptr, sizeof(T)));
  const auto launch_gram = [&](auto kernel) {
    kernel<<<blocks, kTileThreads, 0, stream>>>(inputs, output_grads, n, t, d, o, partial);
  };
  const auto launch_outer = [&](auto kernel) {
    kernel<<<blocks, kTileThreads, 0, stream>>>(inputs, output_grads, scale, n, t, d, o, partial);
  };
  const Tile tile = tile_for(o, d, sizeof(T));
  if (route == SqNorms::gram_small) {
    launch_gram(sq_norms_gram_kernel<T, 1>);
  } else if (route == SqNorms::gram) {
    launch_gram(sq_norms_gram_kernel<T, 4>);
  } else if (tile.rows == 1) {
    launch_outer(sq_norms_outer_kernel<T, 1, 8>);
  } else if (tile.rows == 4) {
    launch_outer(sq_norms_outer_kernel<T, 4, 4>);
  } else if constexpr (sizeof(T) == 4) {
    launch_outer(sq_norms_outer_kernel<T, 8, 8>);
  }
}

template <typename T>
void per_sample_grad_dots_launch(const T* inputs, const T* output_grads, const T* directions, int64_t n, int64_t t,
                                 int64_t d, int64_t o, int64_t q, T* out, cudaStream_t stream) {
  const Tile tile = tile_for(o, n * t, sizeof(T));  // as o x rows
  const int64_t side = static_cast<int64_t>(kTileSide) * tile.columns;
  const unsigned blocks = blocks_for(q * ceil_div(n, std::max<int64_t>(1, side / t)));
  const auto launch = [&](auto kernel) {
    kernel<<<blocks, kTileThreads, 0, stream>>>(inputs, output_grads, directions, n, t, d, o, q, out);
  };
  if (tile.rows == 1) {
    launch(dots_kernel<T, 8, 1>);
  } else if (tile.rows == 4) {
    launch(dots_kernel<T, 4, 4>);
  } else if constexpr (sizeof(T) == 4) {
    launch(dots_kernel<T, 8, 8>);
  }
}

#define FASTIF_INSTANTIATE(T)                                                                                         \
  template void per_sample_grad_accumulate_launch<T>(const T*, const T*, const T*, const int64_t*, const int64_t*,    \
                                                     int64_t, int64_t, int64_t, int64_t, int64_t, T*, cudaStream_t);  \
  template void per_sample_grad_accumulate_squares_launch<T>(const T*, const T*, const T*, int64_t, int64_t, int64_t, \
                                                             int64_t, int64_t, T*, cudaStream_t);                     \
  template void per_sample_grad_sq_norms_launch<T>(const T*, const T*, const T*, int64_t, int64_t, int64_t, int64_t,  \
                                                   double*, cudaStream_t);                                            \
  template void per_sample_grad_dots_launch<T>(const T*, const T*, const T*, int64_t, int64_t, int64_t, int64_t,      \
                                               int64_t, T*, cudaStream_t);
FASTIF_INSTANTIATE(float)
FASTIF_INSTANTIATE(double)

}  // namespace fastif
