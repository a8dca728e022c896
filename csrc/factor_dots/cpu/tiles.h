// Products of int8 vectors with a query, in integers, and what the query is packed into for them.
//
// One side of a matrix has its entries side by side in vectors of kLanes, `width` of them rounded up; along the other,
// `pairs` of two entries, sums run. Sums of kChunk pairs fit int32: 2 kChunk 128 32767 < 2^31.
#pragma once

#include <cstdint>

namespace fastif {

inline constexpr int64_t kLanes = 16, kVectors = 4, kChunk = 256;
inline constexpr int64_t kRows = 24;  // factors of a tile: a multiple of what every kernel takes at a time

// Of kRows factors, whole[f][16 v + l] = steps[16 v + l] sum_{p < pairs, h < 2} longs[f][2 p + h] panel[p][v][l][h]:
//   products null   sums[f][l] += sum_{v < vectors} whole[f][16 v + l] shorts[f][16 v + l]
//   else            products[f][16 v + l] += whole[f][16 v + l]
// The sum over pairs is exact, what follows is rounded once for each operation and in this order: on every processor
// the same bits.
struct Tile {
  const int16_t* longs;  // [kRows], `long_stride` apart
  int64_t long_stride;
  const int16_t* panel;  // [pairs, vectors, kLanes, 2], of 64 bytes each
  int64_t pairs;         // <= kChunk
  int vectors;           // <= kVectors
  const float* steps;    // [vectors, kLanes]
  const float* shorts;   // [kRows], `short_stride` apart, and products likewise
  int64_t short_stride;
  float* products;
  float* sums;  // [kRows, kLanes]
};

using TileKernel = void (*)(const Tile&);

// The fastest that the processor has; FASTIF_FACTORS=vnni, avx512, avx2 or generic takes another, for tests. Null for
// a name that says none that it has.
TileKernel tile_kernel();

// to [rows, padded] = from [rows, size], and 0 past it.
void widen(const int8_t* from, int64_t rows, int64_t size, int64_t padded, int16_t* to);
void widen(const int8_t* from, int64_t rows, int64_t size, int64_t padded, float* to);
// x [rows, size], each row times its scale.
void scale_rows(const float* scale, int64_t rows, int64_t size, float* x);
// to[places[row]] += sum_l lanes[row][l], row by row.
void add_lanes(const float* lanes, int64_t rows, const int64_t* places, float* to);
// The largest magnitude.
float largest(const float* x, int64_t size);
// to[i] = x[i] / step to the nearest integer, at most 32767 in magnitude.
void quantize(const float* x, int64_t size, float step, int16_t* to);

}  // namespace fastif
