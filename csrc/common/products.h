// Matrix products on the CPU, past the dispatcher: without autograd and autocast, on any thread.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "tensor.h"

namespace fastif {

// out [i, j] += a [i, k] b [k, j]
inline void add_mm(const Tensor& out, const Tensor& a, const Tensor& b) {
  check_call(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1), "addmm");
}
inline void mm_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  check_call(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()), "mm");
}
inline Tensor mm(const Tensor& a, const Tensor& b) {
  const auto out = empty({a.size(0), b.size(1)}, a);
  mm_into(out, a, b);
  return out;
}
// out [n, i, j] = a [n, i, k] b [n, k, j]
inline void bmm_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  check_call(aoti_torch_cpu_bmm_out(out.get(), a.get(), b.get()), "bmm");
}
inline Tensor bmm(const Tensor& a, const Tensor& b) {
  const auto out = empty({a.size(0), a.size(1), b.size(2)}, a);
  bmm_into(out, a, b);
  return out;
}

}  // namespace fastif
