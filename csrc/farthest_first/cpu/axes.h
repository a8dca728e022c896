// Few coordinates that keep most of the distances: the first stage of the filter (filter.h) where points
// lie near a subspace of low dimension.
//
// V holds at most kAxes rows v_j, nearly orthonormal: VV' = I + E. A row x has the coordinates y = (V z, |z - V'V z|),
// z = x - mu. For two rows, with w = V (z - z_c) and by the triangle inequality of what the axes leave,
//     |y - y_c|^2 <= |w|^2 + |(I - V'V)(z - z_c)|^2 = |x - c|^2 + w'E w <= (1 + delta) |x - c|^2,
//     delta = |E| (1 + |E|),
// so that a lower bound of |y - y_c| is one of |x - c|. |E| is measured (Frobenius, of the float32 V that is used).
// Which axes they are does not matter otherwise: they come from subspace iterations on a sample.
//
// Rounding, with T = |z|, in units of a power of two near the largest T: z is rounded to float32; V z adds float64 the
// float32 chains of kChain products, so that it is off by at most (kChain + 2) 2^-24 |v_j| T in each coordinate, and by
// at most epsilon T, epsilon = 8.1 (kChain + 2) 2^-24, in all (|v_j|^2 <= 1 + |E|, 63 rows). The last coordinate b is
// the root of |z|^2 - |V z|^2, off from its square |z - V'V z|^2 = |z|^2 - |V z|^2 + (V z)'E V z by at most kappa T^2,
// kappa = 2 |E| + 2.2 epsilon + 64 (d + 64) 2^-53; so b is off by at most sqrt(kappa) T, and by at most kappa T^2 / b.
// Underflow costs less than 2^-100. The sum is the `error` of a row, which the filter adds to what its coding of y
// costs.
#pragma once

#include <cstdint>

#include "../../common/tensor.h"
#include "dots.h"

namespace fastif {

class Axes {
 public:
  static constexpr int64_t kAxes = kGroup - 1;  // and the rest: one tile
  static constexpr int64_t kChain = 128;

  // Axes of points [n, d], contiguous float32 or float64, whose distances from mu [d] are at most 2 / unit.
  Axes(const Tensor& points, const Tensor& mu, double unit);
  bool usable() const { return usable_; }
  int64_t coordinates() const { return axes_ + 1; }
  double unit() const { return unit_; }
  double stretch() const { return 1 + delta_ / 2; }  // |y - y_c| is at most this times |x - c|

  // y [rows, coordinates] and error [rows] of at most kTileRows rows of points; z is room for kTileRows rows.
  void project(const float* points, int64_t rows, float* z, double* y, double* error) const;
  void project(const double* points, int64_t rows, float* z, double* y, double* error) const;

 private:
  template <typename T>
  void project_tile(const T* points, int64_t rows, float* z, double* y, double* error) const;

  int64_t d_, axes_;
  double unit_, delta_, kappa_;
  bool usable_;
  Codes codes_;
  Tensor mu_;      // [d] float64
  Tensor packed_;  // V, float32 [d, kGroup]: one group of centres, zeros past the last axis
};

}  // namespace fastif
