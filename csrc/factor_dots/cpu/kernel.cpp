#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
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
  int16_t* to = packed.panels.get() + number * packed.each + first * pairs * 2 * kLanes + (vector - first) * 2 * kLanes;
  float* const steps = packed.steps.get() + (number * packed.vectors + vector) * kLanes;
  const Scratch<int16_t> rows(kLanes * 2 * pairs);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t r = vector * kLanes + lane, count = r < packed.e ? packed.k : 0;
    const float* const from = query + r * packed.k;
    int16_t* const row = rows.get() + lane * 2 * pairs;
    steps[lane] = count ? std::max(largest(from, count) / 32767, std::numeric_limits<float>::min()) : 0;
    quantize(from, count, steps[lane], row);
    std::fill(row + count, row + 2 * pairs, int16_t{0});
  }
  for (int64_t p = 0; p < pairs; ++p, to += 2 * across) {
    for (int64_t lane = 0; lane < kLanes; ++lane)
      std::memcpy(to + 2 * lane, rows.get() + (lane * pairs + p) * 2, 2 * sizeof(int16_t));
  }
}

// Products of some examples, out[q, n] += ..., with kRows factors at a time: these are widened once for all queries.
struct Work {
  TileKernel kernel;
  const Packed& packed;      // what the longs are multiplied with
  const Packed* projection;  // what the shorts are multiplied with first; null: they are taken as they are
  const int8_t *longs, *shorts;
  const float* scale;  // null: 1
  const int32_t* ranks;
  int64_t q, n;
  float* out;

  // Those of examples [begin, end), whose first factor is `first`.
  void run(int64_t begin, int64_t end, int64_t first) const {
    const int64_t length = 2 * packed.pairs, short_length = projection ? 2 * projection->pairs : 0;
    const int64_t width = packed.width();
    const Scratch<int16_t> wide(kRows * length), short_wide(kRows * short_length);
    const Scratch<float> beside(kRows * width);
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
      // Rows past `count` are multiplied too, and what comes of them is not read; they are written for the sanitizers.
      widen(longs + first * packed.k, count, packed.k, length, wide.get());
      std::fill(wide.get() + count * length, wide.get() + kRows * length, int16_t{0});
      if (projection) {
        widen(shorts + first * projection->k, count, projection->k, short_length, short_wide.get());
        std::fill(short_wide.get() + count * short_length, short_wide.get() + kRows * short_length, int16_t{0});
      } else {
        widen(shorts + first * packed.e, count, packed.e, width, beside.get());
        std::fill(beside.get() + count * width, beside.get() + kRows * width, 0.0f);
        if (scale)
          scale_rows(scale + first, count, width, beside.get());  // first, so that nothing overflows on the way
      }
      for (int64_t row = 0; row < q; ++row) {
        if (projection) {
          std::fill(beside.get(), beside.get() + kRows * width, 0.0f);
          multiply(*projection, row, short_wide.get(), nullptr, beside.get(), nullptr);
          if (scale) scale_rows(scale + first, count, width, beside.get());
        }
        alignas(64) float sums[kRows * kLanes] = {};
        multiply(packed, row, wide.get(), beside.get(), nullptr, sums);
        add_lanes(sums, count, owners, out + row * n);
      }
    }
  }

 private:
  void multiply(const Packed& by, int64_t row, const int16_t* wide, const float* beside, float* products,
                float* sums) const {
    for (int64_t v = 0; v < by.vectors; v += kVectors) {
      const int vectors = by.vectors_from(v);
      const int64_t lane = v * kLanes;
      const int16_t* const panel = by.panels.get() + row * by.each + lane * by.pairs * 2;
      for (int64_t pair = 0; pair < by.pairs; pair += kChunk) {
        kernel({.longs = wide + 2 * pair,
                .long_stride = 2 * by.pairs,
                .panel = panel + pair * vectors * 2 * kLanes,
                .pairs = std::min(kChunk, by.pairs - pair),
                .vectors = vectors,
                .steps = by.steps.get() + row * by.width() + lane,
                .shorts = beside ? beside + lane : nullptr,
                .short_stride = by.width(),
                .products = products ? products + lane : nullptr,
                .sums = sums});
      }
    }
  }
};

// Packs matrices [q, e, k].
void pack_all(const Packed& packed, const Tensor& rows, int64_t q) {
  const float* const from = rows.const_data_ptr<float>();
  Progress::for_each(q * packed.vectors, [&](int64_t task) {
    const int64_t number = task / packed.vectors;
    pack(packed, from + number * packed.e * packed.k, number, task % packed.vectors);
  });
}

// Operations of a factor's product with rows [e, k], padding included: one on pairs is as good as two others.
int64_t operations(int64_t e, int64_t k) {
  constexpr int64_t afterwards = 4;  // pairs that take as long as what comes after the sum over them
  return (e + kLanes - 1) / kLanes * ((k + 1) / 2 + afterwards);
}

Tensor factor_dots_cpu(const Tensor& left, const Tensor& right, const std::optional<Tensor>& scale, const Tensor& ranks,
                       const Tensor& queries, const std::optional<Tensor>& along) {
  check_factor_dots(left, right, scale, ranks, queries, along);
  const int64_t q = queries.size(0), n = ranks.size(0), o = left.size(1), d = right.size(1);
  const auto out = empty({q, n}, queries);
  if (q == 0 || n == 0) return out;
  const TileKernel kernel = tile_kernel();
  CHECK_VALUE(kernel, "factor_dots: FASTIF_FACTORS must be vnni, avx512, avx2 or generic, and what the processor has, ",
              "got ", std::getenv("FASTIF_FACTORS"));
  const int64_t r = queries.size(2);  // with `along`
  const bool turned = !along && operations(d, o) < operations(o, d);
  const auto given = readable(queries), columns = along || turned ? given.transpose(1, 2).contiguous() : given;
  const auto longs = readable(turned ? left : right), shorts = readable(turned ? right : left);
  const auto factor = scale ? std::optional(readable(*scale)) : std::nullopt;
  const auto own = readable(ranks);
  const Packed packed(q, along ? r : turned ? d : o, turned ? o : d);
  const auto projection = along ? std::make_unique<Packed>(q, r, o) : nullptr;
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
  pack_all(packed, along ? readable(*along) : columns, q);
  if (projection) pack_all(*projection, columns, q);
  const Work work{.kernel = kernel,
                  .packed = packed,
                  .projection = projection.get(),
                  .longs = longs.const_data_ptr<int8_t>(),
                  .shorts = shorts.const_data_ptr<int8_t>(),
                  .scale = factor ? factor->const_data_ptr<float>() : nullptr,
                  .ranks = rank,
                  .q = q,
                  .n = n,
                  .out = out.mutable_data_ptr<float>()};
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
