// What the drivers of farthest_first share: problems, the definition in farthest_first.h, and the comparison with it.
#pragma once

#include <string>

#include "emulate.h"
#include "farthest_first/cuda/clouds.h"

template <typename T>
struct Problem {
  std::string name;
  int64_t b, n, d, k, given;
  std::vector<T> points;                 // [b, n, d]
  std::vector<int64_t> starts, picks;    // [b, given], [b]
  std::vector<unsigned char> mask = {};  // [b, n], or empty
  double stop = -1;

  bool is_point(int64_t i) const { return mask.empty() || mask[i]; }
};

struct Result {
  std::vector<int64_t> indices, nearest;
  std::vector<double> sq_radii, sq_dists;
  std::vector<fastif::CloudProgress> progress;

  template <typename T>
  explicit Result(const Problem<T>& p)
      : indices(p.b * p.k, -7),
        nearest(p.b * p.n, -7),
        sq_radii(p.b * p.k, NAN),
        sq_dists(p.b * p.n, NAN),
        progress(p.b) {}

  template <typename T>
  fastif::Clouds clouds(const Problem<T>& p) {
    static_assert(sizeof(bool) == 1);
    return {.n = p.n,
            .d = p.d,
            .k = p.k,
            .given = p.given,
            .starts = p.starts.data(),
            .picks = p.picks.data(),
            .mask = p.mask.empty() ? nullptr : reinterpret_cast<const bool*>(p.mask.data()),
            .stop = p.stop,
            .indices = indices.data(),
            .sq_radii = sq_radii.data(),
            .sq_dists = sq_dists.data(),
            .nearest = nearest.data(),
            .progress = progress.data()};
  }
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
Result definition(const Problem<T>& p) {
  Result result(p);
  for (int64_t j = 0; j < p.b; ++j) {
    const T* const x = &p.points[j * p.n * p.d];
    int64_t* const nearest = &result.nearest[j * p.n];
    double* const sq_dists = &result.sq_dists[j * p.n];
    std::vector<bool> picked(p.n);
    for (int64_t i = 0; i < p.n; ++i) {
      nearest[i] = -1;
      sq_dists[i] = p.is_point(j * p.n + i) ? INFINITY : 0;
      picked[i] = !p.is_point(j * p.n + i);
    }
    int64_t pick = -1;
    double radius = INFINITY;
    for (int64_t t = 0; t < p.k; ++t) {
      const bool over = t >= p.picks[j] || (t >= p.given && radius <= p.stop);
      if (!over) {
        if (t < p.given) pick = p.starts[j * p.given + t];
        picked[pick] = true;
        for (int64_t i = 0; i < p.n; ++i) {
          if (!p.is_point(j * p.n + i)) continue;
          const double distance = sq_distance(x + i * p.d, x + pick * p.d, p.d);
          if (distance < sq_dists[i]) {
            sq_dists[i] = distance;
            nearest[i] = t;
          }
        }
        radius = *std::max_element(sq_dists, sq_dists + p.n);
      }
      result.indices[j * p.k + t] = over ? -1 : pick;
      result.sq_radii[j * p.k + t] = radius;
      pick = -1;
      for (int64_t i = 0; i < p.n; ++i)
        if (!picked[i] && (pick < 0 || sq_dists[i] > sq_dists[pick])) pick = i;
    }
  }
  return result;
}

template <typename T>
void expect_same(const Result& got, const Result& want, const Problem<T>& p, const char* how) {
  const auto same = [&](const char* what, const auto& a, const auto& b) {
    expect(std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0, "%s n=%d d=%d k=%d %zu-byte, %s: %s differ",
           p.name.c_str(), int(p.n), int(p.d), int(p.k), sizeof(T), how, what);
  };
  same("indices", got.indices, want.indices);
  same("sq_radii", got.sq_radii, want.sq_radii);
  same("sq_dists", got.sq_dists, want.sq_dists);
  same("nearest", got.nearest, want.nearest);
  expect(std::all_of(got.progress.begin(), got.progress.end(), [](const auto& of) { return of.done; }),
         "%s, %s: not done", p.name.c_str(), how);
}

// Small problems that every kernel solves under every schedule.
template <typename T>
std::vector<Problem<T>> problems() {
  std::vector<Problem<T>> all;
  const auto add = [&](const char* name, std::vector<T> points, int64_t n, int64_t d, int64_t k, int64_t start) {
    all.push_back({name, 1, n, d, k, 1, std::move(points), {start}, {k}});
  };
  add("one point", uniform<T>(3, 1), 1, 3, 1, 0);
  add("every point", uniform<T>(13 * 5, 2), 13, 5, 13, 12);
  add("long rows", uniform<T>(37 * 131, 3), 37, 131, 9, 4);
  add("longer rows", uniform<T>(9 * 300, 4), 9, 300, 4, 8);
  add("many rows", uniform<T>(205 * 32, 5), 205, 32, 6, 100);
  add("all equal", std::vector<T>(21 * 2, T(1.5)), 21, 2, 21, 3);
  add("all zero", std::vector<T>(10, T(0)), 10, 1, 10, 9);
  std::vector<T> grid(36 * 2), twice = uniform<T>(40 * 33, 6);
  for (int i = 0; i < 36; ++i) grid[2 * i] = T(i / 6), grid[2 * i + 1] = T(i % 6);  // ties everywhere
  add("grid", grid, 36, 2, 36, 14);
  std::copy(twice.begin(), twice.begin() + 20 * 33, twice.begin() + 20 * 33);  // every point twice
  add("duplicates", twice, 40, 33, 40, 1);
  // Given picks, two of them duplicates of others; then nothing but given picks.
  all.push_back({"given", 1, 40, 33, 12, 5, twice, {7, 30, 27, 3, 10}, {12}});
  all.push_back({"all given", 1, 40, 33, 4, 4, twice, {39, 19, 0, 20}, {4}});
  // Squared radii of a grid are integers: stops where it is equal, and before the first pick that is not given.
  all.push_back({"stop", 1, 36, 2, 36, 1, grid, {0}, {36}, {}, 5});
  all.push_back({"stop at once", 1, 36, 2, 30, 3, grid, {0, 35, 3}, {30}, {}, 1e9});
  all.push_back({"stop at zero", 1, 40, 33, 40, 1, twice, {2}, {40}, {}, 0});
  // Ragged clouds, NaN where the mask is false, one of a single point.
  Problem<T> ragged{"ragged", 3, 19, 7, 9, 1, uniform<T>(3 * 19 * 7, 7), {4, 11, 18}, {9, 1, 6}, {}};
  ragged.mask.assign(3 * 19, 1);
  for (int64_t i = 0; i < 3 * 19; ++i)
    if (i / 19 == 1 ? i != 19 + 11 : i % 5 == 2) {
      ragged.mask[i] = 0;
      std::fill_n(&ragged.points[i * 7], 7, T(NAN));
    }
  all.push_back(ragged);
  ragged.name = "ragged, stop";
  ragged.stop = 3;
  all.push_back(ragged);
  return all;
}
