#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../common/progress.h"
#include "../common/simd.h"
#include "farthest_first_filter.h"

#ifdef FASTIF_X86
#include <immintrin.h>
#endif

namespace fastif {
namespace {

constexpr int kRows = Filter::kRows, kVector = Filter::kVector, kGroup = Filter::kGroup;
constexpr int kUnit = 4;  // bytes that a kernel takes from a row at a time: four int8 or one float32

inline int32_t unit(const char* code) {
  int32_t bits;
  std::memcpy(&bits, code, kUnit);
  return bits;
}

inline float real(const char* code) { return std::bit_cast<float>(unit(code)); }

// ---- Encoding.

struct Code {
  double scale, sq_norm, residual, largest;
  int32_t sum;
};

// Sums run in kWide lanes, which the compiler turns into vectors; their order does not matter for the certificate.
template <typename T, typename Q>
__attribute__((always_inline)) inline Code encode_row(const T* row, const double* centre, int64_t d, Q* code) {
  constexpr int kWide = 16;
  constexpr bool kInteger = std::is_same_v<Q, int8_t>;
  double top[kWide] = {}, squares[kWide] = {}, residuals[kWide] = {}, total[kWide] = {};
  int32_t sums[kWide] = {};
  const auto each = [&](auto&& step) __attribute__((always_inline)) {
    int64_t j = 0;
    for (; j + kWide <= d; j += kWide) {
      for (int l = 0; l < kWide; ++l) step(j + l, l);
    }
    for (int l = 0; j < d; ++j, ++l) step(j, l);
  };
  each([&](int64_t j, int l) __attribute__((always_inline)) {
    const double t = std::abs(static_cast<double>(row[j]) - centre[j]);
    top[l] = t > top[l] ? t : top[l];
  });
  const double largest = *std::max_element(top, top + kWide);
  double scale = 0, inverse = 0;
  if (largest >= 1e-140 && largest <= 1e140) {  // below: q = 0, all is residual; above: refused
    if constexpr (kInteger) {
      scale = largest / 127;
      inverse = 127 / largest;
    } else {
      const int exponent = std::ilogb(largest);
      scale = std::ldexp(1.0, exponent);
      inverse = std::ldexp(1.0, -exponent);
    }
  }
  each([&](int64_t j, int l) __attribute__((always_inline)) {
    const double t = static_cast<double>(row[j]) - centre[j];
    double q = t * inverse;
    if constexpr (kInteger) {
      constexpr double kRound = 0x1.8p52;  // pushes the fraction out: rounds to the nearest integer
      q = (q + kRound) - kRound;
      const auto whole = static_cast<int32_t>(q);
      code[j] = static_cast<int8_t>(whole);
      sums[l] += whole;
    } else {
      code[j] = static_cast<float>(q);
      q = code[j];
    }
    const double r = t - scale * q;
    squares[l] += q * q;
    residuals[l] += r * r;
    total[l] += t * t;
  });
  double square = 0, residual = 0, whole = 0;
  int32_t sum = 0;
  for (int l = 0; l < kWide; ++l) {
    square += squares[l];
    residual += residuals[l];
    whole += total[l];
    sum += sums[l];
  }
  return {scale, scale * scale * square, std::sqrt(residual) * (1 + 0x1p-20) + std::sqrt(whole) * 0x1p-45 + 1e-150,
          largest, sum};
}

FASTIF_CLONES Code encode_f32_int8(const float* row, const double* centre, int64_t d, char* code) {
  return encode_row(row, centre, d, reinterpret_cast<int8_t*>(code));
}
FASTIF_CLONES Code encode_f64_int8(const double* row, const double* centre, int64_t d, char* code) {
  return encode_row(row, centre, d, reinterpret_cast<int8_t*>(code));
}
FASTIF_CLONES Code encode_f32_float(const float* row, const double* centre, int64_t d, char* code) {
  return encode_row(row, centre, d, reinterpret_cast<float*>(code));
}
FASTIF_CLONES Code encode_f64_float(const double* row, const double* centre, int64_t d, char* code) {
  return encode_row(row, centre, d, reinterpret_cast<float*>(code));
}

Code encode_one(const float* row, const double* centre, int64_t d, char* code, bool integer) {
  return integer ? encode_f32_int8(row, centre, d, code) : encode_f32_float(row, centre, d, code);
}
Code encode_one(const double* row, const double* centre, int64_t d, char* code, bool integer) {
  return integer ? encode_f64_int8(row, centre, d, code) : encode_f64_float(row, centre, d, code);
}

// mu: of every column, the mean of the middle half of at most 129 rows spread evenly.
template <typename T>
void middle_of_sample(const T* x, int64_t n, int64_t d, double* mu) {
  const int64_t rows = std::min<int64_t>(n, 129);
  std::vector<double> column(rows);
  for (int64_t j = 0; j < d; ++j) {
    for (int64_t i = 0; i < rows; ++i) column[i] = static_cast<double>(x[i * n / rows * d + j]);
    std::sort(column.begin(), column.end());
    const int64_t first = rows / 4, last = rows - first;
    double sum = 0;
    for (int64_t i = first; i < last; ++i) sum += column[i];
    mu[j] = sum / static_cast<double>(last - first);
  }
}

// ---- Dot products of a tile: kRows rows, V vectors of centres. packed is [steps, V, kVector] units: one step of the
// loop takes one unit of every row and of every centre. offset[r] is where the sums of row r start.

#ifdef FASTIF_X86
template <int V>
__attribute__((target("avx512f,avx512vnni"))) void dots_vnni(const char* const* rows, const int32_t* offset,
                                                             const char* packed, int64_t steps, char* out) {
  __m512i sum[kRows][V];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_set1_epi32(offset[r]);
  }
  for (int64_t s = 0; s < steps; ++s, packed += kUnit * kVector * V) {
    __m512i centre[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) centre[v] = _mm512_loadu_si512(packed + kUnit * kVector * v);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = _mm512_set1_epi32(unit(rows[r] + kUnit * s));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], centre[v], x);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_si512(out + kUnit * (kGroup * r + kVector * v), sum[r][v]);
  }
}

template <int V>
__attribute__((target("avx512f"))) void dots_avx512(const char* const* rows, const char* packed, int64_t steps,
                                                    char* out) {
  __m512 sum[kRows][V] = {};
  for (int64_t s = 0; s < steps; ++s, packed += kUnit * kVector * V) {
    __m512 centre[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) centre[v] = _mm512_loadu_ps(packed + kUnit * kVector * v);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512 x = _mm512_set1_ps(real(rows[r] + kUnit * s));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_fmadd_ps(x, centre[v], sum[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(out + kUnit * (kGroup * r + kVector * v), sum[r][v]);
  }
}

// 16 registers hold 6 x 16 sums at a time: one vector of centres after another.
__attribute__((target("avx2,fma"))) void dots_avx2(const char* const* rows, const char* packed, int64_t steps,
                                                   int vectors, char* out) {
  for (int v = 0; v < vectors; ++v) {
    const char* centres = packed + kUnit * kVector * v;
    __m256 sum[kRows][2] = {};
    for (int64_t s = 0; s < steps; ++s, centres += kUnit * kVector * vectors) {
      const __m256 left = _mm256_loadu_ps(reinterpret_cast<const float*>(centres));
      const __m256 right = _mm256_loadu_ps(reinterpret_cast<const float*>(centres) + 8);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m256 x = _mm256_set1_ps(real(rows[r] + kUnit * s));
        sum[r][0] = _mm256_fmadd_ps(x, left, sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(x, right, sum[r][1]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      float* to = reinterpret_cast<float*>(out) + kGroup * r + kVector * v;
      _mm256_storeu_ps(to, sum[r][0]);
      _mm256_storeu_ps(to + 8, sum[r][1]);
    }
  }
}

template <bool kInteger>
__attribute__((target("avx512f"))) uint64_t undecided_avx512(const char* dots, const Filter::Bound& bound,
                                                             const double* scale, const double* beta,
                                                             const double* error, int vectors) {
  const __m512d row_scale = _mm512_set1_pd(bound.scale), alpha = _mm512_set1_pd(bound.alpha);
  const __m512d rho = _mm512_set1_pd(bound.rho);
  uint64_t mask = 0;
  for (int c = 0; c < vectors * kVector; c += 8) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(dots + kUnit * c));
    // maskz only because GCC 12 takes the plain forms for uninitialised.
    const __m512d dot =
        kInteger ? _mm512_maskz_cvtepi32_pd(0xff, raw) : _mm512_maskz_cvtps_pd(0xff, _mm256_castsi256_ps(raw));
    const __m512d left = _mm512_mul_pd(dot, _mm512_mul_pd(row_scale, _mm512_loadu_pd(scale + c)));
    const __m512d right =
        _mm512_fnmadd_pd(rho, _mm512_loadu_pd(error + c), _mm512_add_pd(alpha, _mm512_loadu_pd(beta + c)));
    mask |= static_cast<uint64_t>(_mm512_cmp_pd_mask(left, right, _CMP_NLE_UQ)) << c;
  }
  return mask;
}
#endif

// Any processor. Not a call of at::mm: its precision is a setting that the user may lower.
FASTIF_CLONES void dots_generic(const char* const* rows, const char* packed, int64_t steps, int vectors, char* out) {
  for (int v = 0; v < vectors; ++v) {
    float sum[kRows][kVector] = {};
    for (int64_t s = 0; s < steps; ++s) {
      float centre[kVector];
      std::memcpy(centre, packed + kUnit * kVector * (s * vectors + v), sizeof centre);
      for (int r = 0; r < kRows; ++r) {
        const float x = real(rows[r] + kUnit * s);
        for (int c = 0; c < kVector; ++c) sum[r][c] += x * centre[c];
      }
    }
    for (int r = 0; r < kRows; ++r) std::memcpy(out + kUnit * (kGroup * r + kVector * v), sum[r], sizeof sum[r]);
  }
}

uint64_t undecided_generic(const char* dots, const Filter::Bound& bound, const double* scale, const double* beta,
                           const double* error, int vectors) {
  uint64_t mask = 0;
  for (int c = 0; c < vectors * kVector; ++c) {
    const double left = static_cast<double>(real(dots + kUnit * c)) * (bound.scale * scale[c]);
    const double right = (bound.alpha + beta[c]) - bound.rho * error[c];
    mask |= static_cast<uint64_t>(!(left <= right)) << c;
  }
  return mask;
}

}  // namespace

std::optional<FilterKind> filter_named(const std::string& name, int64_t d) {
  if (name == "generic") return FilterKind::generic;
#ifdef FASTIF_X86
  if (name == "avx2" && isa() != Isa::generic && __builtin_cpu_supports("avx2")) return FilterKind::avx2;
  if (name == "avx512" && isa() == Isa::avx512) return FilterKind::avx512;
  if (name == "vnni" && isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni") && d <= Filter::kMaxDimInt8) {
    return FilterKind::vnni;
  }
#endif
  return std::nullopt;
}

FilterKind best_filter(int64_t d) {
  for (const char* name : {"vnni", "avx512", "avx2"}) {
    if (const auto kind = filter_named(name, d)) return *kind;
  }
  return FilterKind::generic;
}

Filter::Filter(const at::Tensor& points, FilterKind kind) : kind_(kind), d_(points.size(1)) {
  const int64_t n = points.size(0);
  steps_ = integer() ? (d_ + 3) / 4 : d_;
  slack_ = 0x1p-30 + (integer() ? 0 : 1.25 * static_cast<double>(d_ + 1) * 0x1p-24);
  const auto take = [&](int64_t count, auto example) {
    using E = decltype(example);
    const auto bytes = count * static_cast<int64_t>(sizeof(E));
    storage_.push_back(at::empty({bytes}, points.options().dtype(at::kByte)));
    return reinterpret_cast<E*>(storage_.back().mutable_data_ptr<uint8_t>());
  };
  codes_ = take(n * kUnit * steps_, char{});
  offset_ = take(integer() ? n : 0, int32_t{});
  scale_ = take(n, double{});
  sq_norm_ = take(n, double{});
  residual_ = take(n, double{});
  packed_ = take(kBlock * kUnit * steps_, char{});
  centre_scale_ = take(kBlock, double{});
  centre_beta_ = take(kBlock, double{});
  centre_residual_ = take(kBlock, double{});
  if (points.scalar_type() == at::kFloat) {
    encode<float>(points);
  } else {
    encode<double>(points);
  }
}

template <typename T>
void Filter::encode(const at::Tensor& points) {
  const T* x = points.const_data_ptr<T>();
  const int64_t n = points.size(0), stride = kUnit * steps_;
  const auto mu_buffer = at::empty({d_}, points.options().dtype(at::kDouble));
  double* mu = mu_buffer.mutable_data_ptr<double>();
  middle_of_sample(x, n, d_, mu);
  std::atomic<bool> in_range{true};
  Progress::parallel_for(0, n, std::max<int64_t>(1, 65536 / d_), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* code = codes_ + i * stride;
      std::fill(code + stride - kUnit, code + stride, 0);  // zeros past column d
      const Code made = encode_one(x + i * d_, mu, d_, code, integer());
      scale_[i] = made.scale;
      sq_norm_[i] = made.sq_norm;
      residual_[i] = made.residual;
      if (integer()) offset_[i] = -128 * made.sum;
      if (!(made.largest <= 1e140)) in_range = false;
    }
  });
  usable_ = in_range;
}

void Filter::pack(const int64_t* picks, int64_t count) {
  count_ = count;
  const int32_t flip = integer() ? static_cast<int32_t>(0x80808080u) : 0;  // int8 q to uint8 q + 128
  for (int64_t c = 0; c < (count + kVector - 1) / kVector * kVector; ++c) {
    const int64_t pick = picks[std::min(c, count - 1)];  // the last vector is filled with repeats, masked out later
    centre_scale_[c] = scale_[pick];
    centre_residual_[c] = residual_[pick];
    centre_beta_[c] = ((1 - slack_) * sq_norm_[pick] - (1 + slack_) * residual_[pick] * residual_[pick]) / 2;
    const int64_t group = c / kGroup, width = kUnit * kVector * vectors(group);
    const char* code = codes_ + pick * kUnit * steps_;
    char* to = packed_ + group * kGroup * kUnit * steps_ + c % kGroup * kUnit;
    for (int64_t s = 0; s < steps_; ++s, code += kUnit, to += width) {
      const int32_t bits = unit(code) ^ flip;
      std::memcpy(to, &bits, kUnit);
    }
  }
}

Filter::Bound Filter::bound(int64_t row, double sq_dist) const {
  const double scale = scale_[row];
  if (sq_dist == 0) return {scale, std::numeric_limits<double>::infinity(), 0};
  const double r = std::sqrt(sq_dist) * (1 + 0x1p-30) + 1e-140 + residual_[row];
  return {scale, ((1 - slack_) * sq_norm_[row] - (1 + slack_) * r * r) / 2, (1 + slack_) * r};
}

void Filter::dots(const int64_t* rows, int64_t group, Dots& out) const {
  const char* packed = packed_ + group * kGroup * kUnit * steps_;
  const char* code[kRows];
  for (int r = 0; r < kRows; ++r) code[r] = codes_ + rows[r] * kUnit * steps_;
  const int v = vectors(group);
#ifdef FASTIF_X86
  if (kind_ == FilterKind::vnni) {
    int32_t offset[kRows];
    for (int r = 0; r < kRows; ++r) offset[r] = offset_[rows[r]];
    constexpr decltype(&dots_vnni<1>) kernel[] = {dots_vnni<1>, dots_vnni<2>, dots_vnni<3>, dots_vnni<4>};
    return kernel[v - 1](code, offset, packed, steps_, out.bytes);
  }
  if (kind_ == FilterKind::avx512) {
    constexpr decltype(&dots_avx512<1>) kernel[] = {dots_avx512<1>, dots_avx512<2>, dots_avx512<3>, dots_avx512<4>};
    return kernel[v - 1](code, packed, steps_, out.bytes);
  }
  if (kind_ == FilterKind::avx2) return dots_avx2(code, packed, steps_, v, out.bytes);
#endif
  dots_generic(code, packed, steps_, v, out.bytes);
}

uint64_t Filter::undecided(const Dots& dots, int slot, const Bound& bound, int64_t group) const {
  const char* row = dots.bytes + kUnit * kGroup * slot;
  const double* scale = centre_scale_ + group * kGroup;
  const double* beta = centre_beta_ + group * kGroup;
  const double* error = centre_residual_ + group * kGroup;
  const int v = vectors(group);
  const int64_t centres = std::min<int64_t>(kGroup, count_ - group * kGroup);
  const uint64_t real_centres = ~uint64_t{0} >> (kGroup - centres);
#ifdef FASTIF_X86
  if (kind_ == FilterKind::vnni) return undecided_avx512<true>(row, bound, scale, beta, error, v) & real_centres;
  if (kind_ == FilterKind::avx512) return undecided_avx512<false>(row, bound, scale, beta, error, v) & real_centres;
#endif
  return undecided_generic(row, bound, scale, beta, error, v) & real_centres;
}

}  // namespace fastif
