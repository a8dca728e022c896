// factor_dots on the GPU: products of every factor with every query, in float32, then their sums by example. The
// contract is factor_dots.h's. Every sum has one owner and one order.
#pragma once

#include "../../common/cuda_utils.cuh"

namespace fastif {

inline constexpr int kFactorTile = 64, kFactorDepth = 32, kFactorThreads = 256, kEach = 4;

// Item = query * tiles + tile: a block owns kFactorTile factors of one query. It forms tiles [64 factors, 64 rows] of
// right Q^T in registers, kEach x kEach for each thread, and contracts each with left at once: products with all rows
// never stand in memory.
__global__ void __launch_bounds__(kFactorThreads)
    factor_products_kernel(const int8_t* __restrict__ left,    // [F, o]
                           const int8_t* __restrict__ right,   // [F, d]
                           const float* __restrict__ scale,    // [F] or null: 1
                           const float* __restrict__ queries,  // [q, o, d]
                           int64_t factors, int64_t o, int64_t d, int64_t q,
                           float* __restrict__ products) {  // [q, F]
  struct Tiles {  // a column more, so that the threads that load a row write to different banks
    float right[kFactorDepth][kFactorTile + 1], query[kFactorDepth][kFactorTile + 1];
  };
  FASTIF_SHARED(Tiles, shared);
  constexpr int across = kFactorTile / kEach;
  const int ty = threadIdx.x / across, tx = threadIdx.x % across;
  const int64_t tiles = ceil_div(factors, kFactorTile);
  for (int64_t item = blockIdx.x; item < q * tiles; item += gridDim.x) {
    const int64_t number = item / tiles, f0 = item % tiles * kFactorTile;
    const float* const query = queries + number * o * d;
    float total[kEach] = {};
    for (int64_t o0 = 0; o0 < o; o0 += kFactorTile) {
      float sum[kEach][kEach] = {};
      for (int64_t d0 = 0; d0 < d; d0 += kFactorDepth) {
        for (int e = threadIdx.x; e < kFactorDepth * kFactorTile; e += kFactorThreads) {
          const int k = e % kFactorDepth, m = e / kFactorDepth;
          const bool inside = d0 + k < d;
          shared.right[k][m] = inside && f0 + m < factors ? static_cast<float>(right[(f0 + m) * d + d0 + k]) : 0.0f;
          shared.query[k][m] = inside && o0 + m < o ? query[(o0 + m) * d + d0 + k] : 0.0f;
        }
        __syncthreads();
        for (int k = 0; k < kFactorDepth; ++k) {
#pragma unroll
          for (int i = 0; i < kEach; ++i)
#pragma unroll
            for (int j = 0; j < kEach; ++j)
              sum[i][j] += shared.right[k][ty + i * across] * shared.query[k][tx + j * across];
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          const int64_t f = f0 + ty + i * across, r = o0 + tx + j * across;
          if (f < factors && r < o) total[i] += static_cast<float>(left[f * o + r]) * sum[i][j];
        }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int offset = across / 2; offset > 0; offset /= 2)  // the half warp that has the factor's columns
        total[i] += __shfl_xor_sync(kAllLanes, total[i], offset);
      const int64_t f = f0 + ty + i * across;
      if (tx == 0 && f < factors) products[number * factors + f] = total[i] * (scale ? scale[f] : 1.0f);
    }
  }
}

// out[q, i] = sum over the factors of example i, which end before ends[i]. Thread by thread an example of one query.
__global__ void __launch_bounds__(kFactorThreads) factor_sums_kernel(const float* __restrict__ products,  // [q, F]
                                                                     const int64_t* __restrict__ ends,    // [n]
                                                                     int64_t factors, int64_t n, int64_t q,
                                                                     float* __restrict__ out) {  // [q, n]
  const int64_t step = static_cast<int64_t>(gridDim.x) * kFactorThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kFactorThreads + threadIdx.x; e < q * n; e += step) {
    const int64_t number = e / n, i = e % n;
    float sum = 0;
    for (int64_t f = i ? ends[i - 1] : 0; f < ends[i]; ++f) sum += products[number * factors + f];
    out[e] = sum;
  }
}

}  // namespace fastif
