#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "../../common/products.h"
#include "../../common/tasks.h"
#include "../ggn_block.h"
#include "pairs.h"

namespace fastif {
namespace {

constexpr int64_t kEntries = int64_t{1} << 22;  // of the weighted features that stand at a time

// Block (a, b) of out [c, d, c, d] += sign * gram [d, d] (of `stride` entries a row), whose lower triangle is read: the
// sum is symmetric to the bit.
template <typename T>
void add_symmetric(T* out, int64_t c, int64_t d, int64_t a, int64_t b, const T* gram, int64_t stride, T sign) {
  parallel_for(0, d, std::max<int64_t>(1, 32768 / d), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      T* const row = out + ((a * d + j) * c + b) * d;
      for (int64_t k = 0; k <= j; ++k) row[k] += sign * gram[j * stride + k];
      for (int64_t k = j + 1; k < d; ++k) row[k] += sign * gram[k * stride + j];
    }
  });
}

// Any floating type and processor: one matrix product per class pair, on blocks of examples so that the weighted copy
// of the features stays small.
template <typename T>
void ggn_block_by_products(const Tensor& out, const Tensor& features, const Tensor& probs, const Tensor& weights) {
  constexpr int64_t kBlock = 2048;
  const int64_t n = features.size(0), d = features.size(1), c = probs.size(1);
  const T *const x = features.const_data_ptr<T>(), *const p = probs.const_data_ptr<T>();
  const T* const w = weights.const_data_ptr<T>();
  T* const to = out.mutable_data_ptr<T>();
  const auto diagonal = zeros({c, d, d}, features), weighted = empty({std::min(n, kBlock), d}, features);
  for (int64_t a = 0; a < c; ++a) {
    for (int64_t b = a + 1; b < c; ++b) {
      const auto gram = zeros({d, d}, features);
      for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t end = std::min(n, begin + kBlock);
        T* const rows = weighted.mutable_data_ptr<T>();
        parallel_for(begin, end, std::max<int64_t>(1, 32768 / d), [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            const T factor = w[i] * p[i * c + a] * p[i * c + b];
            for (int64_t j = 0; j < d; ++j) rows[(i - begin) * d + j] = x[i * d + j] * factor;
          }
        });
        add_mm(gram, weighted.slice(0, 0, end - begin).t(), features.slice(0, begin, end));
      }
      const T* const sum = gram.const_data_ptr<T>();
      add_symmetric<T>(to, c, d, a, b, sum, d, -1);
      add_symmetric<T>(to, c, d, b, a, sum, d, -1);
      for (const int64_t of : {a, b}) {
        add_symmetric<T>(diagonal.mutable_data_ptr<T>() + of * d * d, 1, d, 0, 0, sum, d, 1);
      }
    }
  }
  for (int64_t a = 0; a < c; ++a) {
    add_symmetric<T>(to, c, d, a, a, diagonal.const_data_ptr<T>() + a * d * d, d, 1);
  }
}

void ggn_block_cpu(const Tensor& out, const Tensor& features, const Tensor& probs, const Tensor& weights) {
  check_ggn_block(out, features, probs, weights);
  begin_write(out);
  const auto x = readable(features), p = readable(probs), w = readable(weights);
  if (can_add_pairs() && x.scalar_type() == kFloat) {
    return add_pairs(out.mutable_data_ptr<float>(), x.const_data_ptr<float>(),
                     {.probs = p.const_data_ptr<float>(), .weights = w.const_data_ptr<float>()}, x.size(0), x.size(1),
                     p.size(1));
  }
  with_type_of(x, [&]<typename T>(T) { ggn_block_by_products<T>(out, x, p, w); });
}

// Any floating type and processor: row a of the lower triangle of blocks is one product.
template <typename T>
void kronecker_block_by_products(const Tensor& out, const Tensor& features, const Tensor& outer) {
  const int64_t n = features.size(0), d = features.size(1), c = outer.size(1);
  const T *const x = features.const_data_ptr<T>(), *const h = outer.const_data_ptr<T>();
  T* const to = out.mutable_data_ptr<T>();
  for (int64_t a = 0; a < c; ++a) {
    const int64_t width = (a + 1) * d, each = std::max<int64_t>(1, kEntries / width);
    const auto row = zeros({d, width}, features), weighted = empty({std::min(n, each), width}, features);
    for (int64_t begin = 0; begin < n; begin += each) {
      const int64_t end = std::min(n, begin + each);
      T* const rows = weighted.mutable_data_ptr<T>();
      parallel_for(begin, end, std::max<int64_t>(1, 32768 / width), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          for (int64_t b = 0; b <= a; ++b) {
            const T factor = h[(i * c + a) * c + b];
            for (int64_t j = 0; j < d; ++j) rows[(i - begin) * width + b * d + j] = factor * x[i * d + j];
          }
        }
      });
      add_mm(row, features.slice(0, begin, end).t(), weighted.slice(0, 0, end - begin));
    }
    const T* const sum = row.const_data_ptr<T>();  // [d, a + 1, d]
    add_symmetric<T>(to, c, d, a, a, sum + a * d, width, 1);
    parallel_for(0, d, std::max<int64_t>(1, 32768 / width), [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        for (int64_t b = 0; b < a; ++b) {
          for (int64_t k = 0; k < d; ++k) {
            const T entry = sum[j * width + b * d + k];
            to[((a * d + j) * c + b) * d + k] += entry;
            to[((b * d + k) * c + a) * d + j] += entry;
          }
        }
      }
    });
  }
}

void kronecker_block_cpu(const Tensor& out, const Tensor& features, const Tensor& outer) {
  check_kronecker_block(out, features, outer);
  begin_write(out);
  const auto x = readable(features), h = readable(outer);
  if (can_add_pairs() && x.scalar_type() == kFloat) {
    return add_pairs(out.mutable_data_ptr<float>(), x.const_data_ptr<float>(), {.outer = h.const_data_ptr<float>()},
                     x.size(0), x.size(1), h.size(1));
  }
  with_type_of(x, [&]<typename T>(T) { kronecker_block_by_products<T>(out, x, h); });
}

}  // namespace

static_assert(std::is_same_v<decltype(ggn_block_cpu), GgnBlockOp>);
static_assert(std::is_same_v<decltype(kronecker_block_cpu), KroneckerBlockOp>);

STABLE_TORCH_LIBRARY_IMPL(fastif, CPU, m) {
  m.impl("ggn_block_", TORCH_BOX(&ggn_block_cpu));
  m.impl("kronecker_block_", TORCH_BOX(&kronecker_block_cpu));
}

}  // namespace fastif
