#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ggn_block.h"
#include "ggn_block_launch.h"

namespace fastif {
namespace {

template <typename T>
void ggn_block(at::Tensor& out, const at::Tensor& features, const at::Tensor& probs, const at::Tensor& weights) {
  const int64_t n = features.size(0), d = features.size(1), c = probs.size(1);
  const GgnPlan plan = ggn_plan(n, d, c, sizeof(T), /*rows_sum_to_zero=*/true);
  auto scratch = at::empty({plan.scratch}, features.options());
  ggn_block_launch<T>(plan, features.const_data_ptr<T>(), probs.const_data_ptr<T>(), weights.const_data_ptr<T>(), n, d,
                      c, scratch.mutable_data_ptr<T>(), out.mutable_data_ptr<T>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void kronecker_block(at::Tensor& out, const at::Tensor& features, const at::Tensor& outer) {
  const int64_t n = features.size(0), d = features.size(1), c = outer.size(1);
  const GgnPlan plan = ggn_plan(n, d, c, sizeof(T), /*rows_sum_to_zero=*/false);
  auto scratch = at::empty({plan.scratch}, features.options());
  kronecker_block_launch<T>(plan, features.const_data_ptr<T>(), outer.const_data_ptr<T>(), n, d, c,
                            scratch.mutable_data_ptr<T>(), out.mutable_data_ptr<T>(),
                            c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void ggn_block_cuda_(at::Tensor out,               // [c, d, c, d]
                     const at::Tensor& features,   // [n, d]
                     const at::Tensor& probs,      // [n, c]
                     const at::Tensor& weights) {  // [n]
  check_ggn_block(out, features, probs, weights);
  const c10::cuda::CUDAGuard guard(features.device());
  if (features.scalar_type() == at::kFloat) {
    ggn_block<float>(out, features.contiguous(), probs.contiguous(), weights.contiguous());
  } else {
    ggn_block<double>(out, features.contiguous(), probs.contiguous(), weights.contiguous());
  }
}

void kronecker_block_cuda_(at::Tensor out,              // [c, d, c, d]
                           const at::Tensor& features,  // [n, d]
                           const at::Tensor& outer) {   // [n, c, c]
  check_kronecker_block(out, features, outer);
  const c10::cuda::CUDAGuard guard(features.device());
  if (features.scalar_type() == at::kFloat) {
    kronecker_block<float>(out, features.contiguous(), outer.contiguous());
  } else {
    kronecker_block<double>(out, features.contiguous(), outer.contiguous());
  }
}

}  // namespace
}  // namespace fastif

TORCH_LIBRARY_IMPL(fastif, CUDA, m) {
  m.impl("ggn_block_", fastif::ggn_block_cuda_);
  m.impl("kronecker_block_", fastif::kronecker_block_cuda_);
}
