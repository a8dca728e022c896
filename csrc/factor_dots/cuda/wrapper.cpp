#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "../../common/cuda.h"
#include "../factor_dots.h"
#include "launch.h"

namespace fastif {
namespace {

Tensor factor_dots_cuda(const Tensor& left,                    // [F, o]
                        const Tensor& right,                   // [F, d]
                        const std::optional<Tensor>& scale,    // [F]
                        const Tensor& ranks,                   // [n]
                        const Tensor& queries,                 // [q, o, d] or [q, o, r]
                        const std::optional<Tensor>& along) {  // [q, r, d]
  check_factor_dots(left, right, scale, ranks, queries, along);
  const OnDeviceOf guard(queries);
  const int64_t factors = left.size(0), o = left.size(1), d = right.size(1);
  const int64_t n = ranks.size(0), q = queries.size(0);
  const auto l = readable(left), r = readable(right), given = readable(queries);
  const auto v = along ? call("aten::bmm", "", given, readable(*along)).contiguous() : given;
  const auto s = scale ? std::optional(readable(*scale)) : std::nullopt;
  const auto ends = call("aten::cumsum", "", readable(ranks), int64_t{0}, std::optional(kLong)).contiguous();
  const auto products = empty({q, factors}, queries), out = empty({q, n}, queries);
  factor_dots_launch(l.const_data_ptr<int8_t>(), r.const_data_ptr<int8_t>(), s ? s->const_data_ptr<float>() : nullptr,
                     ends.const_data_ptr<int64_t>(), v.const_data_ptr<float>(), factors, o, d, n, q,
                     products.mutable_data_ptr<float>(), out.mutable_data_ptr<float>(), stream_of(queries));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  check_factor_dots_result(out);
  return out;
}

}  // namespace

static_assert(std::is_same_v<decltype(factor_dots_cuda), FactorDotsOp>);

STABLE_TORCH_LIBRARY_IMPL(fastif, CUDA, m) { m.impl("factor_dots", TORCH_BOX(&factor_dots_cuda)); }

}  // namespace fastif
