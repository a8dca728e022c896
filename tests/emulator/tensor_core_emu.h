// Tensor cores on the CPU, at their worst: nothing is rounded to the nearest, and an operand with more digits than TF32
// has is reported.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda_emu.h"

namespace emu {

// The sum of a dot product's terms and the accumulator as tensor cores form it (Fasi, Higham, Mikaitis, Pranesh,
// Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7, 2021): exact products, each cut toward zero at
// the last of 24 bits of the largest, then the sum cut to float32. Real ones keep a few bits more, which nobody
// promises.
template <size_t N>
float cut_sum(const double (&terms)[N]) {
  double largest = 0;
  for (const double term : terms) {
    if (!std::isfinite(term)) {
      float sum = 0;
      for (const double each : terms) sum += static_cast<float>(each);
      return sum;
    }
    largest = std::max(largest, std::abs(term));
  }
  if (largest == 0) return 0;
  const int last = std::max(std::ilogb(largest) - 23, -149);  // that of the smallest denormal
  const double scale = std::ldexp(1.0, -last);
  int64_t sum = 0;
  for (const double term : terms) sum += static_cast<int64_t>(term * scale);
  const int64_t size = std::abs(sum);
  int more = 0;
  while (size >> more >= int64_t{1} << 24) ++more;
  const double cut = std::ldexp(static_cast<double>(size >> more), more + last);
  const float most = std::numeric_limits<float>::max();
  return static_cast<float>(std::copysign(std::min(cut, double{most}), static_cast<double>(sum)));
}

// PTX's mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32, by its tables of fragments, which give the place of every
// register of every lane: here they are read backwards, from an element's row and column to lane and register.
//   a (16 x 8)  row = lane / 4 for a0, a2, + 8 for a1, a3;  column = lane % 4 for a0, a1, + 4 for a2, a3
//   b (8 x 8)   row = lane % 4 for b0, + 4 for b1;          column = lane / 4
//   c (16 x 8)  row = lane / 4 for c0, c1, + 8 for c2, c3;  column = 2 (lane % 4), + 1 for c1, c3
EMU_INTERNAL inline void mma_tf32(float* d, const float* a, const float* b, const float* c) {
  float mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  for (const float operand : mine)
    if ((to_bits(operand) & 0x1fff) != 0) fault("an operand of mma has more digits than TF32", block->number);
  const uint64_t* const address = exchange(~0u, reinterpret_cast<uint64_t>(mine), false);
  const float* of[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) of[lane] = reinterpret_cast<const float*>(address[lane]);
  const int own = static_cast<int>(block->current->lane);
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    const int row = own / 4 + (i < 2 ? 0 : 8), column = 2 * (own % 4) + (i == 1 || i == 3 ? 1 : 0);
    double terms[9] = {c[i]};
    for (int k = 0; k < 8; ++k) {
      const float x = of[4 * (row % 8) + k % 4][(row < 8 ? 0 : 1) + (k < 4 ? 0 : 2)];
      const float y = of[4 * column + k % 4][4 + (k < 4 ? 0 : 1)];
      terms[1 + k] = static_cast<double>(x) * static_cast<double>(y);
    }
    sums[i] = cut_sum(terms);
  }
  exchange(~0u, 0, false);  // the registers are there until every lane has read them
  for (int i = 0; i < 4; ++i) d[i] = sums[i];
}

}  // namespace emu

inline void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2], const float (&c)[4]) {
  emu::mma_tf32(d, a, b, c);
}
