#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "../../common/products.h"
#include "../../common/simd.h"
#include "../../common/tasks.h"
#include "../per_sample_grad.h"
#include "tiles.h"

namespace fastif {
namespace {

constexpr int64_t kScratchBytes = 8 << 20;  // what one chunk of intermediate results may take

int64_t rows_in_scratch(int64_t bytes_per_row) { return std::max<int64_t>(1, kScratchBytes / bytes_per_row); }

// to[i] += from[i], i < count.
template <typename T>
void add_to(T* to, const T* from, int64_t count) {
  parallel_for(0, count, 32768, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] += from[i];
  });
}

// sums[0] += sums[1], sums[2], ... in turn; `sums` is contiguous.
void add_parts(const Tensor& out, const Tensor& sums, int64_t from) {
  with_type_of(out, [&]<typename T>(T) {
    for (int64_t part = from; part < sums.size(0); ++part)
      add_to(out.mutable_data_ptr<T>(), sums.const_data_ptr<T>() + part * out.numel(), out.numel());
  });
}

// out [o, d] += u^T a, u [rows, o], a [rows, d]. One call of a matrix product would cut the sum by the number of
// threads.
void add_product(const Tensor& out, const Tensor& u, const Tensor& a) {
  constexpr int64_t kSide = 128, kRows = 512, kTasks = 32;
  const int64_t rows = u.size(0), o = u.size(1), d = a.size(1);
  const int64_t o_cuts = (o + kSide - 1) / kSide, d_cuts = (d + kSide - 1) / kSide, regions = o_cuts * d_cuts;
  const int64_t slabs = std::clamp<int64_t>(kTasks / regions, 1, std::max<int64_t>(1, rows / kRows));
  const auto sums = slabs == 1 ? out.view({1, o, d}) : zeros({slabs, o, d}, out);
  for_tasks(slabs * regions, [&](int64_t task, int64_t) {
    const int64_t slab = task / regions, i = task % regions / d_cuts, j = task % d_cuts;
    const auto block = [&](const Tensor& x, int64_t cut, int64_t cuts) {
      return x.slice(0, rows * slab / slabs, rows * (slab + 1) / slabs)
          .slice(1, x.size(1) * cut / cuts, x.size(1) * (cut + 1) / cuts);
    };
    const auto sum =
        sums[slab].slice(0, o * i / o_cuts, o * (i + 1) / o_cuts).slice(1, d * j / d_cuts, d * (j + 1) / d_cuts);
    add_mm(sum, block(u, i, o_cuts).t(), block(a, j, d_cuts));
  });
  if (slabs > 1) add_parts(out, sums, 0);
}

// The examples by group, those of a group in their order.
Tensor sort_by_group(const Tensor& groups, int64_t num_groups) {
  const int64_t n = groups.size(0);
  const auto contiguous = groups.contiguous();
  const int64_t* const group = contiguous.const_data_ptr<int64_t>();
  std::vector<int64_t> next(num_groups + 1);  // place of the next example of each group
  for (int64_t i = 0; i < n; ++i) ++next[group[i] + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  const auto order = empty({n}, kLong);
  int64_t* const to = order.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) to[next[group[i]]++] = i;
  return order;
}

// to [members, t, width], contiguous: the members of x [n, t, width], each times its weight or 1.
template <typename T>
void gather(const Tensor& to, const Tensor& x, const Tensor& members, const T* weights) {
  const bool copied = has_16_bits(x);
  const auto from = copied ? call("aten::index_select", "", x, int64_t{0}, members).to(to.scalar_type()) : x;
  const int64_t t = x.size(1), width = x.size(2), count = members.size(0);
  const int64_t by_example = from.stride(0), by_position = from.stride(1), step = from.stride(2);
  const int64_t* const member = members.const_data_ptr<int64_t>();
  const T* const source = from.const_data_ptr<T>();
  T* const rows = to.mutable_data_ptr<T>();
  parallel_for(0, count, std::max<int64_t>(1, 32768 / (t * width)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T weight = weights ? weights[member[i]] : T(1);
      for (int64_t s = 0; s < t; ++s) {
        const T* const row = source + (copied ? i : member[i]) * by_example + s * by_position;
        T* const out = rows + (i * t + s) * width;
        if (step == 1) {
          for (int64_t j = 0; j < width; ++j) out[j] = row[j] * weight;
        } else {
          for (int64_t j = 0; j < width; ++j) out[j] = row[j * step] * weight;
        }
      }
    }
  });
}

Tensor accumulate_cpu(const Tensor& inputs, const Tensor& output_grads, const Tensor& weights, const Tensor& groups,
                      int64_t num_groups) {
  check_accumulate(inputs, output_grads, weights, groups, num_groups);
  const int64_t n = inputs.size(0), t = inputs.size(1), d = inputs.size(2), o = output_grads.size(2);
  const auto out = zeros({num_groups, o, d}, weights);
  const auto order = sort_by_group(groups, num_groups), own_weights = weights.contiguous();
  const auto in_order = groups.contiguous();
  const auto group = [&](int64_t i) { return in_order.const_data_ptr<int64_t>()[order.const_data_ptr<int64_t>()[i]]; };
  const int64_t chunk = std::min(n, rows_in_scratch(t * (o + d) * static_cast<int64_t>(weights.element_size())));
  // Into the same scratch every time: fresh memory for every chunk costs as much as the product.
  const auto scratch_a = empty({chunk, t, d}, weights), scratch_u = empty({chunk, t, o}, weights);
  for (int64_t begin = 0, end = 0; begin < n; begin = end) {
    for (end = begin + 1; end < n && end - begin < chunk && group(end) == group(begin);) ++end;
    const auto members = order.slice(0, begin, end);
    const auto a = scratch_a.slice(0, 0, end - begin), u = scratch_u.slice(0, 0, end - begin);
    with_type_of(out, [&]<typename T>(T) {
      gather<T>(a, inputs, members, nullptr);
      gather<T>(u, output_grads, members, own_weights.const_data_ptr<T>());
    });
    add_product(out[group(begin)], u.view({-1, o}), a.view({-1, d}));
  }
  check_finite_result("per_sample_grad.accumulate", out, inputs, output_grads);
  return out;
}

// The examples that are worked on at a time where inputs have to be copied, because they are wanted in other bits; else
// all.
int64_t examples_at_a_time(const Tensor& inputs, const Tensor& output_grads) {
  const int64_t bytes = inputs.size(1) * (inputs.size(2) + output_grads.size(2)) * sizeof(float);
  return has_16_bits(inputs) ? rows_in_scratch(bytes) : inputs.size(0);
}

// to [n, width] = x^2 [n, ..., width], each row times its weight or 1. Both are contiguous.
template <typename T>
void square_into(const Tensor& to, const Tensor& x, const T* weights) {
  const int64_t width = to.size(1);
  const T* const from = x.const_data_ptr<T>();
  T* const out = to.mutable_data_ptr<T>();
  parallel_for(0, to.size(0), std::max<int64_t>(1, 32768 / width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T weight = weights ? weights[i] : T(1);
      for (int64_t j = i * width; j < (i + 1) * width; ++j) out[j] = from[j] * from[j] * weight;
    }
  });
}

Tensor accumulate_squares_cpu(const Tensor& inputs, const Tensor& output_grads, const Tensor& weights) {
  check_accumulate_squares(inputs, output_grads, weights);
  const int64_t n = inputs.size(0), t = inputs.size(1), d = inputs.size(2), o = output_grads.size(2);
  const auto out = zeros({o, d}, weights);
  const int64_t chunk = t == 1 ? rows_in_scratch((o + d) * static_cast<int64_t>(out.element_size()))
                               : examples_at_a_time(inputs, output_grads);
  const int64_t squares = t == 1 ? std::min(n, chunk) : 0;  // the same memory every time, as in accumulate
  const auto scratch_a = empty({squares, d}, out), scratch_u = empty({squares, o}, out);
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const int64_t end = std::min(n, begin + chunk);
    const auto a = block_of(inputs, begin, end), u = block_of(output_grads, begin, end);
    const auto w = weights.slice(0, begin, end).contiguous();
    if (t == 1) {  // (g_i)_od^2 = u_io^2 a_id^2
      const auto a2 = scratch_a.slice(0, 0, end - begin), u2 = scratch_u.slice(0, 0, end - begin);
      with_type_of(out, [&]<typename T>(T) {
        square_into<T>(a2, a, nullptr);
        square_into<T>(u2, u, w.const_data_ptr<T>());
      });
      add_product(out, u2, a2);
    } else {
      add_squares_by_tiles(a, u, w, out);
    }
  }
  check_finite_result("per_sample_grad.accumulate_squares", out, inputs, output_grads);
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
T sq_norm_by_pairs(const T* a, const T* u, int64_t t, int64_t d, int64_t o) {
  T sum = 0;
  for (int64_t s = 0; s < t; ++s) {
    sum += row_dot(a + s * d, a + s * d, d) * row_dot(u + s * o, u + s * o, o);
    for (int64_t r = 0; r < s; ++r) sum += 2 * row_dot(a + s * d, a + r * d, d) * row_dot(u + s * o, u + r * o, o);
  }
  return sum;
}

Tensor sq_norms_cpu(const Tensor& inputs, const Tensor& output_grads, const std::optional<Tensor>& scale) {
  constexpr auto op = "per_sample_grad.sq_norms";
  check_sq_norms(inputs, output_grads, scale);
  const int64_t n = inputs.size(0), t = inputs.size(1), d = inputs.size(2), o = output_grads.size(2);
  const auto out = empty({n}, result_type(inputs));
  const bool pairs = !scale && t <= 4;  // matrix products of that size cost more than they save
  // Operations of the two routes, over t; batched products of t x t are the slower the smaller.
  const bool by_gram = !scale && (t + 32) * (o + d) <= o * d;
  if (t > 1 && !pairs && !by_gram) {
    const int64_t chunk = examples_at_a_time(inputs, output_grads);
    for (int64_t begin = 0; begin < n; begin += chunk) {
      const int64_t end = std::min(n, begin + chunk);
      sq_norms_by_tiles(block_of(inputs, begin, end), block_of(output_grads, begin, end), scale,
                        out.slice(0, begin, end));
    }
    check_finite_result(op, out, inputs, output_grads);
    return out;
  }
  constexpr int64_t kTaskEntries = 1 << 18, kTasks = 64;  // of intermediate results: the second-level cache's
  const int64_t entries = pairs || scale ? t * (o + d) : 2 * t * t;
  const int64_t block = std::clamp<int64_t>(kTaskEntries / entries, 1, (n + kTasks - 1) / kTasks);
  for_tasks((n + block - 1) / block, [&](int64_t task, int64_t) {
    const int64_t begin = task * block, end = std::min(n, begin + block);
    const auto a = block_of(inputs, begin, end), u = block_of(output_grads, begin, end);
    with_type_of(out, [&]<typename T>(T) {
      auto left = a, right = u;
      if (scale) {  // t = 1: sum_od R_od u_o^2 a_d^2
        const auto u2 = empty({end - begin, o}, out);
        square_into<T>(u2, u, nullptr);
        left = mm(u2, *scale);
        right = empty({end - begin, d}, out);
        square_into<T>(right, a, nullptr);
      } else if (!pairs) {
        left = bmm(a, a.transpose(1, 2));
        right = bmm(u, u.transpose(1, 2));
      }
      const T *l = left.const_data_ptr<T>(), *r = right.const_data_ptr<T>();
      T* const to = out.mutable_data_ptr<T>();
      const int64_t size = left.numel() / (end - begin);
      for (int64_t i = begin; i < end; ++i, l += size, r += right.numel() / (end - begin)) {
        to[i] = pairs ? sq_norm_by_pairs(l, r, t, d, o) : row_dot(l, r, size);
      }
    });
  });
  check_finite_result(op, out, inputs, output_grads);
  return out;
}

// q t products for every entry of a gradient. One task is one direction and one block of rows: their product with the
// direction stays in the thread's cache and is contracted at once, so neither [n, o, d] nor [q o, n] is ever formed.
void dots_by_position(const Tensor& inputs, const Tensor& output_grads, const Tensor& directions, const Tensor& out) {
  const int64_t n = inputs.size(0), t = inputs.size(1), q = directions.size(0);
  auto a = inputs, u = output_grads;
  auto v = directions.transpose(1, 2);  // [q, d, o]
  if (a.size(2) < u.size(2)) {          // keep the narrower side in the cache
    std::swap(a, u);
    v = directions;
  }
  const int64_t wide = a.size(2), narrow = u.size(2);
  const int64_t block = std::max<int64_t>(1, 256 / t), blocks = (n + block - 1) / block;
  const int64_t threads = std::min<int64_t>(num_threads(), q * blocks);
  const auto scratch = empty({threads, block * t, narrow}, a);
  parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const OneThread one_thread;
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t task = q * blocks * thread / threads; task < q * blocks * (thread + 1) / threads; ++task) {
        const int64_t direction = task / blocks, begin = task % blocks * block, end = std::min(n, begin + block);
        const int64_t rows = (end - begin) * t;
        const auto product = scratch[thread].slice(0, 0, rows);
        mm_into(product, a.slice(0, begin, end).view({rows, wide}), v[direction]);
        with_type_of(a, [&]<typename T>(T) {
          const T* p = product.const_data_ptr<T>();
          const T* g = u.const_data_ptr<T>() + begin * t * narrow;
          T* const to = out.mutable_data_ptr<T>() + direction * out.stride(0);
          for (int64_t i = begin; i < end; ++i, p += t * narrow, g += t * narrow) to[i] = row_dot(p, g, t * narrow);
        });
      }
    }
  });
}

// t + q products for every entry of a gradient: a slice of 64 examples' gradients is formed, at most 4 MiB or 16 rows
// of each, and multiplied with that slice of all directions. One task is one block of examples and, where blocks are
// few, one of `parts` shares of the slices, whose sums are added at the end.
Tensor dots_by_gradient(const Tensor& inputs, const Tensor& output_grads, const Tensor& directions) {
  constexpr int64_t kExamples = 64, kEntries = 1 << 20, kTasks = 32;
  const int64_t n = inputs.size(0), d = inputs.size(2), o = output_grads.size(2), q = directions.size(0);
  const int64_t rows = std::clamp<int64_t>(kEntries / (kExamples * d), std::min<int64_t>(o, 16), o);
  const int64_t slices = (o + rows - 1) / rows, blocks = (n + kExamples - 1) / kExamples;
  const int64_t parts = std::clamp<int64_t>(kTasks / blocks, 1, slices), tasks = blocks * parts;
  const auto v = directions.contiguous().view({q, o * d});
  const auto sums = zeros({parts, q, n}, v);
  const auto scratch = empty({threads_for(tasks), kExamples * rows * d}, v);
  for_tasks(tasks, [&](int64_t task, int64_t thread) {
    const int64_t part = task % parts, begin = task / parts * kExamples, end = std::min(n, begin + kExamples);
    const auto a = block_of(inputs, begin, end), u = block_of(output_grads, begin, end);
    const auto sum = sums[part].slice(1, begin, end);
    for (int64_t s = slices * part / parts; s < slices * (part + 1) / parts; ++s) {
      const int64_t row = s * rows, count = std::min(rows, o - row);
      const auto gradients = scratch[thread].slice(0, 0, (end - begin) * count * d).view({end - begin, count, d});
      bmm_into(gradients, u.narrow(2, row, count).transpose(1, 2), a);
      add_mm(sum, v.narrow(1, row * d, count * d), gradients.view({end - begin, count * d}).t());
    }
  });
  add_parts(sums[0], sums, 1);
  return sums[0];
}

Tensor dots_cpu(const Tensor& inputs, const Tensor& output_grads, const Tensor& directions) {
  check_dots(inputs, output_grads, directions);
  const int64_t n = inputs.size(0), t = inputs.size(1), q = directions.size(0);
  Tensor out;
  if (q * t > q + t + 24) {  // what gradients cost on their way to memory and back counts as 24 products
    out = dots_by_gradient(inputs, output_grads, directions);
  } else {
    out = empty({q, n}, directions);
    const int64_t chunk = examples_at_a_time(inputs, output_grads);
    for (int64_t begin = 0; begin < n; begin += chunk) {
      const int64_t end = std::min(n, begin + chunk);
      dots_by_position(block_of(inputs, begin, end), block_of(output_grads, begin, end), directions,
                       out.slice(1, begin, end));
    }
  }
  check_finite_result("per_sample_grad.dots", out, inputs, output_grads);
  return out;
}

}  // namespace

static_assert(std::is_same_v<decltype(accumulate_cpu), AccumulateOp>);
static_assert(std::is_same_v<decltype(accumulate_squares_cpu), AccumulateSquaresOp>);
static_assert(std::is_same_v<decltype(sq_norms_cpu), SqNormsOp>);
static_assert(std::is_same_v<decltype(dots_cpu), DotsOp>);

STABLE_TORCH_LIBRARY_IMPL(fastif, CPU, m) {
  m.impl("per_sample_grad_accumulate", TORCH_BOX(&accumulate_cpu));
  m.impl("per_sample_grad_accumulate_squares", TORCH_BOX(&accumulate_squares_cpu));
  m.impl("per_sample_grad_sq_norms", TORCH_BOX(&sq_norms_cpu));
  m.impl("per_sample_grad_dots", TORCH_BOX(&dots_cpu));
}

}  // namespace fastif
