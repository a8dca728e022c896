// The kernels of per_sample_grad against sums over examples and positions in float64.
#include "emulate.h"
#include "per_sample_grad/cuda/kernel.cuh"

namespace {

using fastif::ceil_div;
using fastif::kTileSide;
using fastif::kTileThreads;

template <typename T>
struct Problem {
  int64_t n, t, d, o;
  std::vector<T> a = uniform<T>(n * t * d, 1), u = uniform<T>(n * t * o, 2), w = uniform<T>(n, 3);

  std::vector<double> gradient(int64_t i) const {  // [o, d]
    std::vector<double> g(o * d);
    for (int64_t s = i * t; s < (i + 1) * t; ++s)
      for (int64_t r = 0; r < o; ++r)
        for (int64_t j = 0; j < d; ++j) g[r * d + j] += double(u[s * o + r]) * double(a[s * d + j]);
    return g;
  }
};

template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 3e-6 : 1e-14;

// Runs `kernel(out, blocks)` in every schedule and with fewer blocks than items; all runs must agree to the bit.
template <typename T, typename Kernel>
void compare(const char* name, const std::vector<double>& want, int64_t items, double tolerance, Kernel kernel) {
  std::vector<T> first;
  for_schedules([&] {
    for (const int64_t blocks : {items, std::min<int64_t>(items, 2)}) {
      if (blocks != items && emu::schedule.order != emu::Order::shuffle) continue;
      std::vector<T> got(want.size(), T(NAN));
      kernel(got.data(), static_cast<unsigned>(blocks));
      const double error = relative_error(got, want);
      expect(error <= tolerance, "%s %zu-byte: error %.2e", name, sizeof(T), error);
      if (first.empty()) first = got;
      expect(std::memcmp(first.data(), got.data(), got.size() * sizeof(T)) == 0, "%s: not the same bits", name);
    }
  });
}

template <typename T, int RO, int RD>
void accumulate(int64_t n, int64_t t, int64_t d, int64_t o, int64_t groups, int64_t splits, int64_t only = -1) {
  const Problem<T> problem{n, t, d, o};
  std::vector<int64_t> group(n), order, offsets;
  for (int64_t i = 0; i < n; ++i) group[i] = only >= 0 ? only : i * 7 % groups / 2 * 2;  // odd groups stay empty
  for (int64_t g = 0; g <= groups; ++g) {
    offsets.push_back(order.size());
    for (int64_t i = 0; i < n; ++i)
      if (group[i] == g) order.push_back(i);
  }
  std::vector<double> want(groups * o * d);
  for (int64_t i = 0; i < n; ++i) {
    const auto g = problem.gradient(i);
    for (int64_t e = 0; e < o * d; ++e) want[group[i] * o * d + e] += double(problem.w[i]) * g[e];
  }
  char name[120];
  std::snprintf(name, sizeof name, "accumulate<%d,%d> n=%d t=%d d=%d o=%d groups=%d splits=%d", RO, RD, int(n), int(t),
                int(d), int(o), int(groups), int(splits));
  const int64_t items = splits * groups * ceil_div(o, kTileSide * RO) * ceil_div(d, kTileSide * RD);
  compare<T>(name, want, items, kTolerance<T>, [&](T* out, unsigned blocks) {
    std::vector<T> parts(splits * want.size(), T(NAN));
    emu::launch(blocks, kTileThreads, 0, [&] {
      fastif::accumulate_kernel<T, RO, RD>(problem.a.data(), problem.u.data(), problem.w.data(), order.data(),
                                           offsets.data(), t, d, o, groups, splits, parts.data());
    });
    for (size_t e = 0; e < want.size(); ++e) {
      out[e] = 0;
      for (int64_t s = 0; s < splits; ++s) out[e] += parts[s * want.size() + e];
    }
  });
}

template <typename T>
void sq_norms(int64_t n, int64_t t, int64_t d, int64_t o) {
  const Problem<T> problem{n, t, d, o};
  std::vector<double> want(n);
  for (int64_t i = 0; i < n; ++i)
    for (const double g : problem.gradient(i)) want[i] += g * g;
  const T *const a = problem.a.data(), *const u = problem.u.data();
  const auto check = [&](const char* route, int64_t parts, int64_t items, auto kernel) {
    char name[120];
    std::snprintf(name, sizeof name, "sq_norms %s n=%d t=%d d=%d o=%d", route, int(n), int(t), int(d), int(o));
    compare<double>(name, want, items, 4 * kTolerance<T>, [&](double* out, unsigned blocks) {
      std::vector<double> partial(n * parts, NAN);
      emu::launch(blocks, kTileThreads, 0, [&] { kernel(partial.data()); });
      for (int64_t i = 0; i < n; ++i) {
        out[i] = 0;
        for (int64_t p = 0; p < parts; ++p) out[i] += partial[i * parts + p];
      }
    });
  };
  using namespace fastif;
  if (t == 1) check("single", 1, ceil_div(n, 8), [=](double* out) { sq_norms_single_kernel<T>(a, u, n, d, o, out); });
  const auto tiles = [&](int rows, int columns) { return ceil_div(o, 16 * rows) * ceil_div(d, 16 * columns); };
  if (t <= 40)
    check("gram<1>", ceil_div(t, 16), n * ceil_div(t, 16),
          [=](double* out) { sq_norms_gram_kernel<T, 1>(a, u, n, t, d, o, out); });
  check("gram<4>", ceil_div(t, 64), n * ceil_div(t, 64),
        [=](double* out) { sq_norms_gram_kernel<T, 4>(a, u, n, t, d, o, out); });
  check("outer<1,8>", tiles(1, 8), n * tiles(1, 8),
        [=](double* out) { sq_norms_outer_kernel<T, 1, 8>(a, u, nullptr, n, t, d, o, out); });
  check("outer<4,4>", tiles(4, 4), n * tiles(4, 4),
        [=](double* out) { sq_norms_outer_kernel<T, 4, 4>(a, u, nullptr, n, t, d, o, out); });
  auto scale = uniform<T>(o * d, 5);
  for (T& r : scale) r = std::abs(r);
  for (int64_t i = 0; i < n; ++i) {
    const auto g = problem.gradient(i);
    want[i] = 0;
    for (int64_t e = 0; e < o * d; ++e) want[i] += double(scale[e]) * g[e] * g[e];
  }
  const T* const r = scale.data();
  check("scaled outer<1,8>", tiles(1, 8), n * tiles(1, 8),
        [=](double* out) { sq_norms_outer_kernel<T, 1, 8>(a, u, r, n, t, d, o, out); });
  check("scaled outer<4,4>", tiles(4, 4), n * tiles(4, 4),
        [=](double* out) { sq_norms_outer_kernel<T, 4, 4>(a, u, r, n, t, d, o, out); });
}

template <typename T, int RO, int RD>
void accumulate_squares(int64_t n, int64_t t, int64_t d, int64_t o, int64_t splits) {
  const Problem<T> problem{n, t, d, o};
  std::vector<double> want(o * d);
  for (int64_t i = 0; i < n; ++i) {
    const auto g = problem.gradient(i);
    for (int64_t e = 0; e < o * d; ++e) want[e] += double(problem.w[i]) * g[e] * g[e];
  }
  char name[120];
  std::snprintf(name, sizeof name, "accumulate_squares<%d,%d> n=%d t=%d d=%d o=%d splits=%d", RO, RD, int(n), int(t),
                int(d), int(o), int(splits));
  const int64_t items = splits * ceil_div(o, kTileSide * RO) * ceil_div(d, kTileSide * RD);
  compare<T>(name, want, items, 2 * kTolerance<T>, [&](T* out, unsigned blocks) {
    std::vector<T> parts(splits * want.size(), T(NAN));
    emu::launch(blocks, kTileThreads, 0, [&] {
      fastif::accumulate_squares_kernel<T, RO, RD>(problem.a.data(), problem.u.data(), problem.w.data(), n, t, d, o,
                                                   splits, parts.data());
    });
    for (size_t e = 0; e < want.size(); ++e) {
      out[e] = 0;
      for (int64_t s = 0; s < splits; ++s) out[e] += parts[s * want.size() + e];
    }
  });
}

template <typename T, int RR, int RO>
void dots(int64_t n, int64_t t, int64_t d, int64_t o, int64_t q) {
  const Problem<T> problem{n, t, d, o};
  const auto v = uniform<T>(q * o * d, 4);
  std::vector<double> want(q * n);
  for (int64_t i = 0; i < n; ++i) {
    const auto g = problem.gradient(i);
    for (int64_t r = 0; r < q; ++r)
      for (int64_t e = 0; e < o * d; ++e) want[r * n + i] += double(v[r * o * d + e]) * g[e];
  }
  char name[120];
  std::snprintf(name, sizeof name, "dots<%d,%d> n=%d t=%d d=%d o=%d q=%d", RR, RO, int(n), int(t), int(d), int(o),
                int(q));
  const int64_t items = q * ceil_div(n, std::max<int64_t>(1, kTileSide * RR / t));
  compare<T>(name, want, items, kTolerance<T>, [&](T* out, unsigned blocks) {
    emu::launch(blocks, kTileThreads, 0, [&] {
      fastif::dots_kernel<T, RR, RO>(problem.a.data(), problem.u.data(), v.data(), n, t, d, o, q, out);
    });
  });
}

template <typename T>
void all() {
  accumulate<T, 4, 4>(1, 1, 1, 1, 1, 1);
  accumulate<T, 4, 4>(13, 3, 66, 5, 4, 1);
  accumulate<T, 4, 4>(9, 1, 3, 70, 5, 3);
  accumulate<T, 1, 8>(21, 2, 130, 17, 3, 1);
  accumulate<T, 1, 8>(700, 1, 3, 2, 2, 1, /*only=*/1);  // two chunks of one group
  accumulate_squares<T, 4, 4>(1, 1, 1, 1, 1);
  accumulate_squares<T, 4, 4>(5, 3, 66, 5, 2);
  accumulate_squares<T, 4, 4>(3, 18, 3, 70, 3);
  accumulate_squares<T, 1, 8>(4, 2, 130, 17, 1);
  accumulate_squares<T, 1, 8>(515, 2, 3, 2, 1);  // more examples than one set of accumulators takes
  accumulate_squares<T, 1, 8>(2, 515, 3, 2, 1);  // more positions than one chunk
  sq_norms<T>(1, 1, 1, 1);
  sq_norms<T>(11, 1, 35, 3);
  sq_norms<T>(3, 5, 17, 9);
  sq_norms<T>(2, 37, 6, 19);
  sq_norms<T>(2, 66, 3, 2);
  dots<T, 8, 1>(1, 1, 1, 1, 1);
  dots<T, 8, 1>(131, 1, 19, 17, 2);
  dots<T, 8, 1>(3, 140, 5, 3, 2);  // an example longer than a tile
  dots<T, 4, 4>(24, 5, 18, 67, 3);
  dots<T, 4, 4>(70, 1, 33, 2, 1);
}

}  // namespace

int main() {
  if constexpr (!EMU_ASAN) all<float>();
  if constexpr (!EMU_TSAN) all<double>();  // a sanitizer sees one type: they are slow
  accumulate<float, 8, 8>(10, 2, 129, 68, 2, 1);
  accumulate_squares<float, 4, 8>(3, 5, 129, 68, 2);
  dots<float, 8, 8>(45, 3, 20, 130, 1);
  return report("per_sample_grad");
}
