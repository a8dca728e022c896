// What the plain and the lazy kernel of farthest_first share on the CPU: a cloud, the distance, the order of
// candidates.
#pragma once

#include <cstdint>
#include <vector>

#include "../farthest_first.h"

namespace fastif {

// One cloud, every row of which is a point, and where its results go. Kernels get it with the first pick made and
// compared with every row.
template <typename T>
struct Cloud {
  const T* points;  // [n, d]
  int64_t n, d;
  const int64_t* start;  // [starts]
  int64_t starts, picks;
  double until_sq_radius;
  int64_t* indices;          // [picks]
  double* sq_radii;          // [picks]
  double* sq_dists;          // [n]
  int64_t* nearest;          // [n]
  std::vector<char> picked;  // [n]: whether a row is

  void pick(int64_t t, int64_t farthest) {
    indices[t] = t < starts ? start[t] : farthest;
    picked[indices[t]] = true;
  }
  // Whether the picks made, with this squared radius, are all.
  bool complete(int64_t made, double sq_radius) const {
    return made == picks || (made >= starts && sq_radius <= until_sq_radius);
  }
};

// A candidate for the next pick. The default is nobody: every point beats it.
struct Farthest {
  double sq_dist = -1;
  int64_t index = -1;

  // A total order of the points: farther first, lower index on ties.
  bool beats(const Farthest& other) const {
    return sq_dist > other.sq_dist || (sq_dist == other.sq_dist && index < other.index);
  }
  void offer(double value, int64_t i) {
    if (Farthest{value, i}.beats(*this)) *this = {value, i};
  }
};

// Squared distance of one row to the centre, in the order of summation that farthest_first.h defines. (The build turns
// fused multiply-add contraction off.) float32 to float64 is exact: C may be either.
template <typename T, typename C>
__attribute__((always_inline)) inline double sq_dist(const T* row, const C* centre, int64_t d) {
  if (d <= 4) {  // the other lanes would hold 0: what only adds them is left out
    double lane[4] = {};
    for (int64_t l = 0; l < d; ++l) {
      const double t = static_cast<double>(row[l]) - static_cast<double>(centre[l]);
      lane[l] = t * t;
    }
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
  }
  double lane[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const double t = static_cast<double>(row[j + l]) - static_cast<double>(centre[j + l]);
      lane[l] += t * t;
    }
  }
  for (int l = 0; j < d; ++j, ++l) {
    const double t = static_cast<double>(row[j]) - static_cast<double>(centre[j]);
    lane[l] += t * t;
  }
  for (int half = kLanes / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

}  // namespace fastif
