// Helpers of the contracts: every message names the op, the rule and the value.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <utility>

#include "tensor.h"

namespace fastif {

inline void check_floating(const char* op, const char* name, const Tensor& x) {
  CHECK_TYPE(x.scalar_type() == kFloat || x.scalar_type() == kDouble, op, ": ", name,
             " must be float32 or float64, got ", x.scalar_type());
}

inline void check_same_type(const char* op, const char* name, const Tensor& x, const char* as_name, const Tensor& as) {
  CHECK_TYPE(x.scalar_type() == as.scalar_type(), op, ": ", name, " must have the dtype of ", as_name, " (",
             as.scalar_type(), "), got ", x.scalar_type());
  CHECK_VALUE(x.device() == as.device(), op, ": ", name, " must be on the device of ", as_name, " (", as.device(),
              "), got ", x.device());
}

// The addresses from x's first entry to past its last. Entries between may belong to others where x has strides.
struct Span {
  uintptr_t begin, end;

  Span(const Tensor& x, const void* data) : begin(reinterpret_cast<uintptr_t>(data)), end(begin + bytes(x)) {}

  static size_t bytes(const Tensor& x) {
    if (x.numel() == 0) return 0;
    int64_t last = 0;
    for (int64_t axis = 0; axis < x.dim(); ++axis) last += (x.size(axis) - 1) * x.stride(axis);
    return static_cast<size_t>(last + 1) * x.element_size();
  }
};

// A storage can be resized under the tensors that look at it, and sharded models do so to free parameters.
inline void check_memory(const char* op, const char* name, const Tensor& x) {
  const size_t needed = x.storage_offset() * x.element_size() + Span::bytes(x);
  CHECK_VALUE(x.numel() == 0 || x.storage_size() >= static_cast<int64_t>(needed), op, ": ", name,
              " must hold its entries, ", needed, " bytes of storage, got ", x.storage_size());
}

inline void check_rank(const char* op, const char* name, const char* axes, const Tensor& x, int64_t rank) {
  CHECK_VALUE(x.dim() == rank, op, ": ", name, " must be ", axes, ", got shape ", x.sizes());
  check_memory(op, name, x);
}

// Raises if a row of x [n, ...] holds NaN or Inf, and names the first such row. Sums find it without a mask of x's
// size: a sum is finite unless an entry is not, or unless finite entries overflow, which is told apart.
inline void check_finite_rows(const char* op, const char* name, const Tensor& x) {
  if (x.numel() == 0 || std::isfinite(sum(x).item<double>())) return;
  Sizes axes(static_cast<size_t>(x.dim() - 1));
  std::iota(axes.begin(), axes.end(), 1);
  const auto finite = isfinite(axes.empty() ? x : sum(x, axes)).cpu();  // a sum over no axes would be one over all
  for (int64_t i = 0; i < x.size(0); ++i) {
    CHECK_VALUE(finite.const_data_ptr<bool>()[i] || all(isfinite(x[i])).item<bool>(), op, ": ", name,
                " must be finite, row ", i, " holds NaN or Inf");
  }
}

// A view of none of x's entries, which autograd knows.
inline Tensor no_entries(const Tensor& x) { return call("aten::narrow", "", x, int64_t{0}, int64_t{0}, int64_t{0}); }

// For what an op writes to, once its shape is right and it is contiguous, so that it does not overlap itself. Kernels
// write where the memory is, whatever sign a view gives it, and read their inputs while they write.
inline void check_out(const char* op, const Tensor& out,
                      std::initializer_list<std::pair<const char*, const Tensor&>> inputs) {
  check_memory(op, "out", out);
  // A view of what requires grad has a history, where there is grad mode; where there is none, Python's functions
  // check.
  CHECK_VALUE(ask("aten::is_leaf", no_entries(out)), op, ": out must not require grad (the op is not differentiable)");
  const bool conjugate = ask("aten::is_conj", out);
  CHECK_VALUE(!conjugate && !ask("aten::is_neg", out), op, ": out must not be a ", conjugate ? "conjugate" : "negative",
              " view, whose entries are not what its memory holds");
  // What is made in inference mode is an inference tensor: that tells whether this is inference mode.
  CHECK_VALUE(!ask("aten::is_inference", out) || ask("aten::is_inference", empty({0}, out)), op,
              ": out must not be an inference tensor outside inference mode");
  const Span written(out, out.mutable_data_ptr());
  for (const auto& [name, x] : inputs) {
    const Span read(x, x.const_data_ptr());
    const uintptr_t begin = std::max(written.begin, read.begin), end = std::min(written.end, read.end);
    CHECK_VALUE(begin >= end, op, ": out must not share memory with ", name, ", got ", end - begin,
                " bytes between the ends of both");
  }
}

// To be called once, before the first write to an `out`: what autograd has saved of it is no longer that. A write to
// none of its entries counts as one.
inline void begin_write(const Tensor& out) { check_call(aoti_torch_zero_(no_entries(out).get()), "zero_"); }

// x as raw pointers read it. A negative view can be contiguous, and contiguous() then returns it as it is.
inline Tensor readable(const Tensor& x) { return Tensor(call("aten::resolve_neg", "", x)).contiguous(); }

}  // namespace fastif
