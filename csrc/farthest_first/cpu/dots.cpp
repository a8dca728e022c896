#include "dots.h"

#include <algorithm>

#include "../../common/simd.h"

#ifdef FASTIF_X86
#include <immintrin.h>
#if __GNUC__ >= 11 || __clang_major__ >= 14  // knows AVX-VNNI
#define FASTIF_AVXVNNI 1
#endif
#endif

namespace fastif {
namespace {

#ifdef FASTIF_X86
template <int V>
__attribute__((target("avx512f,avx512vnni"))) void dots_vnni(const char* const* rows, const int32_t* offset,
                                                             const char* packed, int64_t steps, char* out) {
  __m512i sum[kTileRows][V];
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_set1_epi32(offset[r]);
  }
  for (int64_t s = 0; s < steps; ++s, packed += kUnit * kVector * V) {
    __m512i centre[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) centre[v] = _mm512_loadu_si512(packed + kUnit * kVector * v);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      const __m512i x = _mm512_set1_epi32(unit(rows[r] + kUnit * s));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], centre[v], x);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_si512(out + kUnit * (kGroup * r + kVector * v), sum[r][v]);
  }
}

#ifdef FASTIF_AVXVNNI
// 16 registers hold 6 x 16 sums at a time: one vector of centres after another, here and in dots_avx2.
__attribute__((target("avx2,avxvnni"))) void dots_avxvnni(const char* const* rows, const int32_t* offset,
                                                          const char* packed, int64_t steps, int vectors, char* out) {
  for (int v = 0; v < vectors; ++v) {
    const char* centres = packed + kUnit * kVector * v;
    __m256i sum[kTileRows][2];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) sum[r][0] = sum[r][1] = _mm256_set1_epi32(offset[r]);
    for (int64_t s = 0; s < steps; ++s, centres += kUnit * kVector * vectors) {
      const __m256i left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(centres));
      const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(centres) + 1);
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        const __m256i x = _mm256_set1_epi32(unit(rows[r] + kUnit * s));
        sum[r][0] = _mm256_dpbusd_avx_epi32(sum[r][0], left, x);
        sum[r][1] = _mm256_dpbusd_avx_epi32(sum[r][1], right, x);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      auto* to = reinterpret_cast<__m256i*>(out + kUnit * (kGroup * r + kVector * v));
      _mm256_storeu_si256(to, sum[r][0]);
      _mm256_storeu_si256(to + 1, sum[r][1]);
    }
  }
}
#endif

template <int V>
__attribute__((target("avx512f"))) void dots_avx512(const char* const* rows, const char* packed, int64_t steps,
                                                    char* out) {
  __m512 sum[kTileRows][V] = {};
  for (int64_t s = 0; s < steps; ++s, packed += kUnit * kVector * V) {
    __m512 centre[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) centre[v] = _mm512_loadu_ps(packed + kUnit * kVector * v);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      const __m512 x = _mm512_set1_ps(real(rows[r] + kUnit * s));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_fmadd_ps(x, centre[v], sum[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(out + kUnit * (kGroup * r + kVector * v), sum[r][v]);
  }
}

__attribute__((target("avx2,fma"))) void dots_avx2(const char* const* rows, const char* packed, int64_t steps,
                                                   int vectors, char* out) {
  for (int v = 0; v < vectors; ++v) {
    const char* centres = packed + kUnit * kVector * v;
    __m256 sum[kTileRows][2] = {};
    for (int64_t s = 0; s < steps; ++s, centres += kUnit * kVector * vectors) {
      const __m256 left = _mm256_loadu_ps(reinterpret_cast<const float*>(centres));
      const __m256 right = _mm256_loadu_ps(reinterpret_cast<const float*>(centres) + 8);
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        const __m256 x = _mm256_set1_ps(real(rows[r] + kUnit * s));
        sum[r][0] = _mm256_fmadd_ps(x, left, sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(x, right, sum[r][1]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      float* to = reinterpret_cast<float*>(out) + kGroup * r + kVector * v;
      _mm256_storeu_ps(to, sum[r][0]);
      _mm256_storeu_ps(to + 8, sum[r][1]);
    }
  }
}

// One row and one centre.
__attribute__((target("avx512f,avx512vnni"))) int32_t pair_vnni(const char* row, int32_t offset, const char* centre,
                                                                int64_t steps) {
  const __m512i flip = _mm512_set1_epi32(kFlip);
  __m512i sum = _mm512_setzero_si512();
  int64_t s = 0;
  for (; s + kVector <= steps; s += kVector) {
    const __m512i c = _mm512_xor_si512(_mm512_loadu_si512(centre + kUnit * s), flip);
    sum = _mm512_dpbusd_epi32(sum, c, _mm512_loadu_si512(row + kUnit * s));
  }
  if (s < steps) {
    const __mmask16 left = static_cast<__mmask16>((1u << (steps - s)) - 1);
    const __m512i c = _mm512_xor_si512(_mm512_maskz_loadu_epi32(left, centre + kUnit * s), flip);
    sum = _mm512_dpbusd_epi32(sum, c, _mm512_maskz_loadu_epi32(left, row + kUnit * s));
  }
  return offset + _mm512_reduce_add_epi32(sum);
}
#endif

// Any processor. Not a call of torch's product: its precision is a setting that the user may lower.
FASTIF_CLONES void dots_generic(const char* const* rows, const char* packed, int64_t steps, int vectors, char* out) {
  for (int v = 0; v < vectors; ++v) {
    float sum[kTileRows][kVector] = {};
    for (int64_t s = 0; s < steps; ++s) {
      float centre[kVector];
      std::memcpy(centre, packed + kUnit * kVector * (s * vectors + v), sizeof centre);
      for (int r = 0; r < kTileRows; ++r) {
        const float x = real(rows[r] + kUnit * s);
        for (int c = 0; c < kVector; ++c) sum[r][c] += x * centre[c];
      }
    }
    for (int r = 0; r < kTileRows; ++r) std::memcpy(out + kUnit * (kGroup * r + kVector * v), sum[r], sizeof sum[r]);
  }
}

FASTIF_CLONES void dots_int8(const char* const* rows, const int32_t* offset, const char* packed, int64_t steps,
                             int vectors, char* out) {
  for (int v = 0; v < vectors; ++v) {
    int32_t sum[kTileRows][kVector];
    for (int r = 0; r < kTileRows; ++r) std::fill_n(sum[r], kVector, offset[r]);
    for (int64_t s = 0; s < steps; ++s) {
      uint8_t centre[kVector][kUnit];
      std::memcpy(centre, packed + kUnit * kVector * (s * vectors + v), sizeof centre);
      for (int r = 0; r < kTileRows; ++r) {
        int8_t x[kUnit];
        std::memcpy(x, rows[r] + kUnit * s, kUnit);
        for (int c = 0; c < kVector; ++c) {
          for (int b = 0; b < kUnit; ++b) sum[r][c] += x[b] * centre[c][b];
        }
      }
    }
    for (int r = 0; r < kTileRows; ++r) std::memcpy(out + kUnit * (kGroup * r + kVector * v), sum[r], sizeof sum[r]);
  }
}

FASTIF_CLONES int32_t pair_int8(const char* row, const char* centre, int64_t steps) {
  const auto *x = reinterpret_cast<const int8_t*>(row), *c = reinterpret_cast<const int8_t*>(centre);
  int32_t sum = 0;
  for (int64_t j = 0; j < kUnit * steps; ++j) sum += x[j] * c[j];
  return sum;
}

// The lanes are shorter chains than the one that the certificate allows.
FASTIF_CLONES float pair_float(const char* row, const char* centre, int64_t steps) {
  float lane[kVector] = {};
  int64_t s = 0;
  for (; s + kVector <= steps; s += kVector) {
    for (int l = 0; l < kVector; ++l) lane[l] += real(row + kUnit * (s + l)) * real(centre + kUnit * (s + l));
  }
  for (int l = 0; s < steps; ++s, ++l) lane[l] += real(row + kUnit * s) * real(centre + kUnit * s);
  for (int half = kVector / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

}  // namespace

std::optional<Codes> codes_named(const std::string& name) {
  if (name == "generic") return Codes::generic;
  if (name == "int8") return Codes::int8;
#ifdef FASTIF_X86
  if (name == "avx2" && isa() != Isa::generic && __builtin_cpu_supports("avx2")) return Codes::avx2;
  if (name == "avx512" && isa() == Isa::avx512) return Codes::avx512;
  if (name == "vnni" && isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni")) return Codes::vnni;
#endif
#ifdef FASTIF_AVXVNNI
  if (name == "avxvnni" && isa() != Isa::generic && __builtin_cpu_supports("avxvnni")) return Codes::avxvnni;
#endif
  return std::nullopt;
}

Codes best_codes(bool int8) {
  for (const char* name : {"vnni", "avxvnni", "avx512", "avx2"}) {
    if (const auto codes = codes_named(name); codes && (int8 || !holds_int8(*codes))) return *codes;
  }
  return Codes::generic;
}

void tile_dots(Codes codes, const char* const* rows, const int32_t* offset, const char* packed, int64_t steps,
               int vectors, Dots& out) {
  switch (codes) {
#ifdef FASTIF_X86
    case Codes::vnni: {
      constexpr decltype(&dots_vnni<1>) kernel[] = {dots_vnni<1>, dots_vnni<2>, dots_vnni<3>, dots_vnni<4>};
      return kernel[vectors - 1](rows, offset, packed, steps, out.bytes);
    }
    case Codes::avx512: {
      constexpr decltype(&dots_avx512<1>) kernel[] = {dots_avx512<1>, dots_avx512<2>, dots_avx512<3>, dots_avx512<4>};
      return kernel[vectors - 1](rows, packed, steps, out.bytes);
    }
    case Codes::avx2:
      return dots_avx2(rows, packed, steps, vectors, out.bytes);
#endif
#ifdef FASTIF_AVXVNNI
    case Codes::avxvnni:
      return dots_avxvnni(rows, offset, packed, steps, vectors, out.bytes);
#endif
    case Codes::int8:
      return dots_int8(rows, offset, packed, steps, vectors, out.bytes);
    default:
      return dots_generic(rows, packed, steps, vectors, out.bytes);
  }
}

double pair_dot(Codes codes, const char* row, int32_t offset, const char* centre, int64_t steps) {
#ifdef FASTIF_X86
  if (codes == Codes::vnni) return pair_vnni(row, offset, centre, steps);
#endif
  return holds_int8(codes) ? pair_int8(row, centre, steps) : pair_float(row, centre, steps);
}

}  // namespace fastif
