#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "../common/simd.h"
#include "farthest_first.h"
#include "farthest_first_lazy.h"
#include "farthest_first_rows.h"

namespace fastif {
namespace {

// One read of rows [begin, end): distance to the new centre, minimum, nearest pick, and the farthest row not yet
// picked.
template <typename T>
__attribute__((always_inline)) inline Farthest visit(const T* points, int64_t d, const double* centre, int64_t pick,
                                                     int64_t begin, int64_t end, const bool* picked, double* sq_dists,
                                                     int64_t* nearest) {
  Farthest best;
  for (int64_t i = begin; i < end; ++i) {
    const double s = sq_dist(points + i * d, centre, d);
    if (s < sq_dists[i]) {
      sq_dists[i] = s;
      nearest[i] = pick;
    }
    if (!picked[i]) best.offer(sq_dists[i], i);
  }
  return best;
}

FASTIF_CLONES Farthest visit_f32(const float* points, int64_t d, const double* centre, int64_t pick, int64_t begin,
                                 int64_t end, const bool* picked, double* sq_dists, int64_t* nearest) {
  return visit(points, d, centre, pick, begin, end, picked, sq_dists, nearest);
}

FASTIF_CLONES Farthest visit_f64(const double* points, int64_t d, const double* centre, int64_t pick, int64_t begin,
                                 int64_t end, const bool* picked, double* sq_dists, int64_t* nearest) {
  return visit(points, d, centre, pick, begin, end, picked, sq_dists, nearest);
}

template <typename T, typename Visit>
void traverse(const at::Tensor& points, int64_t start, const at::Tensor& indices, const at::Tensor& sq_radii,
              const at::Tensor& sq_dists, const at::Tensor& nearest, Visit visit_rows) {
  const int64_t n = points.size(0), d = points.size(1), k = indices.size(0);
  const T* x = points.const_data_ptr<T>();
  const auto picked = at::zeros({n}, points.options().dtype(at::kBool));
  const auto centre = at::empty({d}, points.options().dtype(at::kDouble));
  const int64_t grain = std::max<int64_t>(1, 65536 / d);
  int64_t current = start;
  for (int64_t t = 0; t < k; ++t) {
    indices.mutable_data_ptr<int64_t>()[t] = current;
    picked.mutable_data_ptr<bool>()[current] = true;
    std::copy_n(x + current * d, d, centre.mutable_data_ptr<double>());
    Farthest farthest;
    std::mutex guard;
    at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      const auto part = visit_rows(x, d, centre.const_data_ptr<double>(), t, begin, end, picked.const_data_ptr<bool>(),
                                   sq_dists.mutable_data_ptr<double>(), nearest.mutable_data_ptr<int64_t>());
      const std::lock_guard<std::mutex> lock(guard);
      if (part.index >= 0) farthest.offer(part.sq_dist, part.index);
    });
    sq_radii.mutable_data_ptr<double>()[t] = std::max(0.0, farthest.sq_dist);  // every point picked: radius 0
    current = farthest.index;
  }
}

// Which kernel: none, the plain one; else the lazy one with this filter. The lazy one pays for its codes about as much
// as for a few picks, and needs many picks to be lazy about. FASTIF_KCENTER, read at every call, forces plain or lazy,
// or lazy with a filter that is not this processor's best: lazy:vnni, avxvnni, int8, avx512, avx2 or generic, without
// the axes or, as lazy:vnni+axes, always with them.
std::optional<FilterKind> lazy_filter(int64_t n, int64_t d, int64_t k) {
  const char* set = std::getenv("FASTIF_KCENTER");
  const std::string forced = set ? set : "";
  if (forced == "plain") return std::nullopt;
  if (forced == "lazy") return best_filter(d);
  if (forced.empty()) {
    const bool pays = k >= 32 && static_cast<double>(n) * static_cast<double>(k) * static_cast<double>(d) >= 1 << 24;
    return pays ? std::optional(best_filter(d)) : std::nullopt;
  }
  const auto named = forced.starts_with("lazy:") ? filter_named(forced.substr(5), d) : std::nullopt;
  TORCH_CHECK_VALUE(named, "farthest_first: FASTIF_KCENTER must be plain, lazy or lazy:FILTER with a filter of this ",
                    "processor (vnni, avxvnni, int8, avx512, avx2, generic, each also with +axes), got ", forced);
  return named;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> farthest_first_cpu(const at::Tensor& points, int64_t k,
                                                                              int64_t start) {
  check_farthest_first(points, k, start);
  const auto rows = points.contiguous();
  const int64_t n = rows.size(0);
  const auto f64 = rows.options().dtype(at::kDouble), i64 = rows.options().dtype(at::kLong);
  auto indices = at::empty({k}, i64), nearest = at::zeros({n}, i64);
  auto sq_radii = at::empty({k}, f64), sq_dists = at::full({n}, std::numeric_limits<double>::infinity(), f64);
  const auto filter = lazy_filter(n, rows.size(1), k);
  if (filter && farthest_first_lazy(rows, start, *filter, indices, sq_radii, sq_dists, nearest)) {
    // done
  } else if (rows.scalar_type() == at::kFloat) {
    traverse<float>(rows, start, indices, sq_radii, sq_dists, nearest, visit_f32);
  } else {
    traverse<double>(rows, start, indices, sq_radii, sq_dists, nearest, visit_f64);
  }
  return {indices, sq_radii, sq_dists, nearest};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastif, CPU, m) { m.impl("farthest_first", farthest_first_cpu); }

}  // namespace fastif
