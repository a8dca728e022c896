#include "axes.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "../../common/products.h"
#include "../../common/simd.h"

namespace fastif {
namespace {

constexpr int64_t kSample = 1024;
constexpr int kIterations = 3;

// z = (x - mu) unit in float32; returns |z|^2 before that rounding.
template <typename T>
__attribute__((always_inline)) inline double centre_row(const T* x, const double* mu, double unit, int64_t d,
                                                        float* z) {
  constexpr int kWide = 16;
  double lane[kWide] = {};
  int64_t j = 0;
  for (; j + kWide <= d; j += kWide) {
    for (int l = 0; l < kWide; ++l) {
      const double t = (static_cast<double>(x[j + l]) - mu[j + l]) * unit;
      z[j + l] = static_cast<float>(t);
      lane[l] += t * t;
    }
  }
  for (int l = 0; j < d; ++j, ++l) {
    const double t = (static_cast<double>(x[j]) - mu[j]) * unit;
    z[j] = static_cast<float>(t);
    lane[l] += t * t;
  }
  double sum = 0;
  for (int l = 0; l < kWide; ++l) sum += lane[l];
  return sum;
}
FASTIF_CLONES double centre_f32(const float* x, const double* mu, double unit, int64_t d, float* z) {
  return centre_row(x, mu, unit, d, z);
}
FASTIF_CLONES double centre_f64(const double* x, const double* mu, double unit, int64_t d, float* z) {
  return centre_row(x, mu, unit, d, z);
}
double centre(const float* x, const double* mu, double unit, int64_t d, float* z) {
  return centre_f32(x, mu, unit, d, z);
}
double centre(const double* x, const double* mu, double unit, int64_t d, float* z) {
  return centre_f64(x, mu, unit, d, z);
}

// An orthogonal matrix that spreads the large coordinates over all: a row's code has one scale for all of them.
Tensor cosines(int64_t a) {
  const auto out = empty({a, a}, kFloat);
  float* to = out.mutable_data_ptr<float>();
  const auto size = static_cast<double>(a);
  for (int64_t i = 0; i < a; ++i) {
    for (int64_t j = 0; j < a; ++j) {
      const double angle = std::numbers::pi * static_cast<double>(i * (2 * j + 1)) / (2 * size);
      *to++ = static_cast<float>(std::cos(angle) * std::sqrt((i ? 2 : 1) / size));
    }
  }
  return out;
}

// Columns that span what those of x [d, axes] do.
Tensor orthonormal(const Tensor& x) { return call_for_two("aten::linalg_qr", "", x, std::string("reduced")).first; }

}  // namespace

Axes::Axes(const Tensor& points, const Tensor& mu, double unit)
    : d_(points.size(1)), unit_(unit), codes_(best_codes(false)), mu_(mu) {
  const int64_t n = points.size(0), rows = std::min(n, kSample);
  axes_ = std::min({kAxes, d_, rows});
  const auto sample = empty({rows, d_}, kFloat);
  for (int64_t i = 0; i < rows; ++i) {
    float* z = sample.mutable_data_ptr<float>() + i * d_;
    const int64_t offset = i * n / rows * d_;
    if (points.scalar_type() == kFloat) {
      centre(points.const_data_ptr<float>() + offset, mu.const_data_ptr<double>(), unit, d_, z);
    } else {
      centre(points.const_data_ptr<double>() + offset, mu.const_data_ptr<double>(), unit, d_, z);
    }
  }
  const auto starts = empty({axes_, d_}, sample);
  for (int64_t i = 0; i < axes_; ++i) starts[i].copy_(sample[i * rows / axes_]);
  auto space = orthonormal(starts.t());  // [d, axes]
  for (int i = 0; i < kIterations; ++i) space = orthonormal(mm(sample.t(), mm(sample, space)));
  space = mm(space, cosines(axes_));
  packed_ = zeros({d_, kGroup}, sample);
  packed_.narrow(1, 0, axes_).copy_(space);
  const auto v = space.to(kDouble), product = mm(v.t(), v);
  double sq_error = 0;
  for (int64_t i = 0; i < axes_; ++i) {
    for (int64_t j = 0; j < axes_; ++j) {
      const double entry = product.const_data_ptr<double>()[i * axes_ + j] - (i == j ? 1 : 0);
      sq_error += entry * entry;
    }
  }
  const double error = std::sqrt(sq_error) + 64 * static_cast<double>(d_ + 16) * 0x1p-53;
  usable_ = error <= 0x1p-10;
  delta_ = error * (1 + error);
  kappa_ = 2 * error + 2.2 * 8.1 * (kChain + 2) * 0x1p-24 + 64 * static_cast<double>(d_ + 64) * 0x1p-53;
}

void Axes::project(const float* points, int64_t rows, float* z, double* y, double* error) const {
  project_tile(points, rows, z, y, error);
}
void Axes::project(const double* points, int64_t rows, float* z, double* y, double* error) const {
  project_tile(points, rows, z, y, error);
}

template <typename T>
void Axes::project_tile(const T* points, int64_t rows, float* z, double* y, double* error) const {
  const double* mu = mu_.const_data_ptr<double>();
  const char* packed = reinterpret_cast<const char*>(packed_.const_data_ptr<float>());
  double square[kTileRows], along[kTileRows][kGroup] = {};
  for (int64_t r = 0; r < rows; ++r) square[r] = centre(points + r * d_, mu, unit_, d_, z + r * d_);
  for (int64_t j = 0; j < d_; j += kChain) {
    const char* row[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) row[r] = reinterpret_cast<const char*>(z + std::min(r, rows - 1) * d_ + j);
    Dots dots;
    tile_dots(codes_, row, nullptr, packed + kUnit * kGroup * j, std::min(kChain, d_ - j), kGroup / kVector, dots);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t a = 0; a < axes_; ++a)
        along[r][a] += static_cast<double>(real(dots.bytes + kUnit * (kGroup * r + a)));
    }
  }
  for (int64_t r = 0; r < rows; ++r, y += axes_ + 1) {
    double inside = 0;
    for (int64_t a = 0; a < axes_; ++a) {
      inside += along[r][a] * along[r][a];
      y[a] = along[r][a] / unit_;
    }
    const double rest = std::sqrt(std::max(0.0, square[r] - inside)), size = std::sqrt(square[r]);
    y[axes_] = rest / unit_;
    const double of_rest = std::min(std::sqrt(kappa_), kappa_ * size / std::max(rest, 1e-300)) * size;
    error[r] = (of_rest + 8.1 * (kChain + 2) * 0x1p-24 * size + 0x1p-100) * (1 + 0x1p-20) / unit_;
  }
}

}  // namespace fastif
