// float32 products on tensor cores: what can stand for CudaCores in weighted_outer of register_tile.cuh.
//
// Tensor cores multiply TF32 numbers, which have float32's exponents and 11 significant bits. An operand is split in
// two, x = hi + lo with hi = x rounded to the nearest TF32 number and lo = x - hi, cut to TF32, and
//
//   x y = hi lo' + lo hi' + hi hi'   (Ootomo, Yokota, arXiv 2203.03341)
//
// leaves out lo lo' <= 2^-22 |x y| and what was cut, <= 2^-23 |x| and 2^-23 |y|; their signs vary. Products are exact;
// the sums in a tensor core are not: they are cut toward zero, not rounded. So none is long: the products of kMmaDepth
// rows start from zero, small ones first, and are added to the accumulators in float32.
//
// The ends of float32's range. hi never ends at infinity: within 2^-12 of the largest float it is what lies below.
// Below 2^-113 the last bits of x lie below the smallest TF32 number: x is then wrong by up to 2^-136, which is nothing
// beside features that are no smaller than that (2^-126 below 2^-103 on a GPU that should take denormal operands as
// zero). A weighted feature that is infinite gives NaN.
//
// Below compute capability 8.0 there are no such tensor cores, and TensorCores are CudaCores.
#pragma once

#include "register_tile.cuh"

#ifdef FASTIF_EMULATOR
#include "tensor_core_emu.h"  // has mma_m16n8k8_tf32
#endif

namespace fastif {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800

struct TensorCores : CudaCores {};

#else

inline constexpr int kMmaDepth = 8;

#ifndef FASTIF_EMULATOR
// d = a b + c for a [16, 8], b [8, 8] of TF32 and c, d [16, 8] of float32, by a warp. Of these, with g = lane / 4 and
// t = lane % 4, a lane holds (PTX ISA, fragments of mma.m16n8k8 with .tf32)
//   a[i] = a(g + 8 (i % 2), t + 4 (i / 2))   b[i] = b(t + 4 i, g)   c[i], d[i] = c, d(g + 8 (i / 2), 2 t + i % 2)
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2], const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
#endif

// N operands of a lane in their two parts. Half of TF32's last bit is added to x, toward zero, and the rest cut: what
// cvt.rna.tf32.f32 does, in as many instructions, but for infinities (and denormals, which are cut).
template <int N>
struct SplitOperands {
  float hi[N], lo[N];

  __device__ void set(int i, float x) {
    constexpr unsigned tf32 = 0xffffe000, power = 0xff800000;
    const float leading = __uint_as_float(__float_as_uint(x) & power);
    hi[i] = __uint_as_float(__float_as_uint(__fmaf_rz(leading, 0x1p-11f, x)) & tf32);
    lo[i] = __uint_as_float(__float_as_uint(x - hi[i]) & tf32);
  }
};

// The tile is cut among 2 x 4 warps, 8 R x 4 R results each, and a warp's part into R / 2 x R / 2 products of mma.
// Which column of an operand is row g of which product is free: neighbours in shared memory go to one lane, so that a
// read of 8 or 16 bytes feeds two products or four, and the results of a lane are R neighbours of each of R rows. The
// padding puts the rows of a buffer that four neighbouring lanes read 8 banks apart: no two lanes of a read share a
// bank.
struct TensorCores {
  static constexpr int pad = 8;

  template <int R>
  __device__ static int row(int p) {
    return threadIdx.x / kWarp / 4 * (8 * R) + p / 2 * 16 + threadIdx.x % kWarp / 4 * 2 + p % 2;
  }
  template <int R>
  __device__ static int column(int q) {
    return threadIdx.x / kWarp % 4 * (4 * R) + threadIdx.x % 4 * R + q;
  }

  // acc += a^T b over one buffer.
  template <typename Buffer, int R>
  __device__ static void multiply(const Buffer& buffer, float (&acc)[R][R]) {
    static_assert((R == 4 || R == 8) && kDepth % kMmaDepth == 0);
    constexpr int products = R / 2;
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const int column0 = threadIdx.x / kWarp % 4 * (4 * R) + g * products;
#pragma unroll 1  // the operands of two would not fit the registers beside the accumulators
    for (int s = 0; s < kDepth; s += kMmaDepth) {
      SplitOperands<2> b[products];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < products; ++n) b[n].set(h, buffer.b[s + t + 4 * h][column0 + n]);
#pragma unroll
      for (int m = 0; m < products; ++m) {
        SplitOperands<4> a;
#pragma unroll
        for (int i = 0; i < 4; ++i) a.set(i, buffer.a[s + t + 4 * (i / 2)][row<R>(2 * m + i % 2)]);
        float d[products][4] = {};
#pragma unroll
        for (int n = 0; n < products; ++n) mma_m16n8k8_tf32(d[n], a.hi, b[n].lo, d[n]);
#pragma unroll
        for (int n = 0; n < products; ++n) mma_m16n8k8_tf32(d[n], a.lo, b[n].hi, d[n]);
#pragma unroll
        for (int n = 0; n < products; ++n) mma_m16n8k8_tf32(d[n], a.hi, b[n].hi, d[n]);
#pragma unroll
        for (int n = 0; n < products; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[2 * m + i / 2][i % 2 * products + n] += d[n][i];
      }
    }
  }
};

#endif

}  // namespace fastif
