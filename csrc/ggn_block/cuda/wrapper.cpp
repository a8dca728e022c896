#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>
#include <type_traits>

#include "../../common/cuda.h"
#include "../ggn_block.h"
#include "launch.h"

namespace fastif {
namespace {

// FASTIF_GGN, read once in every call, forces tensor or cuda cores for float32: benchmarks race the two.
GgnPlan plan_of(const char* op, int64_t n, int64_t d, int64_t c, int64_t element_bytes, bool rows_sum_to_zero) {
  GgnPlan plan = ggn_plan(n, d, c, element_bytes, rows_sum_to_zero);
  const char* set = std::getenv("FASTIF_GGN");
  const std::string forced = set ? set : "";
  CHECK_VALUE(forced.empty() || forced == "tensor" || forced == "cuda", op, ": FASTIF_GGN must be tensor or cuda, got ",
              forced);
  if (forced == "cuda") plan.tensor_cores = false;
  return plan;
}

template <typename T>
void ggn_block(const Tensor& out, const Tensor& features, const Tensor& probs, const Tensor& weights) {
  const int64_t n = features.size(0), d = features.size(1), c = probs.size(1);
  const GgnPlan plan = plan_of("ggn_block", n, d, c, sizeof(T), /*rows_sum_to_zero=*/true);
  const auto scratch = empty({plan.scratch}, features);
  ggn_block_launch<T>(plan, features.const_data_ptr<T>(), probs.const_data_ptr<T>(), weights.const_data_ptr<T>(), n, d,
                      c, scratch.mutable_data_ptr<T>(), out.mutable_data_ptr<T>(), stream_of(features));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void kronecker_block(const Tensor& out, const Tensor& features, const Tensor& outer) {
  const int64_t n = features.size(0), d = features.size(1), c = outer.size(1);
  const GgnPlan plan = plan_of("kronecker_block", n, d, c, sizeof(T), /*rows_sum_to_zero=*/false);
  const auto scratch = empty({plan.scratch}, features);
  kronecker_block_launch<T>(plan, features.const_data_ptr<T>(), outer.const_data_ptr<T>(), n, d, c,
                            scratch.mutable_data_ptr<T>(), out.mutable_data_ptr<T>(), stream_of(features));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void ggn_block_cuda_(const Tensor& out,        // [c, d, c, d]
                     const Tensor& features,   // [n, d]
                     const Tensor& probs,      // [n, c]
                     const Tensor& weights) {  // [n]
  check_ggn_block(out, features, probs, weights);
  begin_write(out);
  const OnDeviceOf guard(features);
  if (features.scalar_type() == kFloat) {
    ggn_block<float>(out, readable(features), readable(probs), readable(weights));
  } else {
    ggn_block<double>(out, readable(features), readable(probs), readable(weights));
  }
}

void kronecker_block_cuda_(const Tensor& out,       // [c, d, c, d]
                           const Tensor& features,  // [n, d]
                           const Tensor& outer) {   // [n, c, c]
  check_kronecker_block(out, features, outer);
  begin_write(out);
  const OnDeviceOf guard(features);
  if (features.scalar_type() == kFloat) {
    kronecker_block<float>(out, readable(features), readable(outer));
  } else {
    kronecker_block<double>(out, readable(features), readable(outer));
  }
}

}  // namespace

static_assert(std::is_same_v<decltype(ggn_block_cuda_), GgnBlockOp>);
static_assert(std::is_same_v<decltype(kronecker_block_cuda_), KroneckerBlockOp>);

STABLE_TORCH_LIBRARY_IMPL(fastif, CUDA, m) {
  m.impl("ggn_block_", TORCH_BOX(&ggn_block_cuda_));
  m.impl("kronecker_block_", TORCH_BOX(&kronecker_block_cuda_));
}

}  // namespace fastif
