// farthest_first_kernel against the definition in farthest_first.h, bit for bit, at several grid sizes.
#include <numeric>

#include "emulate.h"
#include "farthest_first/farthest_first_kernel.cuh"

namespace {

struct Result {
  std::vector<int64_t> indices, nearest;
  std::vector<double> sq_radii, sq_dists;
};

template <typename T>
double sq_distance(const T* x, const T* c, int64_t d) {
  double lane[32] = {};
  for (int64_t j = 0; j < d; ++j) {
    const double difference = static_cast<double>(x[j]) - static_cast<double>(c[j]);
    lane[j % 32] += difference * difference;
  }
  for (int half = 16; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

template <typename T>
Result definition(const std::vector<T>& points, int64_t n, int64_t d, int64_t k, int64_t start) {
  Result result{{}, std::vector<int64_t>(n, -1), {}, std::vector<double>(n, INFINITY)};
  std::vector<bool> picked(n);
  int64_t pick = start;
  for (int64_t t = 0; t < k; ++t) {
    result.indices.push_back(pick);
    picked[pick] = true;
    for (int64_t i = 0; i < n; ++i) {
      const double distance = sq_distance(&points[i * d], &points[pick * d], d);
      if (distance < result.sq_dists[i]) {
        result.sq_dists[i] = distance;
        result.nearest[i] = t;
      }
    }
    result.sq_radii.push_back(*std::max_element(result.sq_dists.begin(), result.sq_dists.end()));
    pick = -1;
    for (int64_t i = 0; i < n; ++i)
      if (!picked[i] && (pick < 0 || result.sq_dists[i] > result.sq_dists[pick])) pick = i;
  }
  return result;
}

template <typename T, bool kCached>
Result emulate(const std::vector<T>& points, int64_t n, int64_t d, int64_t k, int64_t start, unsigned blocks,
               unsigned threads) {
  Result result{std::vector<int64_t>(k, -7), std::vector<int64_t>(n, -7), std::vector<double>(k, NAN),
                std::vector<double>(n, NAN)};
  std::vector<fastif::Best> slots(2 * blocks, {NAN, -7});
  const T* const x = points.data();
  emu::launch(
      blocks, threads, kCached ? d * sizeof(double) : 0,
      [&, x] {
        fastif::farthest_first_kernel<T, kCached>(x, n, d, k, start, result.indices.data(), result.sq_radii.data(),
                                                  result.sq_dists.data(), result.nearest.data(), slots.data());
      },
      /*cooperative=*/true);
  return result;
}

template <typename T>
void compare(const char* name, const std::vector<T>& points, int64_t n, int64_t d, int64_t k, int64_t start) {
  const Result want = definition(points, n, d, k, start);
  for_schedules([&] {
    for (const auto& [blocks, threads] : {std::pair{1u, 32u}, {2u, 64u}, {5u, 32u}}) {
      for (const bool cached : {true, false}) {
        if (cached != (threads == 64) && emu::schedule.order != emu::Order::shuffle) continue;
        const Result got = cached ? emulate<T, true>(points, n, d, k, start, blocks, threads)
                                  : emulate<T, false>(points, n, d, k, start, blocks, threads);
        const auto same = [](const auto& a, const auto& b) {
          return std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
        };
        const auto where = [&](const char* what) {
          char text[160];
          std::snprintf(text, sizeof text, "%s n=%d d=%d k=%d %zu-byte, %u x %u threads: %s differ", name, int(n),
                        int(d), int(k), sizeof(T), blocks, threads, what);
          return std::string(text);
        };
        expect(same(got.indices, want.indices), "%s", where("indices").c_str());
        expect(same(got.sq_radii, want.sq_radii), "%s", where("sq_radii").c_str());
        expect(same(got.sq_dists, want.sq_dists), "%s", where("sq_dists").c_str());
        expect(same(got.nearest, want.nearest), "%s", where("nearest").c_str());
      }
    }
  });
}

template <typename T>
void all() {
  compare<T>("one point", uniform<T>(3, 1), 1, 3, 1, 0);
  compare<T>("every point", uniform<T>(13 * 5, 2), 13, 5, 13, 12);
  compare<T>("long rows", uniform<T>(37 * 131, 3), 37, 131, 9, 4);
  compare<T>("longer rows", uniform<T>(9 * 300, 4), 9, 300, 4, 8);
  compare<T>("many rows", uniform<T>(205 * 32, 5), 205, 32, 6, 100);
  compare<T>("all equal", std::vector<T>(21 * 2, T(1.5)), 21, 2, 21, 3);
  compare<T>("all zero", std::vector<T>(10, T(0)), 10, 1, 10, 9);
  std::vector<T> grid(36 * 2), twice = uniform<T>(40 * 33, 6);
  for (int i = 0; i < 36; ++i) grid[2 * i] = T(i / 6), grid[2 * i + 1] = T(i % 6);  // ties everywhere
  compare<T>("grid", grid, 36, 2, 36, 14);
  std::copy(twice.begin(), twice.begin() + 20 * 33, twice.begin() + 20 * 33);  // every point twice
  compare<T>("duplicates", twice, 40, 33, 40, 1);
}

}  // namespace

int main() {
  if constexpr (!EMU_ASAN) all<float>();
  if constexpr (!EMU_TSAN) all<double>();  // a sanitizer sees one type: they are slow
  return report("farthest_first");
}
