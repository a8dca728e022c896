#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>
#include <type_traits>

#include "../ggn_block.h"
#include "launch.h"

namespace fastif {
namespace {

// FASTIF_GGN, read once in every call, forces tensor or cuda cores for float32: benchmarks race the two.
GgnPlan plan_of(const char* op, int64_t n, int64_t d, int64_t c, int64_t element_bytes, bool rows_sum_to_zero) {
  GgnPlan plan = ggn_plan(n, d, c, element_bytes, rows_sum_to_zero);
  const char* set = std::getenv("FASTIF_GGN");
  const std::string forced = set ? set : "";
  TORCH_CHECK_VALUE(forced.empty() || forced == "tensor" || forced == "cuda", op,
                    ": FASTIF_GGN must be tensor or cuda, got ", forced);
  if (forced == "cuda") plan.tensor_cores = false;
  return plan;
}

template <typename T>
void ggn_block(const at::Tensor& out, const at::Tensor& features, const at::Tensor& probs, const at::Tensor& weights) {
  const int64_t n = features.size(0), d = features.size(1), c = probs.size(1);
  const GgnPlan plan = plan_of("ggn_block", n, d, c, sizeof(T), /*rows_sum_to_zero=*/true);
  auto scratch = at::empty({plan.scratch}, features.options());
  ggn_block_launch<T>(plan, features.const_data_ptr<T>(), probs.const_data_ptr<T>(), weights.const_data_ptr<T>(), n, d,
                      c, scratch.mutable_data_ptr<T>(), out.mutable_data_ptr<T>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void kronecker_block(const at::Tensor& out, const at::Tensor& features, const at::Tensor& outer) {
  const int64_t n = features.size(0), d = features.size(1), c = outer.size(1);
  const GgnPlan plan = plan_of("kronecker_block", n, d, c, sizeof(T), /*rows_sum_to_zero=*/false);
  auto scratch = at::empty({plan.scratch}, features.options());
  kronecker_block_launch<T>(plan, features.const_data_ptr<T>(), outer.const_data_ptr<T>(), n, d, c,
                            scratch.mutable_data_ptr<T>(), out.mutable_data_ptr<T>(),
                            c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void ggn_block_cuda_(const at::Tensor& out,        // [c, d, c, d]
                     const at::Tensor& features,   // [n, d]
                     const at::Tensor& probs,      // [n, c]
                     const at::Tensor& weights) {  // [n]
  check_ggn_block(out, features, probs, weights);
  begin_write(out);
  const c10::cuda::CUDAGuard guard(features.device());
  if (features.scalar_type() == at::kFloat) {
    ggn_block<float>(out, readable(features), readable(probs), readable(weights));
  } else {
    ggn_block<double>(out, readable(features), readable(probs), readable(weights));
  }
}

void kronecker_block_cuda_(const at::Tensor& out,       // [c, d, c, d]
                           const at::Tensor& features,  // [n, d]
                           const at::Tensor& outer) {   // [n, c, c]
  check_kronecker_block(out, features, outer);
  begin_write(out);
  const c10::cuda::CUDAGuard guard(features.device());
  if (features.scalar_type() == at::kFloat) {
    kronecker_block<float>(out, readable(features), readable(outer));
  } else {
    kronecker_block<double>(out, readable(features), readable(outer));
  }
}

}  // namespace

static_assert(std::is_same_v<decltype(ggn_block_cuda_), GgnBlockOp>);
static_assert(std::is_same_v<decltype(kronecker_block_cuda_), KroneckerBlockOp>);

TORCH_LIBRARY_IMPL(fastif, CUDA, m) {
  m.impl("ggn_block_", ggn_block_cuda_);
  m.impl("kronecker_block_", kronecker_block_cuda_);
}

}  // namespace fastif
