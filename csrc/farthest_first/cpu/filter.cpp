#include "filter.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../../common/progress.h"
#include "../../common/simd.h"

#ifdef FASTIF_X86
#include <immintrin.h>
#endif

namespace fastif {
namespace {

// ---- Encoding.

// In units of length.
struct Code {
  float scale, sq_norm, residual;
  int32_t sum;
};

// step(j, lane) for j = 0..d-1, in kWide lanes, which the compiler turns into vectors; the order of their sums does not
// matter for the certificate.
constexpr int kWide = 16;
template <typename Step>
__attribute__((always_inline)) inline void in_lanes(int64_t d, Step&& step) {
  int64_t j = 0;
  for (; j + kWide <= d; j += kWide) {
    for (int l = 0; l < kWide; ++l) step(j + l, l);
  }
  for (int l = 0; j < d; ++j, ++l) step(j, l);
}

template <typename T>
__attribute__((always_inline)) inline double largest_entry(const T* row, const double* centre, int64_t d) {
  double top[kWide] = {};
  in_lanes(d, [&](int64_t j, int l) __attribute__((always_inline)) {
    const double t = std::abs(static_cast<double>(row[j]) - centre[j]);
    top[l] = t > top[l] ? t : top[l];
  });
  return *std::max_element(top, top + kWide);
}

FASTIF_CLONES double largest_f32(const float* row, const double* centre, int64_t d) {
  return largest_entry(row, centre, d);
}
FASTIF_CLONES double largest_f64(const double* row, const double* centre, int64_t d) {
  return largest_entry(row, centre, d);
}
double largest_of(const float* row, const double* centre, int64_t d) { return largest_f32(row, centre, d); }
double largest_of(const double* row, const double* centre, int64_t d) { return largest_f64(row, centre, d); }

// `error` is that of the row itself.
template <typename T, typename Q>
__attribute__((always_inline)) inline Code coded(const T* row, const double* centre, int64_t d, double unit,
                                                 double error, Q* code) {
  constexpr bool kInteger = std::is_same_v<Q, int8_t>;
  double squares[kWide] = {}, residuals[kWide] = {}, total[kWide] = {};
  int32_t sums[kWide] = {};
  const double largest = largest_entry(row, centre, d) * unit;
  float in_units = 0;        // what is kept is what is used: the scale is a float32
  if (largest >= 0x1p-60) {  // below: q = 0, all is residual
    in_units = static_cast<float>(kInteger ? largest / 127 : std::ldexp(1.0, std::ilogb(largest)));
  }
  const double scale = static_cast<double>(in_units) / unit, inverse = in_units > 0 ? 1 / scale : 0;
  in_lanes(d, [&](int64_t j, int l) __attribute__((always_inline)) {
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
  const double left = std::sqrt(residual) * (1 + 0x1p-20) + std::sqrt(whole) * 0x1p-45 + 1e-150 + error;
  return {in_units, static_cast<float>(static_cast<double>(in_units) * in_units * square),
          static_cast<float>(left * unit * (1 + 0x1p-22) + 0x1p-100), sum};
}

FASTIF_CLONES Code encode_f32_int8(const float* row, const double* centre, int64_t d, double unit, double error,
                                   char* code) {
  return coded(row, centre, d, unit, error, reinterpret_cast<int8_t*>(code));
}
FASTIF_CLONES Code encode_f64_int8(const double* row, const double* centre, int64_t d, double unit, double error,
                                   char* code) {
  return coded(row, centre, d, unit, error, reinterpret_cast<int8_t*>(code));
}
FASTIF_CLONES Code encode_f32_float(const float* row, const double* centre, int64_t d, double unit, double error,
                                    char* code) {
  return coded(row, centre, d, unit, error, reinterpret_cast<float*>(code));
}
FASTIF_CLONES Code encode_f64_float(const double* row, const double* centre, int64_t d, double unit, double error,
                                    char* code) {
  return coded(row, centre, d, unit, error, reinterpret_cast<float*>(code));
}

Code encode_one(const float* row, const double* centre, int64_t d, double unit, double error, char* code,
                bool integer) {
  return integer ? encode_f32_int8(row, centre, d, unit, error, code)
                 : encode_f32_float(row, centre, d, unit, error, code);
}
Code encode_one(const double* row, const double* centre, int64_t d, double unit, double error, char* code,
                bool integer) {
  return integer ? encode_f64_int8(row, centre, d, unit, error, code)
                 : encode_f64_float(row, centre, d, unit, error, code);
}

constexpr int64_t kMiddleRows = 129;

// mu: of every column, the mean of the middle half of at most kMiddleRows rows spread evenly.
template <typename T>
void middle_of_sample(const T* x, int64_t n, int64_t d, double* mu) {
  const int64_t rows = std::min<int64_t>(n, kMiddleRows);
  Progress::parallel_for(0, d, int64_t{1} << 14, [&](int64_t begin, int64_t end) {
    std::vector<double> column(rows);
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t i = 0; i < rows; ++i) column[i] = static_cast<double>(x[i * n / rows * d + j]);
      std::sort(column.begin(), column.end());
      const int64_t first = rows / 4, last = rows - first;
      double sum = 0;
      for (int64_t i = first; i < last; ++i) sum += column[i];
      mu[j] = sum / static_cast<double>(last - first);
    }
  });
}

// ---- The test of a row's dot products, 64 centres at a time. The kernels read whole vectors.

#ifdef FASTIF_X86
template <bool kInteger>
__attribute__((target("avx512f"))) uint64_t undecided_avx512(const char* dots, const Filter::Bound& bound,
                                                             const float* scale, const float* beta, const float* error,
                                                             int vectors) {
  const __m512 row_scale = _mm512_set1_ps(bound.scale), alpha = _mm512_set1_ps(bound.alpha);
  const __m512 rho = _mm512_set1_ps(bound.rho);
  uint64_t mask = 0;
  for (int c = 0; c < vectors * kVector; c += kVector) {
    const __m512i raw = _mm512_loadu_si512(dots + kUnit * c);
    // maskz only because GCC 12 takes the plain form for uninitialised.
    const __m512 dot = kInteger ? _mm512_maskz_cvtepi32_ps(0xffff, raw) : _mm512_castsi512_ps(raw);
    const __m512 left = _mm512_mul_ps(dot, _mm512_mul_ps(row_scale, _mm512_loadu_ps(scale + c)));
    const __m512 right =
        _mm512_fnmadd_ps(rho, _mm512_loadu_ps(error + c), _mm512_add_ps(alpha, _mm512_loadu_ps(beta + c)));
    mask |= static_cast<uint64_t>(_mm512_cmp_ps_mask(left, right, _CMP_NLE_UQ)) << c;
  }
  return mask;
}

template <bool kInteger>
__attribute__((target("avx2,fma"))) uint64_t undecided_avx2(const char* dots, const Filter::Bound& bound,
                                                            const float* scale, const float* beta, const float* error,
                                                            int vectors) {
  const __m256 row_scale = _mm256_set1_ps(bound.scale), alpha = _mm256_set1_ps(bound.alpha);
  const __m256 rho = _mm256_set1_ps(bound.rho);
  uint64_t mask = 0;
  for (int c = 0; c < vectors * kVector; c += 8) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(dots + kUnit * c));
    const __m256 dot = kInteger ? _mm256_cvtepi32_ps(raw) : _mm256_castsi256_ps(raw);
    const __m256 left = _mm256_mul_ps(dot, _mm256_mul_ps(row_scale, _mm256_loadu_ps(scale + c)));
    const __m256 right =
        _mm256_fnmadd_ps(rho, _mm256_loadu_ps(error + c), _mm256_add_ps(alpha, _mm256_loadu_ps(beta + c)));
    const auto eight = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(left, right, _CMP_NLE_UQ)));
    mask |= static_cast<uint64_t>(eight) << c;
  }
  return mask;
}
#endif

uint64_t undecided_generic(const char* dots, bool integer, const Filter::Bound& bound, const float* scale,
                           const float* beta, const float* error, int vectors) {
  uint64_t mask = 0;
  for (int c = 0; c < vectors * kVector; ++c) {
    const float dot = integer ? static_cast<float>(unit(dots + kUnit * c)) : real(dots + kUnit * c);
    const float left = dot * (bound.scale * scale[c]);
    const float right = (bound.alpha + beta[c]) - bound.rho * error[c];
    mask |= static_cast<uint64_t>(!(left <= right)) << c;
  }
  return mask;
}

}  // namespace

std::optional<FilterKind> filter_named(const std::string& name) {
  const auto plus = name.find('+');
  const auto codes = codes_named(name.substr(0, plus));
  if (!codes) return std::nullopt;
  if (plus == std::string::npos) return FilterKind{*codes, FilterKind::Stage::never};
  if (name.substr(plus) != "+axes") return std::nullopt;
  return FilterKind{*codes, FilterKind::Stage::always};
}

FilterKind best_filter(int64_t d) { return {best_codes(d <= Filter::kMaxDimInt8), FilterKind::Stage::sampled}; }

Filter::Filter(const Tensor& points, Codes codes) : kind_(codes), d_(points.size(1)) {
  allocate(points.size(0));
  if (points.scalar_type() == kFloat) {
    encode<float>(points);
  } else {
    encode<double>(points);
  }
}

Filter::Filter(const Tensor& points, Codes codes, const Axes& axes)
    : kind_(codes), d_(axes.coordinates()), unit_(axes.unit() / 32), stretch_(axes.stretch()) {
  allocate(points.size(0));
  if (points.scalar_type() == kFloat) {
    encode<float>(points, axes);
  } else {
    encode<double>(points, axes);
  }
}

void Filter::allocate(int64_t n) {
  const bool integer = holds_int8(kind_);
  steps_ = integer ? (d_ + 3) / 4 : d_;
  slack_ = 0x1p-20 + (integer ? 0 : 1.25 * static_cast<double>(d_ + 1) * 0x1p-24);
  mu_ = empty({d_}, kDouble);
  const auto take = [&](int64_t count, auto example) {
    using E = decltype(example);
    const auto bytes = count * static_cast<int64_t>(sizeof(E));
    storage_.push_back(empty({bytes}, kByte));
    return reinterpret_cast<E*>(storage_.back().mutable_data_ptr<uint8_t>());
  };
  codes_ = take(n * kUnit * steps_, char{});
  offset_ = take(integer ? n : 0, int32_t{});
  scale_ = take(n, float{});
  sq_norm_ = take(n, float{});
  residual_ = take(n, float{});
  packed_ = take(block() * kUnit * steps_, char{});
  centre_scale_ = take(block(), float{});
  centre_beta_ = take(block(), float{});
  centre_residual_ = take(block(), float{});
}

template <typename T>
void Filter::encode_row(int64_t i, const T* row, double error) {
  const int64_t stride = kUnit * steps_;
  char* code = codes_ + i * stride;
  std::fill(code + stride - kUnit, code + stride, 0);  // zeros past column d
  const Code made = encode_one(row, mu_.const_data_ptr<double>(), d_, unit_, error, code, holds_int8(kind_));
  scale_[i] = made.scale;
  sq_norm_[i] = made.sq_norm;
  residual_[i] = made.residual;
  if (holds_int8(kind_)) offset_[i] = -128 * made.sum;
}

template <typename T>
void Filter::encode(const Tensor& points) {
  const T* x = points.const_data_ptr<T>();
  const int64_t n = points.size(0), grain = std::max<int64_t>(1, 65536 / d_);
  const double* mu = mu_.const_data_ptr<double>();
  middle_of_sample(x, n, d_, mu_.mutable_data_ptr<double>());
  std::atomic<double> largest{1e-140};
  Progress::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    double here = 0;
    for (int64_t i = begin; i < end; ++i) here = std::max(here, largest_of(x + i * d_, mu, d_));
    for (double known = largest; known < here && !largest.compare_exchange_weak(known, here);) continue;
  });
  usable_ = largest <= 1e140;
  if (!usable_) return;
  unit_ = std::ldexp(1.0, -std::ilogb(largest * std::sqrt(static_cast<double>(d_))));
  Progress::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) encode_row(i, x + i * d_, 0);
  });
}

template <typename T>
void Filter::encode(const Tensor& points, const Axes& axes) {
  const T* x = points.const_data_ptr<T>();
  const int64_t n = points.size(0), d = points.size(1), sample = std::min(n, kMiddleRows);
  std::vector<float> room(kRows * d);
  std::vector<double> y(sample * d_), error(kRows);
  for (int64_t i = 0; i < sample; ++i) axes.project(x + i * n / sample * d, 1, room.data(), &y[i * d_], error.data());
  middle_of_sample(y.data(), sample, d_, mu_.mutable_data_ptr<double>());
  const int64_t tiles = (n + kRows - 1) / kRows;
  Progress::parallel_for(0, tiles, std::max<int64_t>(1, 16384 / d), [&](int64_t begin, int64_t end) {
    std::vector<float> z(kRows * d);
    std::vector<double> row(kRows * d_);
    double errors[kRows];
    for (int64_t first = begin * kRows; first < std::min(end * kRows, n); first += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, n - first);
      axes.project(x + first * d, rows, z.data(), row.data(), errors);
      for (int64_t r = 0; r < rows; ++r) encode_row(first + r, &row[r * d_], errors[r]);
    }
  });
}

double Filter::beta(int64_t pick) const {
  const double e = residual_[pick];
  return ((1 - slack_) * sq_norm_[pick] - (1 + slack_) * e * e) / 2;
}

void Filter::pack(const int64_t* picks, int64_t count) {
  count_ = count;
  const int32_t flip = holds_int8(kind_) ? kFlip : 0;
  for (int64_t c = 0; c < (count + kVector - 1) / kVector * kVector; ++c) {
    const int64_t pick = picks[std::min(c, count - 1)];  // the last vector is filled with repeats, masked out later
    centre_scale_[c] = scale_[pick];
    centre_residual_[c] = residual_[pick];
    centre_beta_[c] = static_cast<float>(beta(pick));
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
  if (sq_dist == 0) return {scale_[row], std::numeric_limits<float>::infinity(), 0};
  const double r = (std::sqrt(sq_dist) * (1 + 0x1p-30) + 1e-140) * stretch_ * unit_ + residual_[row];
  const double alpha = ((1 - slack_) * sq_norm_[row] - (1 + slack_) * r * r) / 2 - 0x1p-90;
  return {scale_[row], static_cast<float>(alpha), static_cast<float>((1 + slack_) * r)};
}

void Filter::dots(const int64_t* rows, int64_t group, Dots& out) const {
  const char* code[kRows];
  int32_t offset[kRows] = {};
  for (int r = 0; r < kRows; ++r) code[r] = codes_ + rows[r] * kUnit * steps_;
  if (holds_int8(kind_)) {
    for (int r = 0; r < kRows; ++r) offset[r] = offset_[rows[r]];
  }
  tile_dots(kind_, code, offset, packed_ + group * kGroup * kUnit * steps_, steps_, vectors(group), out);
}

uint64_t Filter::undecided(const Dots& dots, int slot, const Bound& bound, int64_t group) const {
  const char* row = dots.bytes + kUnit * kGroup * slot;
  const float* scale = centre_scale_ + group * kGroup;
  const float* beta = centre_beta_ + group * kGroup;
  const float* error = centre_residual_ + group * kGroup;
  const int v = vectors(group);
  const int64_t centres = std::min<int64_t>(kGroup, count_ - group * kGroup);
  const uint64_t real_centres = ~uint64_t{0} >> (kGroup - centres);
#ifdef FASTIF_X86
  switch (kind_) {
    case Codes::vnni:
      return undecided_avx512<true>(row, bound, scale, beta, error, v) & real_centres;
    case Codes::avx512:
      return undecided_avx512<false>(row, bound, scale, beta, error, v) & real_centres;
    case Codes::avxvnni:
      return undecided_avx2<true>(row, bound, scale, beta, error, v) & real_centres;
    case Codes::avx2:
      return undecided_avx2<false>(row, bound, scale, beta, error, v) & real_centres;
    default:
      break;
  }
#endif
  return undecided_generic(row, holds_int8(kind_), bound, scale, beta, error, v) & real_centres;
}

bool Filter::undecided(int64_t row, int64_t pick, const Bound& bound) const {
  const bool integer = holds_int8(kind_);
  const double dot = pair_dot(kind_, codes_ + row * kUnit * steps_, integer ? offset_[row] : 0,
                              codes_ + pick * kUnit * steps_, steps_);
  const double left = dot * (static_cast<double>(bound.scale) * scale_[pick]);
  return !(left <= bound.alpha + beta(pick) - static_cast<double>(bound.rho) * residual_[pick]);
}

void Filter::prefetch(int64_t row) const {
  const char* code = codes_ + row * kUnit * steps_;
  for (int64_t b = 0; b < kUnit * steps_; b += 64) __builtin_prefetch(code + b);
}

}  // namespace fastif
