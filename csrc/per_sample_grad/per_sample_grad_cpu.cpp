#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "../common/simd.h"
#include "per_sample_grad.h"

namespace fastif {
namespace {

constexpr int64_t kScratchBytes = 8 << 20;  // what one chunk of intermediate results may take

int64_t rows_in_scratch(int64_t bytes_per_row) { return std::max<int64_t>(1, kScratchBytes / bytes_per_row); }

at::Tensor accumulate_cpu(const at::Tensor& inputs, const at::Tensor& output_grads, const at::Tensor& weights,
                          const at::Tensor& groups, int64_t num_groups) {
  check_accumulate(inputs, output_grads, weights, groups, num_groups);
  const int64_t n = inputs.size(0), t = inputs.size(1), d = inputs.size(2), o = output_grads.size(2);
  auto out = at::zeros({num_groups, o, d}, inputs.options());
  const auto order = groups.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  const auto sorted = groups.index_select(0, order);
  const int64_t* group = sorted.const_data_ptr<int64_t>();
  const int64_t chunk = std::min(n, rows_in_scratch(t * (o + d) * inputs.element_size()));
  const auto scratch_a = at::empty({chunk, t, d}, inputs.options()),
             scratch_u = at::empty({chunk, t, o}, inputs.options());
  for (int64_t begin = 0, end = 0; begin < n; begin = end) {
    for (end = begin + 1; end < n && end - begin < chunk && group[end] == group[begin];) ++end;
    // Into the same scratch every time: fresh memory for every chunk costs as much as the product.
    auto a = scratch_a.narrow(0, 0, end - begin), u = scratch_u.narrow(0, 0, end - begin);
    const auto members = order.slice(0, begin, end);
    at::index_select_out(a, inputs, 0, members);
    at::index_select_out(u, output_grads, 0, members);
    u.mul_(weights.index_select(0, members).view({-1, 1, 1}));
    out[group[begin]].addmm_(u.view({-1, o}).t(), a.view({-1, d}));
  }
  check_finite_result("per_sample_grad.accumulate", out, inputs, output_grads);
  return out;
}

template <typename T>
__attribute__((always_inline)) inline T dot(const T* x, const T* y, int64_t size) {
  T lane[32] = {};  // independent sums: the compiler may then use vector registers
  int64_t j = 0;
  for (; j + 32 <= size; j += 32) {
    for (int l = 0; l < 32; ++l) lane[l] += x[j + l] * y[j + l];
  }
  for (int l = 0; j < size; ++j, ++l) lane[l] += x[j] * y[j];
  for (int half = 16; half; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

FASTIF_CLONES float dot_f32(const float* x, const float* y, int64_t size) { return dot(x, y, size); }
FASTIF_CLONES double dot_f64(const double* x, const double* y, int64_t size) { return dot(x, y, size); }
inline float row_dot(const float* x, const float* y, int64_t size) { return dot_f32(x, y, size); }
inline double row_dot(const double* x, const double* y, int64_t size) { return dot_f64(x, y, size); }

// |g|^2 of one example by the positions' Gram matrices, which are symmetric: each pair t' < t counts twice.
template <typename T>
T sq_norm_by_gram(const T* a, const T* u, int64_t t, int64_t d, int64_t o) {
  T sum = 0;
  for (int64_t s = 0; s < t; ++s) {
    sum += row_dot(a + s * d, a + s * d, d) * row_dot(u + s * o, u + s * o, o);
    for (int64_t r = 0; r < s; ++r) sum += 2 * row_dot(a + s * d, a + r * d, d) * row_dot(u + s * o, u + r * o, o);
  }
  return sum;
}

at::Tensor sq_norms_cpu(const at::Tensor& inputs, const at::Tensor& output_grads) {
  constexpr auto op = "per_sample_grad.sq_norms";
  check_sq_norms(inputs, output_grads);
  const auto a = inputs.contiguous(), u = output_grads.contiguous();
  const int64_t n = a.size(0), t = a.size(1), d = a.size(2), o = u.size(2);
  auto out = at::empty({n}, a.options());
  if (t <= 4) {  // matrix products of that size cost more than they save
    AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "per_sample_grad_sq_norms", [&] {
      at::parallel_for(0, n, std::max<int64_t>(1, 65536 / (t * t * (o + d))), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          out.mutable_data_ptr<scalar_t>()[i] = sq_norm_by_gram(a.const_data_ptr<scalar_t>() + i * t * d,
                                                                u.const_data_ptr<scalar_t>() + i * t * o, t, d, o);
        }
      });
    });
    check_finite_result(op, out, inputs, output_grads);
    return out;
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const bool by_gram = t * (o + d) <= o * d;  // operations of the two routes, over t
  const int64_t chunk = rows_in_scratch((by_gram ? 2 * t * t : o * d) * a.element_size());
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const int64_t end = std::min(n, begin + chunk);
    const auto ac = a.slice(0, begin, end), uc = u.slice(0, begin, end);
    const auto left = by_gram ? at::bmm(ac, ac.transpose(1, 2)) : at::bmm(uc.transpose(1, 2), ac);
    const auto right = by_gram ? at::bmm(uc, uc.transpose(1, 2)) : left;
    AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "per_sample_grad_sq_norms", [&] {
      const int64_t size = left.size(1) * left.size(2);
      for (int64_t i = 0; i < end - begin; ++i) {
        out.mutable_data_ptr<scalar_t>()[begin + i] =
            row_dot(left.const_data_ptr<scalar_t>() + i * size, right.const_data_ptr<scalar_t>() + i * size, size);
      }
    });
  }
  check_finite_result(op, out, inputs, output_grads);
  return out;
}

// One task is one direction and one block of rows: their product with the direction stays in the thread's cache and is
// contracted at once, so neither [n, o, d] nor [q o, n] is ever formed.
at::Tensor dots_cpu(const at::Tensor& inputs, const at::Tensor& output_grads, const at::Tensor& directions) {
  check_dots(inputs, output_grads, directions);
  const int64_t n = inputs.size(0), t = inputs.size(1), q = directions.size(0);
  auto a = inputs.contiguous(), u = output_grads.contiguous();
  auto v = directions.transpose(1, 2);  // [q, d, o]
  if (a.size(2) < u.size(2)) {          // keep the narrower side in the cache
    std::swap(a, u);
    v = directions;
  }
  const int64_t wide = a.size(2), narrow = u.size(2);
  const int64_t block = std::max<int64_t>(1, 256 / t), blocks = (n + block - 1) / block;
  auto out = at::empty({q, n}, a.options());
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), q * blocks);
  const auto scratch = at::empty({threads, block * t, narrow}, a.options());
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // the dispatcher's state is per thread: no autograd in here
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t task = q * blocks * thread / threads; task < q * blocks * (thread + 1) / threads; ++task) {
        const int64_t direction = task / blocks, begin = task % blocks * block, end = std::min(n, begin + block);
        const int64_t rows = (end - begin) * t;
        auto product = scratch[thread].narrow(0, 0, rows);
        at::mm_out(product, a.slice(0, begin, end).view({rows, wide}), v[direction]);
        AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "per_sample_grad_dots", [&] {
          const auto* p = product.const_data_ptr<scalar_t>();
          const auto* g = u.const_data_ptr<scalar_t>() + begin * t * narrow;
          auto* to = out.mutable_data_ptr<scalar_t>() + direction * n;
          for (int64_t i = begin; i < end; ++i, p += t * narrow, g += t * narrow) to[i] = row_dot(p, g, t * narrow);
        });
      }
    }
  });
  check_finite_result("per_sample_grad.dots", out, inputs, output_grads);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastif, CPU, m) {
  m.impl("per_sample_grad_accumulate", accumulate_cpu);
  m.impl("per_sample_grad_sq_norms", sq_norms_cpu);
  m.impl("per_sample_grad_dots", dots_cpu);
}

}  // namespace fastif
