#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <type_traits>

#include "../ggn_block.h"
#include "pairs.h"

namespace fastif {
namespace {

constexpr int64_t kEntries = int64_t{1} << 22;  // of the weighted features that stand at a time

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
  begin_write(out);
  if (!can_add_pairs() || features.scalar_type() != at::kFloat) {
    return ggn_block_by_products(out, features, probs, weights);
  }
  const auto x = readable(features), p = readable(probs), w = readable(weights);
  add_pairs(out.mutable_data_ptr<float>(), x.const_data_ptr<float>(),
            {.probs = p.const_data_ptr<float>(), .weights = w.const_data_ptr<float>()}, x.size(0), x.size(1),
            p.size(1));
}

// Any floating type and processor: row a of the lower triangle of blocks is one product.
void kronecker_block_by_products(const at::Tensor& out, const at::Tensor& features, const at::Tensor& outer) {
  const int64_t n = features.size(0), d = features.size(1), c = outer.size(1);
  for (int64_t a = 0; a < c; ++a) {
    const int64_t each = std::max<int64_t>(1, kEntries / ((a + 1) * d));
    auto row = at::zeros({d, (a + 1) * d}, out.options());
    for (int64_t begin = 0; begin < n; begin += each) {
      const int64_t end = std::min(n, begin + each);
      const auto x = features.slice(0, begin, end), h = outer.slice(0, begin, end).select(1, a).slice(1, 0, a + 1);
      row.addmm_(x.t(), h.unsqueeze(2).mul(x.unsqueeze(1)).flatten(1));
    }
    row = row.view({d, a + 1, d});
    const auto own = row.select(1, a);
    row.select(1, a).copy_(own.tril().add_(own.tril(-1).t()));  // symmetric to the bit
    out.select(0, a).slice(1, 0, a + 1).add_(row);
    out.slice(0, 0, a).select(2, a).add_(row.slice(1, 0, a).permute({1, 2, 0}));
  }
}

void kronecker_block_cpu(const at::Tensor& out, const at::Tensor& features, const at::Tensor& outer) {
  check_kronecker_block(out, features, outer);
  begin_write(out);
  if (!can_add_pairs() || features.scalar_type() != at::kFloat) {
    return kronecker_block_by_products(out, features, outer);
  }
  const auto x = readable(features), h = readable(outer);
  add_pairs(out.mutable_data_ptr<float>(), x.const_data_ptr<float>(), {.outer = h.const_data_ptr<float>()}, x.size(0),
            x.size(1), h.size(1));
}

}  // namespace

static_assert(std::is_same_v<decltype(ggn_block_cpu), GgnBlockOp>);
static_assert(std::is_same_v<decltype(kronecker_block_cpu), KroneckerBlockOp>);

TORCH_LIBRARY_IMPL(fastif, CPU, m) {
  m.impl("ggn_block_", ggn_block_cpu);
  m.impl("kronecker_block_", kronecker_block_cpu);
}

}  // namespace fastif
