#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <utility>
#include <vector>

#include "../common/simd.h"
#include "ggn_block.h"

#ifdef FASTIF_X86
#include <immintrin.h>
#endif

namespace fastif {
namespace {

// A tile is kTile x kTile entries of one Gram matrix; a block is kRows examples, whose columns of the tile stay in the
// first-level cache. Sums over a block are formed in registers and then added to the tile: two-level summation, error
// about (kRows + n / kRows) instead of n roundings.
constexpr int64_t kTile = 32, kRows = 256, kMicroRows = 8, kPairChunk = 64;

// tile[m][k] += sum_i scaled[i][m] * columns[i][k], m < 8, k < 32: 8 rows of a tile held in registers over a block.
using Micro = void (*)(const float* scaled, const float* columns, int64_t rows, float* tile);

#ifdef FASTIF_X86
__attribute__((target("avx512f"))) void micro_avx512(const float* scaled, const float* columns, int64_t rows,
                                                     float* tile) {
  __m512 sum[kMicroRows][2] = {};
  for (int64_t i = 0; i < rows; ++i, scaled += kTile, columns += kTile) {
    const __m512 left = _mm512_loadu_ps(columns), right = _mm512_loadu_ps(columns + 16);
#pragma GCC unroll 8
    for (int m = 0; m < kMicroRows; ++m) {
      const __m512 s = _mm512_set1_ps(scaled[m]);
      sum[m][0] = _mm512_fmadd_ps(s, left, sum[m][0]);
      sum[m][1] = _mm512_fmadd_ps(s, right, sum[m][1]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kMicroRows; ++m, tile += kTile) {
    _mm512_storeu_ps(tile, _mm512_add_ps(_mm512_loadu_ps(tile), sum[m][0]));
    _mm512_storeu_ps(tile + 16, _mm512_add_ps(_mm512_loadu_ps(tile + 16), sum[m][1]));
  }
}

// 16 registers hold 4 x 16 sums at a time: four quarters of the same 8 x 32.
__attribute__((target("avx2,fma"))) void micro_avx2(const float* scaled, const float* columns, int64_t rows,
                                                    float* tile) {
  for (int quarter = 0; quarter < 4; ++quarter) {
    const float* s = scaled + quarter / 2 * 4;
    const float* x = columns + quarter % 2 * 16;
    __m256 sum[4][2] = {};
    for (int64_t i = 0; i < rows; ++i, s += kTile, x += kTile) {
      const __m256 left = _mm256_loadu_ps(x), right = _mm256_loadu_ps(x + 8);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        const __m256 v = _mm256_set1_ps(s[m]);
        sum[m][0] = _mm256_fmadd_ps(v, left, sum[m][0]);
        sum[m][1] = _mm256_fmadd_ps(v, right, sum[m][1]);
      }
    }
    float* out = tile + quarter / 2 * 4 * kTile + quarter % 2 * 16;
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m, out += kTile) {
      _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sum[m][0]));
      _mm256_storeu_ps(out + 8, _mm256_add_ps(_mm256_loadu_ps(out + 8), sum[m][1]));
    }
  }
}
#endif

Micro micro_kernel() {
#ifdef FASTIF_X86
  if (isa() == Isa::avx512) return micro_avx512;
  if (isa() == Isa::avx2) return micro_avx2;
#endif
  return nullptr;
}

// Columns [first, first + kTile) of `rows` examples, zero past column d.
void copy_columns(const float* features, int64_t rows, int64_t d, int64_t first, float* columns) {
  const int64_t width = std::min(kTile, d - first);
  for (int64_t i = 0; i < rows; ++i, features += d, columns += kTile) {
    std::copy_n(features + first, width, columns);
    std::fill(columns + width, columns + kTile, 0.f);
  }
}

// scaled[i][m] = factor[i] * columns[i][m].
FASTIF_CLONES void scale_columns(const float* __restrict__ columns, const float* __restrict__ factor, int64_t rows,
                                 float* __restrict__ scaled) {
  for (int64_t i = 0; i < rows; ++i, columns += kTile, scaled += kTile) {
    for (int64_t m = 0; m < kTile; ++m) scaled[m] = factor[i] * columns[m];
  }
}

// factor[pair][i] = w_i p_ia p_ib for the pairs [first, last) of classes a < b.
FASTIF_CLONES void pair_factors(const std::pair<int64_t, int64_t>* pairs, int64_t count, const float* weights,
                                const float* class_probs, int64_t n, int64_t begin, int64_t rows, float* factor) {
  for (int64_t p = 0; p < count; ++p, factor += rows) {
    const float* pa = class_probs + pairs[p].first * n + begin;
    const float* pb = class_probs + pairs[p].second * n + begin;
    const float* w = weights + begin;
    for (int64_t i = 0; i < rows; ++i) factor[i] = w[i] * pa[i] * pb[i];
  }
}

struct Problem {
  const float *features, *class_probs, *weights;  // [n, d], [c, n], [n]
  float* out;                                     // [c, d, c, d]
  int64_t n, d, c;
  const std::pair<int64_t, int64_t>* pairs;  // the c (c - 1) / 2 pairs a < b, sorted
  int64_t num_pairs;

  // out[a, j, b, k] += sign * tile[j][k] for the tile at (row, column) and for its mirror image in (j, k).
  void add(int64_t a, int64_t b, int64_t row, int64_t column, float sign, const float* tile) const {
    float* block = out + (a * d * c + b) * d;
    const int64_t height = std::min(kTile, d - row), width = std::min(kTile, d - column);
    for (int64_t j = 0; j < height; ++j) {
      for (int64_t k = 0; k < width; ++k) block[(row + j) * c * d + column + k] += sign * tile[j * kTile + k];
    }
    if (row == column) return;
    for (int64_t k = 0; k < width; ++k) {
      for (int64_t j = 0; j < height; ++j) block[(column + k) * c * d + row + j] += sign * tile[j * kTile + k];
    }
  }

  // Both triangles of a tile on the diagonal were computed, rounded differently: the lower one stands, so that the
  // block is symmetric to the bit.
  static void mirror(float* tile) {
    for (int64_t j = 0; j < kTile; ++j) {
      for (int64_t k = 0; k < j; ++k) tile[k * kTile + j] = tile[j * kTile + k];
    }
  }

  // The tile at (row, column), column <= row, of every class pair; one thread owns it, so nothing is shared and the
  // order of summation does not depend on the number of threads.
  void tile(Micro micro, int64_t row, int64_t column, float* scratch) const {
    float* left = scratch;                                // [kRows, kTile]
    float* right = left + kRows * kTile;                  // [kRows, kTile]
    float* scaled = right + kRows * kTile;                // [kRows, kTile]
    float* factor = scaled + kRows * kTile;               // [kPairChunk, kRows]
    float* sums = factor + kPairChunk * kRows;            // [kPairChunk, kTile, kTile]
    float* diagonal = sums + kPairChunk * kTile * kTile;  // [c, kTile, kTile]
    const int64_t area = kTile * kTile;
    const int64_t micros = (std::min(kTile, d - row) + kMicroRows - 1) / kMicroRows;
    std::fill_n(diagonal, c * area, 0.f);
    for (int64_t first = 0; first < num_pairs; first += kPairChunk) {
      const int64_t count = std::min(kPairChunk, num_pairs - first);
      std::fill_n(sums, count * area, 0.f);
      for (int64_t begin = 0; begin < n; begin += kRows) {
        const int64_t rows = std::min(kRows, n - begin);
        copy_columns(features + begin * d, rows, d, row, left);
        if (row != column) copy_columns(features + begin * d, rows, d, column, right);
        pair_factors(pairs + first, count, weights, class_probs, n, begin, rows, factor);
        for (int64_t p = 0; p < count; ++p) {
          scale_columns(left, factor + p * rows, rows, scaled);
          for (int64_t m = 0; m < micros; ++m) {
            micro(scaled + m * kMicroRows, row == column ? left : right, rows,
                  sums + p * area + m * kMicroRows * kTile);
          }
        }
      }
      for (int64_t p = 0; p < count; ++p) {
        const auto [a, b] = pairs[first + p];
        float* sum = sums + p * area;
        if (row == column) mirror(sum);
        add(a, b, row, column, -1, sum);
        add(b, a, row, column, -1, sum);
        for (int64_t e = 0; e < area; ++e) {
          diagonal[a * area + e] += sum[e];
          diagonal[b * area + e] += sum[e];
        }
      }
    }
    for (int64_t a = 0; a < c; ++a) add(a, a, row, column, 1, diagonal + a * area);
  }
};

void ggn_block_tiled(Micro micro, const at::Tensor& out, const at::Tensor& features, const at::Tensor& probs,
                     const at::Tensor& weights) {
  const int64_t n = features.size(0), d = features.size(1), c = probs.size(1);
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (int64_t a = 0; a < c; ++a) {
    for (int64_t b = a + 1; b < c; ++b) pairs.emplace_back(a, b);
  }
  const auto class_probs = probs.t().contiguous();
  const Problem problem{features.const_data_ptr<float>(),
                        class_probs.const_data_ptr<float>(),
                        weights.const_data_ptr<float>(),
                        out.mutable_data_ptr<float>(),
                        n,
                        d,
                        c,
                        pairs.data(),
                        static_cast<int64_t>(pairs.size())};
  const int64_t side = (d + kTile - 1) / kTile, tiles = side * (side + 1) / 2;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tiles);
  const int64_t need = 3 * kRows * kTile + kPairChunk * (kRows + kTile * kTile) + c * kTile * kTile;
  const auto scratch = at::empty({threads, need}, features.options());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      float* own = scratch.mutable_data_ptr<float>() + thread * need;
      for (int64_t t; (t = next++) < tiles;) {
        int64_t row = 0, first = 0;  // tile t counts along the rows of the lower triangle
        while (first + row + 1 <= t) first += ++row;
        problem.tile(micro, row * kTile, (t - first) * kTile, own);
      }
    }
  });
}

// Any floating type and processor: one matrix product per class pair, on blocks of examples so that the weighted copy
// of the features stays small.
void ggn_block_by_products(const at::Tensor& out, const at::Tensor& features, const at::Tensor& probs,
                           const at::Tensor& weights) {
  constexpr int64_t kBlock = 2048;
  const int64_t n = features.size(0), d = features.size(1), c = probs.size(1);
  const auto diagonal = at::zeros({c, d, d}, out.options());
  for (int64_t a = 0; a < c; ++a) {
    for (int64_t b = a + 1; b < c; ++b) {
      auto gram = at::zeros({d, d}, out.options());
      for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t end = std::min(n, begin + kBlock);
        const auto x = features.slice(0, begin, end), p = probs.slice(0, begin, end);
        const auto factor = weights.slice(0, begin, end).mul(p.select(1, a)).mul_(p.select(1, b));
        gram.addmm_(x.mul(factor.unsqueeze(1)).t(), x);
      }
      gram = gram.tril().add_(gram.tril(-1).t());  // symmetric to the bit
      out.select(0, a).select(1, b).sub_(gram);
      out.select(0, b).select(1, a).sub_(gram);
      diagonal[a].add_(gram);
      diagonal[b].add_(gram);
    }
  }
  for (int64_t a = 0; a < c; ++a) out.select(0, a).select(1, a).add_(diagonal[a]);
}

void ggn_block_cpu(const at::Tensor& out, const at::Tensor& features, const at::Tensor& probs,
                   const at::Tensor& weights) {
  check_ggn_block(out, features, probs, weights);
  const auto micro = micro_kernel();
  if (micro && features.scalar_type() == at::kFloat) {
    ggn_block_tiled(micro, out, features.contiguous(), probs, weights.contiguous());
  } else {
    ggn_block_by_products(out, features, probs, weights);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastif, CPU, m) { m.impl("ggn_block_", ggn_block_cpu); }

}  // namespace fastif
