#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../../common/simd.h"

#ifdef FASTIF_X86
#include <immintrin.h>
#endif

namespace fastif {
namespace {

inline int32_t pair_at(const int16_t* x) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  return pair;
}

#ifdef FASTIF_X86
__attribute__((target("avx512f"), always_inline)) inline __m512 whole_512(__m512i sum, const float* steps) {
  return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(steps));
}

// R factors by V vectors of lanes are in registers: 24 sums at most, V vectors of the query and a pair of a factor's.
// A pair's products are added to a sum in one instruction with VNNI, else in two.
#define FASTIF_TILE_512(name, isa, multiply_add)                                                                     \
  template <int R, int V>                                                                                            \
  __attribute__((target(isa))) void name(const Tile& tile) {                                                         \
    for (int64_t first = 0; first < kRows; first += R) {                                                             \
      const int16_t* const longs = tile.longs + first * tile.long_stride;                                            \
      const int16_t* panel = tile.panel;                                                                             \
      __m512i sum[R][V];                                                                                             \
      _Pragma("GCC unroll 8") for (int r = 0; r < R; ++r) {                                                          \
        _Pragma("GCC unroll 4") for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_si512();                      \
      }                                                                                                              \
      for (int64_t p = 0; p < tile.pairs; ++p, panel += 2 * kLanes * V) {                                            \
        __m512i query[V];                                                                                            \
        _Pragma("GCC unroll 4") for (int v = 0; v < V; ++v) query[v] = _mm512_loadu_si512(panel + 2 * kLanes * v);   \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; ++r) {                                                        \
          const __m512i pair = _mm512_set1_epi32(pair_at(longs + r * tile.long_stride + 2 * p));                     \
          _Pragma("GCC unroll 4") for (int v = 0; v < V; ++v) multiply_add(sum[r][v], pair, query[v]);               \
        }                                                                                                            \
      }                                                                                                              \
      const int64_t place = first * tile.short_stride;                                                               \
      if (tile.products) {                                                                                           \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; ++r) {                                                        \
          _Pragma("GCC unroll 4") for (int v = 0; v < V; ++v) {                                                      \
            float* const to = tile.products + place + r * tile.short_stride + kLanes * v;                            \
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), whole_512(sum[r][v], tile.steps + kLanes * v))); \
          }                                                                                                          \
        }                                                                                                            \
        continue;                                                                                                    \
      }                                                                                                              \
      _Pragma("GCC unroll 8") for (int r = 0; r < R; ++r) {                                                          \
        float* const sums = tile.sums + (first + r) * kLanes;                                                        \
        __m512 total = _mm512_loadu_ps(sums);                                                                        \
        _Pragma("GCC unroll 4") for (int v = 0; v < V; ++v) {                                                        \
          const __m512 other = _mm512_loadu_ps(tile.shorts + place + r * tile.short_stride + kLanes * v);            \
          total = _mm512_add_ps(total, _mm512_mul_ps(whole_512(sum[r][v], tile.steps + kLanes * v), other));         \
        }                                                                                                            \
        _mm512_storeu_ps(sums, total);                                                                               \
      }                                                                                                              \
    }                                                                                                                \
  }
// As an intrinsic, gcc copies every sum before and after it.
#define FASTIF_DOT_PAIR(sum, pair, query) asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(pair), "v"(query))
#define FASTIF_ADD_PAIR(sum, pair, query) sum = _mm512_add_epi32(sum, _mm512_madd_epi16(pair, query))
FASTIF_TILE_512(tile_vnni, "avx512f,avx512bw,avx512vnni", FASTIF_DOT_PAIR)
FASTIF_TILE_512(tile_avx512, "avx512f,avx512bw", FASTIF_ADD_PAIR)

void vnni(const Tile& tile) {
  constexpr TileKernel kernel[] = {tile_vnni<8, 1>, tile_vnni<8, 2>, tile_vnni<8, 3>, tile_vnni<6, 4>};
  kernel[tile.vectors - 1](tile);
}

void avx512(const Tile& tile) {
  constexpr TileKernel kernel[] = {tile_avx512<8, 1>, tile_avx512<8, 2>, tile_avx512<8, 3>, tile_avx512<6, 4>};
  kernel[tile.vectors - 1](tile);
}

// 16 registers hold 6 x 16 sums: one vector of lanes after another.
__attribute__((target("avx2"))) void avx2(const Tile& tile) {
  constexpr int R = 6;
  for (int64_t first = 0; first < kRows; first += R) {
    const int16_t* const longs = tile.longs + first * tile.long_stride;
    for (int v = 0; v < tile.vectors; ++v) {
      const int16_t* panel = tile.panel + 2 * kLanes * v;
      __m256i sum[R][2];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
      for (int64_t p = 0; p < tile.pairs; ++p, panel += 2 * kLanes * tile.vectors) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel) + 1);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const __m256i pair = _mm256_set1_epi32(pair_at(longs + r * tile.long_stride + 2 * p));
          sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(pair, low));
          sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(pair, high));
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int half = 0; half < 2; ++half) {
          const int64_t lane = kLanes * v + 8 * half, place = (first + r) * tile.short_stride + lane;
          const __m256 whole = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[r][half]), _mm256_loadu_ps(tile.steps + lane));
          float* const to = tile.products ? tile.products + place : tile.sums + (first + r) * kLanes + 8 * half;
          const __m256 added = tile.products ? whole : _mm256_mul_ps(whole, _mm256_loadu_ps(tile.shorts + place));
          _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), added));
        }
      }
    }
  }
}
#endif

void generic(const Tile& tile) {
  for (int64_t r = 0; r < kRows; ++r) {
    const int16_t* const longs = tile.longs + r * tile.long_stride;
    for (int v = 0; v < tile.vectors; ++v) {
      int32_t sum[kLanes] = {};
      for (int64_t p = 0; p < tile.pairs; ++p) {
        const int16_t* const query = tile.panel + 2 * kLanes * (p * tile.vectors + v);
        const int32_t one = longs[2 * p], other = longs[2 * p + 1];
        for (int64_t l = 0; l < kLanes; ++l) sum[l] += one * query[2 * l] + other * query[2 * l + 1];
      }
      const int64_t place = r * tile.short_stride + kLanes * v;
      for (int64_t l = 0; l < kLanes; ++l) {
        const float whole = static_cast<float>(sum[l]) * tile.steps[kLanes * v + l];
        if (tile.products) {
          tile.products[place + l] += whole;
        } else {
          tile.sums[r * kLanes + l] += whole * tile.shorts[place + l];
        }
      }
    }
  }
}

}  // namespace

TileKernel tile_kernel() {
  const char* const set = std::getenv("FASTIF_FACTORS");
  const std::string wanted = set ? set : "";
  const auto takes = [&](const char* name, bool there) { return there && (wanted.empty() || wanted == name); };
#ifdef FASTIF_X86
  const bool wide = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bw");
  if (takes("vnni", wide && __builtin_cpu_supports("avx512vnni"))) return vnni;
  if (takes("avx512", wide)) return avx512;
  if (takes("avx2", isa() != Isa::generic && __builtin_cpu_supports("avx2"))) return avx2;
#endif
  return takes("generic", true) ? generic : nullptr;
}

FASTIF_CLONES void widen(const int8_t* from, int64_t rows, int64_t size, int64_t padded, int16_t* to) {
  for (int64_t row = 0; row < rows; ++row, from += size, to += padded) {
    for (int64_t i = 0; i < size; ++i) to[i] = from[i];
    for (int64_t i = size; i < padded; ++i) to[i] = 0;
  }
}

FASTIF_CLONES void widen(const int8_t* from, int64_t rows, int64_t size, int64_t padded, float* to) {
  for (int64_t row = 0; row < rows; ++row, from += size, to += padded) {
    for (int64_t i = 0; i < size; ++i) to[i] = from[i];
    for (int64_t i = size; i < padded; ++i) to[i] = 0;
  }
}

FASTIF_CLONES void scale_rows(const float* scale, int64_t rows, int64_t size, float* x) {
  for (int64_t row = 0; row < rows; ++row, x += size) {
    for (int64_t i = 0; i < size; ++i) x[i] *= scale[row];
  }
}

FASTIF_CLONES void add_lanes(const float* lanes, int64_t rows, const int64_t* places, float* to) {
  for (int64_t row = 0; row < rows; ++row, lanes += kLanes) {
    float half[kLanes / 2];
    for (int64_t l = 0; l < kLanes / 2; ++l) half[l] = lanes[l] + lanes[l + kLanes / 2];
    for (int64_t l = 0; l < 4; ++l) half[l] += half[l + 4];
    to[places[row]] += (half[0] + half[2]) + (half[1] + half[3]);
  }
}

FASTIF_CLONES float largest(const float* x, int64_t size) {
  float lane[32] = {};
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    for (int l = 0; l < 32; ++l) lane[l] = std::abs(x[i + l]) > lane[l] ? std::abs(x[i + l]) : lane[l];
  }
  for (; i < size; ++i) lane[0] = std::max(lane[0], std::abs(x[i]));
  return *std::max_element(lane, lane + 32);
}

FASTIF_CLONES void quantize(const float* x, int64_t size, float step, int16_t* to) {
  constexpr float shift = 12582912;  // 1.5 2^23: a sum with it has no digits below one
  for (int64_t i = 0; i < size; ++i) {
    const float whole = (x[i] / step + shift) - shift;
    to[i] = static_cast<int16_t>(static_cast<int32_t>(whole > 32767 ? 32767 : whole < -32767 ? -32767 : whole));
  }
}

}  // namespace fastif
