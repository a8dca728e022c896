#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../common/progress.h"
#include "../../common/simd.h"
#include "../farthest_first.h"
#include "cloud.h"
#include "lazy.h"

namespace fastif {
namespace {

// One read of rows [begin, end): distance to the new centre, minimum, nearest pick, and the farthest row not yet
// picked.
template <typename T>
__attribute__((always_inline)) inline Farthest visit(const T* points, int64_t d, const double* centre, int64_t pick,
                                                     int64_t begin, int64_t end, const char* picked, double* sq_dists,
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
                                 int64_t end, const char* picked, double* sq_dists, int64_t* nearest) {
  return visit(points, d, centre, pick, begin, end, picked, sq_dists, nearest);
}

FASTIF_CLONES Farthest visit_f64(const double* points, int64_t d, const double* centre, int64_t pick, int64_t begin,
                                 int64_t end, const char* picked, double* sq_dists, int64_t* nearest) {
  return visit(points, d, centre, pick, begin, end, picked, sq_dists, nearest);
}

Farthest visit_rows(const float* points, int64_t d, const double* centre, int64_t pick, int64_t begin, int64_t end,
                    const char* picked, double* sq_dists, int64_t* nearest) {
  return visit_f32(points, d, centre, pick, begin, end, picked, sq_dists, nearest);
}
Farthest visit_rows(const double* points, int64_t d, const double* centre, int64_t pick, int64_t begin, int64_t end,
                    const char* picked, double* sq_dists, int64_t* nearest) {
  return visit_f64(points, d, centre, pick, begin, end, picked, sq_dists, nearest);
}

// Compares pick t with every row and returns the farthest row that is not picked.
template <typename T>
Farthest compare_with_all(const Cloud<T>& cloud, int64_t t) {
  const T* row = cloud.points + cloud.indices[t] * cloud.d;
  const std::vector<double> centre(row, row + cloud.d);
  Farthest farthest;
  std::mutex guard;
  Progress::parallel_for(0, cloud.n, std::max<int64_t>(1, 65536 / cloud.d), [&](int64_t begin, int64_t end) {
    const auto part = visit_rows(cloud.points, cloud.d, centre.data(), t, begin, end, cloud.picked.data(),
                                 cloud.sq_dists, cloud.nearest);
    const std::lock_guard<std::mutex> lock(guard);
    if (part.index >= 0) farthest.offer(part.sq_dist, part.index);
  });
  return farthest;
}

FASTIF_CLONES bool any_beyond(const double* x, int64_t count) {
  bool beyond = false;
  for (int64_t i = 0; i < count; ++i) beyond |= !(std::abs(x[i]) <= 1e150);
  return beyond;
}

// Whether a point breaks the rule of check_farthest_first_points, once pick 0 is compared with all. A float32 row that
// is not finite shows in its distance; a float64 row can be too large at a distance that is not.
template <typename T>
bool any_bad(const Cloud<T>& cloud, const Farthest& farthest) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (farthest.sq_dist == kInfinity || cloud.sq_dists[cloud.indices[0]] == kInfinity) return true;
  std::atomic<bool> any = false;
  if constexpr (std::is_same_v<T, double>) {
    Progress::parallel_for(0, cloud.n, std::max<int64_t>(1, 65536 / cloud.d), [&](int64_t begin, int64_t end) {
      if (any_beyond(cloud.points + begin * cloud.d, (end - begin) * cloud.d)) any = true;
    });
  }
  return any;
}

// The plain kernel: reads every row for each pick. `farthest` is what the first pick left farthest.
template <typename T>
int64_t traverse(Cloud<T>& cloud, Farthest farthest) {
  for (int64_t made = 1;; ++made) {
    const double sq_radius = std::max(0.0, farthest.sq_dist);  // every point picked: radius 0
    cloud.sq_radii[made - 1] = sq_radius;
    if (cloud.complete(made, sq_radius)) return made;
    cloud.pick(made, farthest.index);
    farthest = compare_with_all(cloud, made);
    Progress::advance();
  }
}

// Which kernel: none, the plain one; else the lazy one with this filter. The lazy one pays for its codes about as much
// as for a few picks, and needs many picks to be lazy about. FASTIF_KCENTER, read once in every call, forces plain or
// lazy, or lazy with a filter that is not this processor's best: lazy:vnni, avxvnni, int8, avx512, avx2 or generic,
// without the axes or, as lazy:vnni+axes, always with them.
struct Choice {
  enum class Kernel { by_size, plain, lazy };
  Kernel kernel;
  FilterKind filter;

  std::optional<FilterKind> lazy_filter(int64_t n, int64_t d, int64_t k) const {
    const bool pays = k >= 32 && static_cast<double>(n) * static_cast<double>(k) * static_cast<double>(d) >= 1 << 24;
    return kernel == Kernel::lazy || (kernel == Kernel::by_size && pays) ? std::optional(filter) : std::nullopt;
  }
};

Choice choose(int64_t d) {
  const char* set = std::getenv("FASTIF_KCENTER");
  const std::string forced = set ? set : "";
  if (forced.empty()) return {Choice::Kernel::by_size, best_filter(d)};
  if (forced == "plain") return {Choice::Kernel::plain, best_filter(d)};
  if (forced == "lazy") return {Choice::Kernel::lazy, best_filter(d)};
  const auto named = forced.starts_with("lazy:") ? filter_named(forced.substr(5)) : std::nullopt;
  CHECK_VALUE(named, "farthest_first: FASTIF_KCENTER must be plain, lazy or lazy:FILTER with a filter of this ",
              "processor (vnni, avxvnni, int8, avx512, avx2, generic, each also with +axes), got ", forced);
  CHECK_VALUE(!holds_int8(named->codes) || d <= Filter::kMaxDimInt8, "farthest_first: FASTIF_KCENTER=", forced,
              " holds int8 codes and needs d <= ", Filter::kMaxDimInt8, ", got d=", d);
  return {Choice::Kernel::lazy, *named};
}

// Cloud j. What its mask leaves out is no part of it: the rows that are points stand first (padding comes after them),
// or are copied together; their order, and so every tie, stays.
template <typename T>
void run_cloud(const FarthestFirstArguments& arguments, const Choice& choice, int64_t j,
               const FarthestFirstResults& results) {
  const int64_t n = arguments.n(), d = arguments.d(), k = arguments.k, count = arguments.counts[j];
  const int64_t* start = arguments.start.const_data_ptr<int64_t>() + j * arguments.starts();
  const bool* mask = arguments.mask ? arguments.mask->const_data_ptr<bool>() + j * n : nullptr;
  const auto& [indices_tensor, sq_radii_tensor, sq_dists_tensor, nearest_tensor] = results;
  int64_t* indices = indices_tensor.mutable_data_ptr<int64_t>() + j * k;
  double* sq_radii = sq_radii_tensor.mutable_data_ptr<double>() + j * k;
  double* sq_dists = sq_dists_tensor.mutable_data_ptr<double>() + j * n;
  int64_t* nearest = nearest_tensor.mutable_data_ptr<int64_t>() + j * n;
  const T* points = arguments.points.const_data_ptr<T>() + j * n * d;

  std::vector<int64_t> rows, start_there;  // the points' rows, where they do not stand first
  Tensor copy;
  if (mask && !std::all_of(mask, mask + count, [](bool is_point) { return is_point; })) {
    for (int64_t i = 0; i < n; ++i) {
      if (mask[i]) rows.push_back(i);
    }
    copy = empty({count, d}, arguments.points);
    T* to = copy.mutable_data_ptr<T>();
    Progress::parallel_for(0, count, std::max<int64_t>(1, 65536 / d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) std::copy_n(points + rows[i] * d, d, to + i * d);
    });
    points = copy.const_data_ptr<T>();
    for (int64_t t = 0; t < arguments.starts(); ++t) {
      start_there.push_back(std::lower_bound(rows.begin(), rows.end(), start[t]) - rows.begin());
    }
    start = start_there.data();
  }

  std::fill_n(sq_dists, count, std::numeric_limits<double>::infinity());
  Cloud<T> cloud{
      points,  count,    d,        start,   arguments.starts(),      arguments.picks[j], arguments.until_sq_radius,
      indices, sq_radii, sq_dists, nearest, std::vector<char>(count)};
  cloud.pick(0, -1);
  const Farthest farthest = compare_with_all(cloud, 0);
  Progress::advance();
  if (any_bad(cloud, farthest)) name_bad_point(arguments);
  std::optional<int64_t> made;
  if (const auto filter = choice.lazy_filter(count, d, cloud.picks)) made = farthest_first_lazy(cloud, *filter);
  if (!made) made = traverse(cloud, farthest);

  Progress::advance(cloud.picks - *made);
  std::fill(indices + *made, indices + k, -1);
  std::fill(sq_radii + *made, sq_radii + k, sq_radii[*made - 1]);
  std::fill(sq_dists + count, sq_dists + n, 0);
  std::fill(nearest + count, nearest + n, -1);
  if (rows.empty()) return;
  for (int64_t t = 0; t < *made; ++t) indices[t] = rows[indices[t]];
  for (int64_t i = count - 1; i >= 0; --i) {  // i <= rows[i]: from the last, each goes where nothing is waiting
    std::swap(sq_dists[i], sq_dists[rows[i]]);
    std::swap(nearest[i], nearest[rows[i]]);
  }
}

FarthestFirstResults farthest_first_cpu(const Tensor& points, int64_t k, const Tensor& start,
                                        const std::optional<Tensor>& picks, const std::optional<Tensor>& mask,
                                        std::optional<double> until_radius) {
  const auto arguments = check_farthest_first(points, k, start, picks, mask, until_radius);
  const Choice choice = choose(arguments.d());
  const bool is_float = arguments.points.scalar_type() == kFloat;
  const auto per_pick = arguments.shape(k), per_point = arguments.shape(arguments.n());
  FarthestFirstResults results{empty(per_pick, kLong), empty(per_pick, kDouble), empty(per_point, kDouble),
                               empty(per_point, kLong)};
  std::fill_n(std::get<3>(results).mutable_data_ptr<int64_t>(), std::get<3>(results).numel(), 0);

  const Progress progress(std::accumulate(arguments.picks.begin(), arguments.picks.end(), int64_t{0}));
  const auto run = [&](int64_t j) {
    is_float ? run_cloud<float>(arguments, choice, j, results) : run_cloud<double>(arguments, choice, j, results);
  };
  if (arguments.clouds() >= num_threads()) {
    Progress::for_each(arguments.clouds(), run);
  } else {  // the threads share the rows of each
    for (int64_t j = 0; j < arguments.clouds(); ++j) run(j);
  }
  return results;
}

}  // namespace

static_assert(std::is_same_v<decltype(farthest_first_cpu), FarthestFirstOp>);

STABLE_TORCH_LIBRARY_IMPL(fastif, CPU, m) { m.impl("farthest_first", TORCH_BOX(&farthest_first_cpu)); }

}  // namespace fastif
