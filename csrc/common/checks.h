// Helpers of the contracts: every message names the op, the rule and the value.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/sum.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <utility>
#include <vector>

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

// The addresses from x's first entry to past its last. Entries between may belong to others where x has strides.
struct Span {
  uintptr_t begin, end;

  Span(const at::Tensor& x, const void* data) : begin(reinterpret_cast<uintptr_t>(data)), end(begin + bytes(x)) {}

  static size_t bytes(const at::Tensor& x) {
    if (x.numel() == 0) return 0;
    int64_t last = 0;
    for (int64_t axis = 0; axis < x.dim(); ++axis) last += (x.size(axis) - 1) * x.stride(axis);
    return static_cast<size_t>(last + 1) * x.element_size();
  }
};

// A storage can be resized under the tensors that look at it, and sharded models do so to free parameters.
inline void check_memory(const char* op, const char* name, const at::Tensor& x) {
  const size_t needed = x.storage_offset() * x.element_size() + Span::bytes(x);
  TORCH_CHECK_VALUE(x.numel() == 0 || x.storage().nbytes() >= needed, op, ": ", name, " must hold its entries, ",
                    needed, " bytes of storage, got ", x.storage().nbytes());
}

inline void check_rank(const char* op, const char* name, const char* axes, const at::Tensor& x, int64_t rank) {
  TORCH_CHECK_VALUE(x.dim() == rank, op, ": ", name, " must be ", axes, ", got shape ", x.sizes());
  check_memory(op, name, x);
}

// Raises if a row of x [n, ...] holds NaN or Inf, and names the first such row. The row sums find it without a
// mask of x's size: a sum is finite unless an entry is not, or unless finite entries overflow, which is told apart.
inline void check_finite_rows(const char* op, const char* name, const at::Tensor& x) {
  if (x.numel() == 0) return;
  std::vector<int64_t> axes(static_cast<size_t>(x.dim() - 1));
  std::iota(axes.begin(), axes.end(), 1);
  const auto finite = at::isfinite(axes.empty() ? x : at::sum(x, axes));  // a sum over no axes would be one over all
  if (finite.all().item<bool>()) return;
  const auto suspects = finite.logical_not().nonzero().flatten();
  for (int64_t s = 0; s < suspects.size(0); ++s) {
    const int64_t i = suspects[s].item<int64_t>();
    TORCH_CHECK_VALUE(at::isfinite(x[i]).all().item<bool>(), op, ": ", name, " must be finite, row ", i,
                      " holds NaN or Inf");
  }
}

// For what an op writes to, once its shape is right and it is contiguous, so that it does not overlap itself. Kernels
// write where the memory is, whatever sign a view gives it, and read their inputs while they write.
inline void check_out(const char* op, const at::Tensor& out,
                      std::initializer_list<std::pair<const char*, const at::Tensor&>> inputs) {
  check_memory(op, "out", out);
  TORCH_CHECK_VALUE(!out.requires_grad(), op, ": out must not require grad (the op is not differentiable)");
  TORCH_CHECK_VALUE(!out.is_neg() && !out.is_conj(), op, ": out must not be a ",
                    out.is_conj() ? "conjugate" : "negative", " view, whose entries are not what its memory holds");
  TORCH_CHECK_VALUE(!out.is_inference() || c10::InferenceMode::is_enabled(), op,
                    ": out must not be an inference tensor outside inference mode");
  const Span written(out, out.mutable_data_ptr());
  for (const auto& [name, x] : inputs) {
    const Span read(x, x.const_data_ptr());
    const uintptr_t begin = std::max(written.begin, read.begin), end = std::min(written.end, read.end);
    TORCH_CHECK_VALUE(begin >= end, op, ": out must not share memory with ", name, ", got ", end - begin,
                      " bytes between the ends of both");
  }
}

// To be called once, before the first write to an `out`: what autograd has saved of it is no longer that.
inline void begin_write(const at::Tensor& out) { out.unsafeGetTensorImpl()->bump_version(); }

// x as raw pointers read it. A negative view can be contiguous, and contiguous() then returns it as it is.
inline at::Tensor readable(const at::Tensor& x) { return x.resolve_neg().contiguous(); }

}  // namespace fastif
