#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <type_traits>

#include "../per_sample_grad.h"
#include "launch.h"

namespace fastif {
namespace {

template <typename T>
at::Tensor accumulate(const at::Tensor& inputs, const at::Tensor& output_grads, const at::Tensor& weights,
                      const at::Tensor& order, const at::Tensor& offsets, int64_t num_groups) {
  const int64_t n = inputs.size(0), t = inputs.size(1), d = inputs.size(2), o = output_grads.size(2);
  const int64_t splits = per_sample_grad_accumulate_splits(n, t, d, o, num_groups, sizeof(T));
  auto parts = at::empty({splits, num_groups, o, d}, inputs.options());
  per_sample_grad_accumulate_launch<T>(inputs.const_data_ptr<T>(), output_grads.const_data_ptr<T>(),
                                       weights.const_data_ptr<T>(), order.const_data_ptr<int64_t>(),
                                       offsets.const_data_ptr<int64_t>(), t, d, o, num_groups, splits,
                                       parts.mutable_data_ptr<T>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return splits == 1 ? parts.squeeze(0) : at::sum(parts, {0});
}

constexpr int64_t kBlockBytes = 256 << 20;  // what the intermediate results of one block of examples may take

// Calls work(begin, end) on blocks of examples each of which takes `entries` of the result's type; on all at once for
// 0.
template <typename Work>
void for_blocks(const at::Tensor& inputs, int64_t entries, Work work) {
  const int64_t n = inputs.size(0), bytes = entries * c10::elementSize(result_type(inputs));
  const int64_t block = entries == 0 ? n : std::max<int64_t>(1, kBlockBytes / bytes);
  for (int64_t begin = 0; begin < n; begin += block) work(begin, std::min(n, begin + block));
}

// Entries that an example takes where its inputs have to be copied.
int64_t copied(const at::Tensor& inputs, const at::Tensor& output_grads, bool always = false) {
  return always || has_16_bits(inputs) ? inputs.size(1) * (inputs.size(2) + output_grads.size(2)) : 0;
}

at::Tensor accumulate_by_group(const at::Tensor& a, const at::Tensor& u, const at::Tensor& weights,
                               const at::Tensor& groups, int64_t num_groups) {
  // Stable, so that the examples of a group keep their order.
  const auto [sorted, order] = at::sort(groups, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const auto offsets = at::searchsorted(sorted, at::arange(num_groups + 1, groups.options())).contiguous();
  const auto w = weights.contiguous(), o = order.contiguous();
  return a.scalar_type() == at::kFloat ? accumulate<float>(a, u, w, o, offsets, num_groups)
                                       : accumulate<double>(a, u, w, o, offsets, num_groups);
}

at::Tensor accumulate_cuda(const at::Tensor& inputs,        // [n, t, d]
                           const at::Tensor& output_grads,  // [n, t, o]
                           const at::Tensor& weights,       // [n]
                           const at::Tensor& groups,        // [n]
                           int64_t num_groups) {
  check_accumulate(inputs, output_grads, weights, groups, num_groups);
  const c10::cuda::CUDAGuard guard(inputs.device());
  at::Tensor out;
  for_blocks(inputs, copied(inputs, output_grads), [&](int64_t begin, int64_t end) {
    const auto sum = accumulate_by_group(block_of(inputs, begin, end), block_of(output_grads, begin, end),
                                         weights.slice(0, begin, end), groups.slice(0, begin, end), num_groups);
    out = begin == 0 ? sum : out.add_(sum);
  });
  check_finite_result("per_sample_grad.accumulate", out, inputs, output_grads);
  return out;
}

template <typename T>
at::Tensor accumulate_squares(const at::Tensor& a, const at::Tensor& u, const at::Tensor& weights) {
  const int64_t n = a.size(0), t = a.size(1), d = a.size(2), o = u.size(2);
  const int64_t splits = per_sample_grad_accumulate_squares_splits(n, t, d, o, sizeof(T));
  auto parts = at::empty({splits, o, d}, a.options());
  per_sample_grad_accumulate_squares_launch<T>(a.const_data_ptr<T>(), u.const_data_ptr<T>(),
                                               weights.const_data_ptr<T>(), n, t, d, o, splits,
                                               parts.mutable_data_ptr<T>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return splits == 1 ? parts.squeeze(0) : at::sum(parts, {0});
}

at::Tensor accumulate_squares_cuda(const at::Tensor& inputs,        // [n, t, d]
                                   const at::Tensor& output_grads,  // [n, t, o]
                                   const at::Tensor& weights) {     // [n]
  check_accumulate_squares(inputs, output_grads, weights);
  const c10::cuda::CUDAGuard guard(inputs.device());
  const bool single = inputs.size(1) == 1;
  at::Tensor out;
  for_blocks(inputs, copied(inputs, output_grads, /*always=*/single), [&](int64_t begin, int64_t end) {
    const auto a = block_of(inputs, begin, end), u = block_of(output_grads, begin, end);
    const auto w = weights.slice(0, begin, end).contiguous();
    at::Tensor sum;
    if (single) {  // (g_i)_od^2 = u_io^2 a_id^2: gradients of the squares
      const auto all = at::zeros({end - begin}, inputs.options().dtype(at::kLong));
      sum = accumulate_by_group(a.square(), u.square(), w, all, 1).squeeze(0);
    } else {
      sum = w.scalar_type() == at::kFloat ? accumulate_squares<float>(a, u, w) : accumulate_squares<double>(a, u, w);
    }
    out = begin == 0 ? sum : out.add_(sum);
  });
  check_finite_result("per_sample_grad.accumulate_squares", out, inputs, output_grads);
  return out;
}

template <typename T>
at::Tensor sq_norms(const at::Tensor& a, const at::Tensor& u, const std::optional<at::Tensor>& scale) {
  const int64_t n = a.size(0), t = a.size(1), d = a.size(2), o = u.size(2);
  const int64_t parts = per_sample_grad_sq_norms_parts(t, d, o, scale.has_value(), sizeof(T));
  auto partial = at::empty({n, parts}, a.options().dtype(at::kDouble));
  per_sample_grad_sq_norms_launch<T>(a.const_data_ptr<T>(), u.const_data_ptr<T>(),
                                     scale ? scale->const_data_ptr<T>() : nullptr, n, t, d, o,
                                     partial.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return at::sum(partial, {1}).to(a.scalar_type());
}

template <typename T>
at::Tensor dots(const at::Tensor& a, const at::Tensor& u, const at::Tensor& directions) {
  const int64_t n = a.size(0), t = a.size(1), d = a.size(2), o = u.size(2), q = directions.size(0);
  auto out = at::empty({q, n}, a.options());
  per_sample_grad_dots_launch<T>(a.const_data_ptr<T>(), u.const_data_ptr<T>(), directions.const_data_ptr<T>(), n, t, d,
                                 o, q, out.mutable_data_ptr<T>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor dots_by_position(const at::Tensor& a, const at::Tensor& u, const at::Tensor& directions) {
  return a.scalar_type() == at::kFloat ? dots<float>(a, u, directions) : dots<double>(a, u, directions);
}

at::Tensor sq_norms_cuda(const at::Tensor& inputs,                  // [n, t, d]
                         const at::Tensor& output_grads,            // [n, t, o]
                         const std::optional<at::Tensor>& scale) {  // [o, d]
  check_sq_norms(inputs, output_grads, scale);
  const c10::cuda::CUDAGuard guard(inputs.device());
  const bool single = scale && inputs.size(1) == 1;
  const auto r = scale ? std::optional(scale->contiguous()) : std::nullopt;
  auto out = at::empty({inputs.size(0)}, inputs.options().dtype(result_type(inputs)));
  for_blocks(inputs, copied(inputs, output_grads, /*always=*/single), [&](int64_t begin, int64_t end) {
    const auto a = block_of(inputs, begin, end), u = block_of(output_grads, begin, end);
    auto to = out.slice(0, begin, end);
    if (single) {  // sum_od R_od u_o^2 a_d^2
      to.copy_(dots_by_position(a.square(), u.square(), r->unsqueeze(0)).squeeze(0));
    } else {
      to.copy_(out.scalar_type() == at::kFloat ? sq_norms<float>(a, u, r) : sq_norms<double>(a, u, r));
    }
  });
  check_finite_result("per_sample_grad.sq_norms", out, inputs, output_grads);
  return out;
}

at::Tensor dots_cuda(const at::Tensor& inputs,        // [n, t, d]
                     const at::Tensor& output_grads,  // [n, t, o]
                     const at::Tensor& directions) {  // [q, o, d]
  check_dots(inputs, output_grads, directions);
  const c10::cuda::CUDAGuard guard(inputs.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t n = inputs.size(0), t = inputs.size(1), od = directions.size(1) * directions.size(2);
  const int64_t q = directions.size(0);
  const auto v = directions.contiguous();
  auto out = at::empty({q, n}, directions.options());
  const bool by_gradient = q * t > q + t + 24;  // products for every entry of a gradient, as on the CPU
  for_blocks(inputs, by_gradient ? od : copied(inputs, output_grads), [&](int64_t begin, int64_t end) {
    const auto a = block_of(inputs, begin, end), u = block_of(output_grads, begin, end);
    const auto gradients = [&] { return at::bmm(u.transpose(1, 2), a).view({-1, od}); };
    out.slice(1, begin, end).copy_(by_gradient ? at::mm(v.view({q, od}), gradients().t()) : dots_by_position(a, u, v));
  });
  check_finite_result("per_sample_grad.dots", out, inputs, output_grads);
  return out;
}

}  // namespace

static_assert(std::is_same_v<decltype(accumulate_cuda), AccumulateOp>);
static_assert(std::is_same_v<decltype(accumulate_squares_cuda), AccumulateSquaresOp>);
static_assert(std::is_same_v<decltype(sq_norms_cuda), SqNormsOp>);
static_assert(std::is_same_v<decltype(dots_cuda), DotsOp>);

TORCH_LIBRARY_IMPL(fastif, CUDA, m) {
  m.impl("per_sample_grad_accumulate", accumulate_cuda);
  m.impl("per_sample_grad_accumulate_squares", accumulate_squares_cuda);
  m.impl("per_sample_grad_sq_norms", sq_norms_cuda);
  m.impl("per_sample_grad_dots", dots_cuda);
}

}  // namespace fastif
