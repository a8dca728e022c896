// Helpers of the contracts: every message names the op, the rule and the value.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/sum.h>
#include <c10/util/Exception.h>

namespace fastif {

inline void check_floating(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op, ": ", name,
                   " must be float32 or float64, got ", x.scalar_type());
}

inline void check_same_type(const char* op, const char* name, const at::Tensor& x, const char* as_name,
                            const at::Tensor& as) {
  TORCH_CHECK_TYPE(x.scalar_type() == as.scalar_type(), op, ": ", name, " must have the dtype of ", as_name, " (",
                   as.scalar_type(), "), got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == as.device(), op, ": ", name, " must be on the device of ", as_name, " (", as.device(),
                    "), got ", x.device());
}

inline void check_rank(const char* op, const char* name, const char* axes, const at::Tensor& x, int64_t rank) {
  TORCH_CHECK_VALUE(x.dim() == rank, op, ": ", name, " must be ", axes, ", got shape ", x.sizes());
}

// Raises if a row of x [n, ...] holds NaN or Inf, and names the first such row. The row sums find it without a
// mask of x's size: a sum is finite unless an entry is not, or unless finite entries overflow, which is told apart.
inline void check_finite_rows(const char* op, const char* name, const at::Tensor& x) {
  if (x.numel() == 0) return;
  const auto rows = x.reshape({x.size(0), -1});
  const auto finite = at::isfinite(at::sum(rows, at::IntArrayRef{1}));
  if (finite.all().item<bool>()) return;
  const auto suspects = finite.logical_not().nonzero().flatten();
  for (int64_t s = 0; s < suspects.size(0); ++s) {
    const int64_t i = suspects[s].item<int64_t>();
    TORCH_CHECK_VALUE(at::isfinite(rows[i]).all().item<bool>(), op, ": ", name, " must be finite, row ", i,
                      " holds NaN or Inf");
  }
}

}  // namespace fastif
