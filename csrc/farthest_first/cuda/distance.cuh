// What the kernels of farthest_first share on the GPU: the distance of farthest_first.h, four at a time by a warp.
#pragma once

#include "../../common/cuda_utils.cuh"

namespace fastif {

inline constexpr int kFarthestRows = 4;  // rows a warp has in flight
// Stands in sq_dists, until the end, for the 0 of what can be picked no more, or never could: no distance is below it.
inline constexpr double kNoCandidate = -1.0;

// Adds (x - c)^2, each operation rounded on its own (the intrinsics are never fused).
__device__ inline double add_square(double sum, double x, double c) {
  const double difference = __dsub_rn(x, c);
  return __dadd_rn(sum, __dmul_rn(difference, difference));
}

// Lane l holds partial sum l of four distances; lane l gets distance l / 8 whole. The halvings 16 and 8 of all four at
// once: a lane gives away the sums it does not keep and adds what it is given to those it keeps. The sums are those of
// s_l += s_{l+16}, s_l += s_{l+8} (addition commutes to the bit), with 6 exchanges in all instead of 20.
__device__ inline double halve_four(const double (&sum)[kFarthestRows], int lane) {
  static_assert(kFarthestRows == 4);
  const bool upper = lane & 16, odd = lane & 8;
  const double even_sum = __dadd_rn(upper ? sum[2] : sum[0], __shfl_xor_sync(kAllLanes, upper ? sum[0] : sum[2], 16));
  const double odd_sum = __dadd_rn(upper ? sum[3] : sum[1], __shfl_xor_sync(kAllLanes, upper ? sum[1] : sum[3], 16));
  double own = __dadd_rn(odd ? odd_sum : even_sum, __shfl_xor_sync(kAllLanes, odd ? even_sum : odd_sum, 8));
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) own = __dadd_rn(own, __shfl_xor_sync(kAllLanes, own, offset));
  return own;
}

}  // namespace fastif
