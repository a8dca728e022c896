#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "per_sample_grad.h"
#include "per_sample_grad_launch.h"

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

at::Tensor accumulate_cuda(const at::Tensor& inputs,        // [n, t, d]
                           const at::Tensor& output_grads,  // [n, t, o]
                           const at::Tensor& weights,       // [n]
                           const at::Tensor& groups,        // [n]
                           int64_t num_groups) {
  check_accumulate(inputs, output_grads, weights, groups, num_groups);
  const c10::cuda::CUDAGuard guard(inputs.device());
  // Stable, so that the examples of a group keep their order.
  const auto [sorted, order] = at::sort(groups, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const auto offsets = at::searchsorted(sorted, at::arange(num_groups + 1, groups.options()));
  const auto a = inputs.contiguous(), u = output_grads.contiguous(), w = weights.contiguous();
  const auto o = order.contiguous(), f = offsets.contiguous();
  const auto out = inputs.scalar_type() == at::kFloat ? accumulate<float>(a, u, w, o, f, num_groups)
                                                      : accumulate<double>(a, u, w, o, f, num_groups);
  check_finite_result("per_sample_grad.accumulate", out, a, u);
  return out;
}

template <typename T>
at::Tensor sq_norms(const at::Tensor& inputs, const at::Tensor& output_grads) {
  const int64_t n = inputs.size(0), t = inputs.size(1), d = inputs.size(2), o = output_grads.size(2);
  const int64_t parts = per_sample_grad_sq_norms_parts(t, d, o, sizeof(T));
  auto partial = at::empty({n, parts}, inputs.options().dtype(at::kDouble));
  per_sample_grad_sq_norms_launch<T>(inputs.const_data_ptr<T>(), output_grads.const_data_ptr<T>(), n, t, d, o,
                                     partial.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return at::sum(partial, {1}).to(inputs.scalar_type());
}

at::Tensor sq_norms_cuda(const at::Tensor& inputs,          // [n, t, d]
                         const at::Tensor& output_grads) {  // [n, t, o]
  check_sq_norms(inputs, output_grads);
  const c10::cuda::CUDAGuard guard(inputs.device());
  const auto a = inputs.contiguous(), u = output_grads.contiguous();
  const auto out = inputs.scalar_type() == at::kFloat ? sq_norms<float>(a, u) : sq_norms<double>(a, u);
  check_finite_result("per_sample_grad.sq_norms", out, a, u);
  return out;
}

template <typename T>
at::Tensor dots(const at::Tensor& inputs, const at::Tensor& output_grads, const at::Tensor& directions) {
  const int64_t n = inputs.size(0), t = inputs.size(1), d = inputs.size(2), o = output_grads.size(2);
  const int64_t q = directions.size(0);
  auto out = at::empty({q, n}, inputs.options());
  per_sample_grad_dots_launch<T>(inputs.const_data_ptr<T>(), output_grads.const_data_ptr<T>(),
                                 directions.const_data_ptr<T>(), n, t, d, o, q, out.mutable_data_ptr<T>(),
                                 c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor dots_cuda(const at::Tensor& inputs,        // [n, t, d]
                     const at::Tensor& output_grads,  // [n, t, o]
                     const at::Tensor& directions) {  // [q, o, d]
  check_dots(inputs, output_grads, directions);
  const c10::cuda::CUDAGuard guard(inputs.device());
  const auto a = inputs.contiguous(), u = output_grads.contiguous(), v = directions.contiguous();
  const auto out = inputs.scalar_type() == at::kFloat ? dots<float>(a, u, v) : dots<double>(a, u, v);
  check_finite_result("per_sample_grad.dots", out, a, u);
  return out;
}

}  // namespace
}  // namespace fastif

TORCH_LIBRARY_IMPL(fastif, CUDA, m) {
  m.impl("per_sample_grad_accumulate", fastif::accumulate_cuda);
  m.impl("per_sample_grad_sq_norms", fastif::sq_norms_cuda);
  m.impl("per_sample_grad_dots", fastif::dots_cuda);
}
