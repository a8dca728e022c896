// The certified filter of ../cpu/filter.h on the GPU: int8 codes of the rows, their products by tensor cores,
// and the test. The certificate is that file's for int8 codes, but the test is made in float64, with lengths as they
// are, lambda = 2^-30 and nothing taken off for underflow. That is enough, as d <= 2^16: Q is wrong by at most
// (d + 3) u Q < 2^-36 Q, and no term of the test passes more than 5 roundings, 5 2^-53 of it, both well inside lambda;
// as r >= R >= 1e-140, lambda r^2 / 2 >= 4e-290 is more than all underflow. A row with an entry of x - mu above 1e140
// in size, for which the CPU refuses all points, gets q = 0 and e = infinity: the test then compares with -infinity and
// leaves every pair of this row undecided.
//
// A warp multiplies 16 M rows by 8 N centres. In the fragments of mma.m16n8k32 lane 4 g + t has rows g and g + 8,
// column g, and 4 + 4 of the 32 bytes that are summed over. Which bytes of a row these are does not matter as long as
// rows and centres agree: lane t takes 16 neighbouring bytes of every 64 (kCodeChunk), one load for two steps, and no
// operand has to be rearranged.
#pragma once

#include "../../common/cuda_utils.cuh"

namespace fastif {

inline constexpr int kCodeChunk = 64;            // bytes
inline constexpr int64_t kMaxCodeDim = 1 << 16;  // 127^2 d stays below 2^31
inline constexpr int kMiddleSample = 129;        // rows that mu is taken from
inline constexpr double kSlack = 0x1p-30;        // lambda

// 16 bytes of a code. Places of codes are counted in these, in 32 bits: half the registers of pointers.
struct alignas(16) CodeQuad {
  int x, y, z, w;
};

inline constexpr int kQuad = sizeof(CodeQuad), kChunkQuads = kCodeChunk / kQuad;

struct RowCodes {
  int stride;                          // quads from row to row, whole chunks; [n, stride] has below 2^32
  CodeQuad* code;                      // [n, stride]: int8, zeros past column d
  double *scale, *sq_norm, *residual;  // [n]: s, Q, e
  double* mu;                          // [d]
};

// A row's and a centre's side of the test: s_x s_c q_x.q_c <= alpha_x + beta_c - rho_x e_c.
struct RowTerms {
  double scale, alpha, rho;
};
struct CentreTerms {
  double scale, beta, residual;
};

// Of a row with this sq_dist; if it is not positive, there is nothing to test for (no distance is below it).
__device__ inline RowTerms row_terms(const RowCodes& codes, int64_t row, double sq_dist) {
  const double r = sqrt(sq_dist) * (1 + 0x1p-30) + 1e-140 + codes.residual[row];
  return {codes.scale[row], ((1 - kSlack) * codes.sq_norm[row] - (1 + kSlack) * r * r) / 2, (1 + kSlack) * r};
}

__device__ inline CentreTerms centre_terms(const RowCodes& codes, int64_t row) {
  const double e = codes.residual[row];
  return {codes.scale[row], ((1 - kSlack) * codes.sq_norm[row] - (1 + kSlack) * e * e) / 2, e};
}

// ---- Encoding.

// mu: of every column, the mean of the middle half of at most kMiddleSample rows spread evenly, those masked out left
// out (if all are, it is row `start`). Any mu is correct. A warp per column; lanes rank the sample's entries.
template <typename T>
__global__ void farthest_first_middle_kernel(const T* __restrict__ points, int64_t n, int64_t d,
                                             const bool* __restrict__ mask, const int64_t* __restrict__ start,
                                             RowCodes codes) {
  const int lane = threadIdx.x % kWarp, sample = static_cast<int>(n < kMiddleSample ? n : kMiddleSample);
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (j >= d) return;  // a whole warp
  const auto is_point = [&](int s) { return mask == nullptr || mask[s * n / sample]; };
  const auto entry = [&](int s) { return static_cast<double>(points[s * n / sample * d + j]); };
  int members = 0;
  for (int s = lane; s < sample; s += kWarp) members += is_point(s);
  members = warp_sum(members);
  double sum = 0;
  for (int s = lane; s < sample; s += kWarp) {
    if (!is_point(s)) continue;
    const double own = entry(s);
    int rank = 0;
    for (int o = 0; o < sample; ++o) {
      if (!is_point(o)) continue;
      const double other = entry(o);
      rank += other < own || (other == own && o < s);
    }
    if (members / 4 <= rank && rank < members - members / 4) sum += own;
  }
  sum = warp_sum(sum);
  if (lane > 0) return;
  codes.mu[j] = members > 0 ? sum / (members - members / 4 * 2) : static_cast<double>(points[*start * d + j]);
}

// A warp per row. What is masked out is not looked at: its code is all zeros.
template <typename T>
__global__ void farthest_first_encode_kernel(const T* __restrict__ points, int64_t n, int64_t d,
                                             const bool* __restrict__ mask, RowCodes codes) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; i < n; i += warps) {
    const bool is_point = mask == nullptr || mask[i];
    const T* const row = points + i * d;
    int8_t* const code = reinterpret_cast<int8_t*>(codes.code + i * codes.stride);
    double largest = 0;
    for (int64_t j = lane; is_point && j < d; j += kWarp)
      largest = fmax(largest, fabs(static_cast<double>(row[j]) - codes.mu[j]));
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    const bool coded = 1e-140 <= largest && largest <= 1e140;  // below: q = 0, all is residual
    const double scale = coded ? largest / 127 : 0.0, inverse = coded ? 127 / largest : 0.0;
    double square = 0, residual = 0, whole = 0;
    for (int64_t j = lane; j < kQuad * codes.stride; j += kWarp) {
      double q = 0;
      if (is_point && j < d) {
        const double t = static_cast<double>(row[j]) - codes.mu[j];
        q = rint(t * inverse);
        const double r = t - scale * q;
        square += q * q;
        residual += r * r;
        whole += t * t;
      }
      code[j] = static_cast<int8_t>(q);
    }
    square = warp_sum(square);
    residual = warp_sum(residual);
    whole = warp_sum(whole);
    if (lane > 0) continue;
    codes.scale[i] = scale;
    codes.sq_norm[i] = scale * scale * square;
    codes.residual[i] = largest <= 1e140 ? sqrt(residual) * (1 + 0x1p-20) + sqrt(whole) * 0x1p-45 + 1e-150 : INFINITY;
  }
}

// ---- Products.

// sum += a b: a is 16 x 32, b is 32 x 8, int8; lane 4 g + t holds of a: row g and row g + 8, bytes 4 t .. 4 t + 3, then
// both rows' bytes 16 + 4 t ..; of b: column g, the same bytes; of sum: row g, columns 2 t and 2 t + 1, then row g + 8.
__device__ inline void mma_int8(int (&sum)[4], int a0, int a1, int a2, int a3, int b0, int b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else  // the same by exchange, for the emulator and for GPUs without the instruction
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const auto dot4 = [](int a, int b) {
    int dot = 0;
    for (int byte = 0; byte < 32; byte += 8) dot += static_cast<int8_t>(a >> byte) * static_cast<int8_t>(b >> byte);
    return dot;
  };
  for (int half = 0; half < 2; ++half) {
    for (int s = 0; s < 4; ++s) {
      const int upper = __shfl_sync(kAllLanes, half ? a2 : a0, 4 * g + s);
      const int lower = __shfl_sync(kAllLanes, half ? a3 : a1, 4 * g + s);
      const int left = __shfl_sync(kAllLanes, half ? b1 : b0, 4 * (2 * t) + s);
      const int right = __shfl_sync(kAllLanes, half ? b1 : b0, 4 * (2 * t + 1) + s);
      sum[0] += dot4(upper, left);
      sum[1] += dot4(upper, right);
      sum[2] += dot4(lower, left);
      sum[3] += dot4(lower, right);
    }
  }
#endif
}

// dots[m][n] in the layout of mma_int8: rows 16 m .. of the tile, columns 8 n ... The code of row 8 i + lane / 4 is at
// rows[row[i]], that of column lane / 4 at centre, the columns `pitch` quads apart; both lane % 4 quads further.
template <int M, int N>
__device__ inline void code_dots(const CodeQuad* rows, const unsigned (&row)[2 * M], const CodeQuad* centre, int pitch,
                                 int chunks, int (&dots)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int c = 0; c < N; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) dots[m][c][e] = 0;
  __syncwarp();  // mma takes the whole warp at once
  for (int chunk = 0; chunk < chunks; ++chunk) {
    CodeQuad a[2 * M];
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) a[i] = rows[row[i] + chunk * kChunkQuads];
#pragma unroll
    for (int c = 0; c < N; ++c) {
      const CodeQuad b = centre[8 * c * pitch + chunk * kChunkQuads];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_int8(dots[m][c], a[2 * m].x, a[2 * m + 1].x, a[2 * m].y, a[2 * m + 1].y, b.x, b.y);
        mma_int8(dots[m][c], a[2 * m].z, a[2 * m + 1].z, a[2 * m].w, a[2 * m + 1].w, b.z, b.w);
      }
    }
  }
}

// Lane l has row l's terms and gets its bits: bit c tells that column c is undecided. `terms(c)` is the centre's side.
template <int M, int N, typename Terms>
__device__ inline uint64_t undecided(const int (&dots)[M][N][4], const RowTerms& own, Terms terms) {
  const int lane = threadIdx.x % kWarp, column = 2 * (lane % 4);
  uint64_t mine = 0;
#pragma unroll
  for (int m = 0; m < M; ++m) {  // two rows at a time: all at once, their terms do not fit the registers
    RowTerms row[2];
    uint64_t bits[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int owner = 16 * m + 8 * i + lane / 4;
      row[i] = {__shfl_sync(kAllLanes, own.scale, owner), __shfl_sync(kAllLanes, own.alpha, owner),
                __shfl_sync(kAllLanes, own.rho, owner)};
    }
#pragma unroll
    for (int c = 0; c < N; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const CentreTerms centre = terms(8 * c + column + e);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const double left = static_cast<double>(dots[m][c][2 * i + e]) * (row[i].scale * centre.scale);
          const bool settled = left <= row[i].alpha + centre.beta - row[i].rho * centre.residual;
          bits[i] |= static_cast<uint64_t>(!settled) << (8 * c + e);
        }
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bits[i] <<= column;
      bits[i] |= __shfl_xor_sync(kAllLanes, bits[i], 1);
      bits[i] |= __shfl_xor_sync(kAllLanes, bits[i], 2);
      const uint64_t of_row = __shfl_sync(kAllLanes, bits[i], 4 * (lane % 8));  // of row 16 m + 8 i + lane % 8
      if (lane / 8 == 2 * m + i) mine = of_row;
    }
  }
  return mine;
}

}  // namespace fastif
