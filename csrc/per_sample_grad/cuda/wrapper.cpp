#include <torch/csrc/stable/library.h>

#include <numeric>
#include <string>
#include <type_traits>

#include "../../common/cuda.h"
#include "../per_sample_grad.h"
#include "launch.h"

namespace fastif {
namespace {

Tensor square(const Tensor& x) { return call("aten::square", "", x); }

// No number crosses the stable ABI as an argument of aten::add; its subtraction has a way in of its own.
Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1); }

// out = op(a, b), in the types that they have: autocast knows no products with `out`.
void product_into(const char* op, const Tensor& out, const Tensor& a, const Tensor& b) { call(op, "out", a, b, out); }

template <typename T>
Tensor accumulate(const Tensor& inputs, const Tensor& output_grads, const Tensor& weights, const Tensor& order,
                  const Tensor& offsets, int64_t num_groups) {
  const int64_t n = inputs.size(0), t = inputs.size(1), d = inputs.size(2), o = output_grads.size(2);
  const int64_t splits = per_sample_grad_accumulate_splits(n, t, d, o, num_groups, sizeof(T));
  auto parts = empty({splits, num_groups, o, d}, inputs);
  per_sample_grad_accumulate_launch<T>(inputs.const_data_ptr<T>(), output_grads.const_data_ptr<T>(),
                                       weights.const_data_ptr<T>(), order.const_data_ptr<int64_t>(),
                                       offsets.const_data_ptr<int64_t>(), t, d, o, num_groups, splits,
                                       parts.mutable_data_ptr<T>(), stream_of(inputs));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return splits == 1 ? parts[0] : sum(parts, {0});
}

constexpr int64_t kBlockBytes = 256 << 20;  // what the intermediate results of one block of examples may take

// Calls work(begin, end) on blocks of examples each of which takes `entries` of the result's type; on all at once for
// 0.
template <typename Work>
void for_blocks(const Tensor& inputs, int64_t entries, Work work) {
  const int64_t n = inputs.size(0), bytes = entries * (result_type(inputs) == kDouble ? 8 : 4);
  const int64_t block = entries == 0 ? n : std::max<int64_t>(1, kBlockBytes / bytes);
  for (int64_t begin = 0; begin < n; begin += block) work(begin, std::min(n, begin + block));
}

// Entries that an example takes where its inputs have to be copied.
int64_t copied(const Tensor& inputs, const Tensor& output_grads, bool always = false) {
  return always || has_16_bits(inputs) ? inputs.size(1) * (inputs.size(2) + output_grads.size(2)) : 0;
}

Tensor accumulate_by_group(const Tensor& a, const Tensor& u, const Tensor& weights, const Tensor& groups,
                           int64_t num_groups) {
  // Stable, so that the examples of a group keep their order.
  const auto [sorted, order] = call_for_two("aten::sort", "stable", groups, std::optional(true), int64_t{0}, false);
  const auto bounds = empty({num_groups + 1}, kLong);
  std::iota(bounds.mutable_data_ptr<int64_t>(), bounds.mutable_data_ptr<int64_t>() + num_groups + 1, 0);
  const auto offsets = call("aten::searchsorted", "Tensor", sorted, bounds.to(groups.device()), false, false,
                            std::optional<std::string>(), std::optional<Tensor>())
                           .contiguous();
  const auto w = weights.contiguous(), o = order.contiguous();
  return a.scalar_type() == kFloat ? accumulate<float>(a, u, w, o, offsets, num_groups)
                                   : accumulate<double>(a, u, w, o, offsets, num_groups);
}

Tensor accumulate_cuda(const Tensor& inputs,        // [n, t, d]
                       const Tensor& output_grads,  // [n, t, o]
                       const Tensor& weights,       // [n]
                       const Tensor& groups,        // [n]
                       int64_t num_groups) {
  check_accumulate(inputs, output_grads, weights, groups, num_groups);
  const OnDeviceOf guard(inputs);
  Tensor out;
  for_blocks(inputs, copied(inputs, output_grads), [&](int64_t begin, int64_t end) {
    const auto part = accumulate_by_group(block_of(inputs, begin, end), block_of(output_grads, begin, end),
                                          weights.slice(0, begin, end), groups.slice(0, begin, end), num_groups);
    out = begin == 0 ? part : add(out, part);
  });
  check_finite_result("per_sample_grad.accumulate", out, inputs, output_grads);
  return out;
}

template <typename T>
Tensor accumulate_squares(const Tensor& a, const Tensor& u, const Tensor& weights) {
  const int64_t n = a.size(0), t = a.size(1), d = a.size(2), o = u.size(2);
  const int64_t splits = per_sample_grad_accumulate_squares_splits(n, t, d, o, sizeof(T));
  auto parts = empty({splits, o, d}, a);
  per_sample_grad_accumulate_squares_launch<T>(a.const_data_ptr<T>(), u.const_data_ptr<T>(),
                                               weights.const_data_ptr<T>(), n, t, d, o, splits,
                                               parts.mutable_data_ptr<T>(), stream_of(a));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return splits == 1 ? parts[0] : sum(parts, {0});
}

Tensor accumulate_squares_cuda(const Tensor& inputs,        // [n, t, d]
                               const Tensor& output_grads,  // [n, t, o]
                               const Tensor& weights) {     // [n]
  check_accumulate_squares(inputs, output_grads, weights);
  const OnDeviceOf guard(inputs);
  const bool single = inputs.size(1) == 1;
  Tensor out;
  for_blocks(inputs, copied(inputs, output_grads, /*always=*/single), [&](int64_t begin, int64_t end) {
    const auto a = block_of(inputs, begin, end), u = block_of(output_grads, begin, end);
    const auto w = weights.slice(0, begin, end).contiguous();
    Tensor part;
    if (single) {  // (g_i)_od^2 = u_io^2 a_id^2: gradients of the squares
      const auto all = zeros({end - begin}, kLong, inputs.device());
      part = accumulate_by_group(square(a), square(u), w, all, 1)[0];
    } else {
      part = w.scalar_type() == kFloat ? accumulate_squares<float>(a, u, w) : accumulate_squares<double>(a, u, w);
    }
    out = begin == 0 ? part : add(out, part);
  });
  check_finite_result("per_sample_grad.accumulate_squares", out, inputs, output_grads);
  return out;
}

template <typename T>
Tensor sq_norms(const Tensor& a, const Tensor& u, const std::optional<Tensor>& scale) {
  const int64_t n = a.size(0), t = a.size(1), d = a.size(2), o = u.size(2);
  const int64_t parts = per_sample_grad_sq_norms_parts(t, d, o, scale.has_value(), sizeof(T));
  auto partial = empty({n, parts}, kDouble, a.device());
  per_sample_grad_sq_norms_launch<T>(a.const_data_ptr<T>(), u.const_data_ptr<T>(),
                                     scale ? scale->const_data_ptr<T>() : nullptr, n, t, d, o,
                                     partial.mutable_data_ptr<double>(), stream_of(a));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return sum(partial, {1}).to(a.scalar_type());
}

template <typename T>
Tensor dots(const Tensor& a, const Tensor& u, const Tensor& directions) {
  const int64_t n = a.size(0), t = a.size(1), d = a.size(2), o = u.size(2), q = directions.size(0);
  auto out = empty({q, n}, a);
  per_sample_grad_dots_launch<T>(a.const_data_ptr<T>(), u.const_data_ptr<T>(), directions.const_data_ptr<T>(), n, t, d,
                                 o, q, out.mutable_data_ptr<T>(), stream_of(a));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor dots_by_position(const Tensor& a, const Tensor& u, const Tensor& directions) {
  return a.scalar_type() == kFloat ? dots<float>(a, u, directions) : dots<double>(a, u, directions);
}

Tensor sq_norms_cuda(const Tensor& inputs,                  // [n, t, d]
                     const Tensor& output_grads,            // [n, t, o]
                     const std::optional<Tensor>& scale) {  // [o, d]
  check_sq_norms(inputs, output_grads, scale);
  const OnDeviceOf guard(inputs);
  const bool single = scale && inputs.size(1) == 1;
  const auto r = scale ? std::optional(scale->contiguous()) : std::nullopt;
  auto out = empty({inputs.size(0)}, result_type(inputs), inputs.device());
  for_blocks(inputs, copied(inputs, output_grads, /*always=*/single), [&](int64_t begin, int64_t end) {
    const auto a = block_of(inputs, begin, end), u = block_of(output_grads, begin, end);
    auto to = out.slice(0, begin, end);
    if (single) {  // sum_od R_od u_o^2 a_d^2
      to.copy_(dots_by_position(square(a), square(u), r->view({1, r->size(0), r->size(1)}))[0]);
    } else {
      to.copy_(out.scalar_type() == kFloat ? sq_norms<float>(a, u, r) : sq_norms<double>(a, u, r));
    }
  });
  check_finite_result("per_sample_grad.sq_norms", out, inputs, output_grads);
  return out;
}

Tensor dots_cuda(const Tensor& inputs,        // [n, t, d]
                 const Tensor& output_grads,  // [n, t, o]
                 const Tensor& directions) {  // [q, o, d]
  check_dots(inputs, output_grads, directions);
  const OnDeviceOf guard(inputs);
  const int64_t n = inputs.size(0), t = inputs.size(1), od = directions.size(1) * directions.size(2);
  const int64_t q = directions.size(0);
  const auto v = directions.contiguous();
  auto out = empty({q, n}, directions);
  const bool by_gradient = q * t > q + t + 24;  // products for every entry of a gradient, as on the CPU
  for_blocks(inputs, by_gradient ? od : copied(inputs, output_grads), [&](int64_t begin, int64_t end) {
    const auto a = block_of(inputs, begin, end), u = block_of(output_grads, begin, end);
    if (by_gradient) {
      const auto gradients = empty({end - begin, u.size(2), a.size(2)}, a), products = empty({q, end - begin}, a);
      product_into("aten::bmm", gradients, u.transpose(1, 2), a);
      product_into("aten::mm", products, v.view({q, od}), gradients.view({-1, od}).t());
      out.slice(1, begin, end).copy_(products);
    } else {
      out.slice(1, begin, end).copy_(dots_by_position(a, u, v));
    }
  });
  check_finite_result("per_sample_grad.dots", out, inputs, output_grads);
  return out;
}

}  // namespace

static_assert(std::is_same_v<decltype(accumulate_cuda), AccumulateOp>);
static_assert(std::is_same_v<decltype(accumulate_squares_cuda), AccumulateSquaresOp>);
static_assert(std::is_same_v<decltype(sq_norms_cuda), SqNormsOp>);
static_assert(std::is_same_v<decltype(dots_cuda), DotsOp>);

STABLE_TORCH_LIBRARY_IMPL(fastif, CUDA, m) {
  m.impl("per_sample_grad_accumulate", TORCH_BOX(&accumulate_cuda));
  m.impl("per_sample_grad_accumulate_squares", TORCH_BOX(&accumulate_squares_cuda));
  m.impl("per_sample_grad_sq_norms", TORCH_BOX(&sq_norms_cuda));
  m.impl("per_sample_grad_dots", TORCH_BOX(&dots_cuda));
}

}  // namespace fastif
