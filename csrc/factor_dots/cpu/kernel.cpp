#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../../common/progress.h"
#include "../factor_dots.h"
#include "tiles.h"

namespace fastif {
namespace {

// Memory of one task, on a border of vectors, that nobody writes before it is used.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : memory_(static_cast<T*>(::operator new(std::max<int64_t>(1, count) * sizeof(T), std::align_val_t{64}))) {}
  T* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> memory_;
};

// Queries as the kernels read them. The rows [e, k] of each, of which a factor's `short` has e entries and its `long`
// has k, are integers times their steps.
struct Packed {
  int64_t e, k, vectors, pairs, each;  // each: entries of a query's panels
  Scratch<int16_t> panels;             // [q], panel after panel of up to kVectors vectors of lanes
  Scratch<float> steps;                // [q, vectors, kLanes]

  Packed(int64_t q, int64_t rows, int64_t columns)
      : e(rows),
        k(columns),
        vectors((rows + kLanes - 1) / kLanes),
        pairs((columns + 1) / 2),
        each(vectors * pairs * 2 * kLanes),
        panels(q * each),
        steps(q * vectors * kLanes) {}

  int64_t width() const { return vectors * kLanes; }
  int vectors_from(int64_t v) const { return static_cast<int>(std::min(kVectors, vectors - v)); }
};

// One vector of lanes of one query, from its rows [e, k].
void pack(const Packed& packed, const float* query, int64_t number, int64_t vector) {
  const int64_t first = vector / kVectors * kVectors, pairs = packed.pairs;  // of the panel
  const int64_t across = packed.vectors_from(first) * kLanes;                // lanes of the panel
  int16_t* const panel = packed.panels.get() + number * packed.each + first * pairs * 2 * kLanes;
  float* const steps = packed.steps.get() + (number * packed.vectors + vector) * kLanes;
  const Scratch<int16_t> row(2 * pairs);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t r = vector * kLanes + lane, count = r < packed.e ? packed.k : 0;
    const float* const from = query + r * packed.k;
    steps[lane] = count ? std::max(largest(from, count) / 32767, std::numeric_limits<float>::min()) : 0;
    quantize(from, count, steps[lane], row.get());
    std::fill(row.get() + count, row.get() + 2 * pairs, int16_t{0});
    int16_t* to = panel + 2 * ((vector - first) * kLanes + lane);
    for (int64_t p = 0; p < pairs; ++p, to += 2 * across) {
      to[0] = row.get()[2 * p];
      to[1] = row.get()[2 * p + 1];
    }
  }
}

// Products of some examples, out[q, n] += ..., with kRows factors at a time: these are widened once for all queries.
struct Work {
  TileKernel kernel;
  const Packed& packed;
  const int8_t *longs, *shorts;  // [F, k], [F, e]
  const float* scale;            // null: 1
  const int32_t* ranks;
  int64_t q, n;
  float* out;

  // Those of examples [begin, end), whose first factor is `first`.
  void run(int64_t begin, int64_t end, int64_t first) const {
    const Scratch<int16_t> wide(kRows * 2 * packed.pairs);
    const Scratch<float> scaled(kRows * packed.width());
    int64_t owners[kRows];
    for (int64_t row = 0; row < q; ++row) std::fill(out + row * n + begin, out + row * n + end, 0.0f);
    int64_t example = begin, left = ranks[begin];
    for (int64_t count = 0;; first += count) {
      for (count = 0; count < kRows; ++count, --left) {
        while (left == 0 && example < end) left = ++example < end ? ranks[example] : 0;
        if (example == end) break;
        owners[count] = example;
      }
      if (count == 0) return;
      widen(longs + first * packed.k, count, packed.k, 2 * packed.pairs, wide.get());
      widen(shorts + first * packed.e, count, packed.e, packed.width(), scale ? scale + first : nullptr, scaled.get());
      if (count < kRows) {  // what the kernels compute of these is not read; they are zero for the sanitizers
        std::fill(wide.get() + count * 2 * packed.pairs, wide.get() + kRows * 2 * packed.pairs, int16_t{0});
        std::fill(scaled.get() + count * packed.width(), scaled.get() + kRows * packed.width(), 0.0f);
      }
      for (int64_t row = 0; row < q; ++row) multiply(row, wide.get(), scaled.get(), owners, count);
    }
  }

 private:
  void multiply(int64_t row, const int16_t* wide, const float* scaled, const int64_t* owners, int64_t count) const {
    alignas(64) float sums[kRows * kLanes] = {};
    for (int64_t v = 0; v < packed.vectors; v += kVectors) {
      const int vectors = packed.vectors_from(v);
      const int16_t* const panel = packed.panels.get() + row * packed.each + v * packed.pairs * 2 * kLanes;
      for (int64_t pair = 0; pair < packed.pairs; pair += kChunk) {
        kernel({wide + 2 * pair, 2 * packed.pairs, scaled + v * kLanes, packed.width(),
                panel + pair * vectors * 2 * kLanes, std::min(kChunk, packed.pairs - pair), vectors,
                packed.steps.get() + (row * packed.vectors + v) * kLanes, sums});
      }
    }
    add_lanes(sums, count, owners, out + row * n);
  }
};

// Operations of a factor's product with rows [e, k], padding included: one on pairs is as good as two others.
int64_t operations(int64_t e, int64_t k) {
  constexpr int64_t afterwards = 4;  // pairs that take as long as what comes after the sum over them
  return (e + kLanes - 1) / kLanes * ((k + 1) / 2 + afterwards);
}

Tensor factor_dots_cpu(const Tensor& left, const Tensor& right, const std::optional<Tensor>& scale, const Tensor& ranks,
                       const Tensor& queries) {
  check_factor_dots(left, right, scale, ranks, queries);
  const int64_t q = queries.size(0), n = ranks.size(0), o = left.size(1), d = right.size(1);
  const auto out = empty({q, n}, queries);
  if (q == 0 || n == 0) return out;
  const TileKernel kernel = tile_kernel();
  CHECK_VALUE(kernel, "factor_dots: FASTIF_FACTORS must be vnni, avx512, avx2 or generic, and what the processor has");
  const bool turned = operations(d, o) < operations(o, d);
  const auto given = readable(queries), rows = turned ? given.transpose(1, 2).contiguous() : given;
  const auto longs = readable(turned ? left : right), shorts = readable(turned ? right : left);
  const auto factor = scale ? std::optional(readable(*scale)) : std::nullopt;
  const auto own = readable(ranks);
  const Packed packed(q, turned ? d : o, turned ? o : d);
  // Each has some hundred factors, the last fewer, or many examples without.
  constexpr int64_t kFactors = 8 * kRows, kExamples = 1 << 14;
  struct Part {
    int64_t begin, first;
  };
  const int32_t* const rank = own.const_data_ptr<int32_t>();
  std::vector<Part> parts{{0, 0}};
  for (int64_t i = 0, factors = 0; i < n; ++i) {
    if (factors - parts.back().first >= kFactors || i - parts.back().begin >= kExamples) parts.push_back({i, factors});
    factors += rank[i];
  }
  const auto tasks = static_cast<int64_t>(parts.size());
  parts.push_back({n, 0});
  Progress run(tasks);
  Progress::for_each(q * packed.vectors, [&](int64_t task) {
    const int64_t number = task / packed.vectors;
    pack(packed, rows.const_data_ptr<float>() + number * o * d, number, task % packed.vectors);
  });
  const Work work{kernel,
                  packed,
                  longs.const_data_ptr<int8_t>(),
                  shorts.const_data_ptr<int8_t>(),
                  factor ? factor->const_data_ptr<float>() : nullptr,
                  rank,
                  q,
                  n,
                  out.mutable_data_ptr<float>()};
  Progress::for_each(tasks, [&](int64_t task) {
    work.run(parts[task].begin, parts[task + 1].begin, parts[task].first);
    Progress::advance();
  });
  check_factor_dots_result(out);
  return out;
}

}  // namespace

static_assert(std::is_same_v<decltype(factor_dots_cpu), FactorDotsOp>);

STABLE_TORCH_LIBRARY_IMPL(fastif, CPU, m) { m.impl("factor_dots", TORCH_BOX(&factor_dots_cpu)); }

}  // namespace fastif
