// farthest_first_lazy_kernel against the definition in farthest_first.h, bit for bit: middle sets and pools so small
// that all levels are flushed again and again, launches cut at every turn, and the products of codes by themselves.
#include <numeric>

#include "farthest_first/cuda/kernel.cuh"
#include "farthest_first/cuda/lazy_kernel.cuh"
#include "farthest_first_problems.h"

namespace {

struct Sizes {
  unsigned blocks, threads;
  int middle_room, pool_room, staged_rows;
  uint64_t budget;
};

// Adds to `compared` how many pairs were computed as defined.
template <typename T>
Result emulate(const Problem<T>& problem, const Sizes& sizes, uint64_t& compared) {
  const int64_t n = problem.n, d = problem.d, b = problem.b;
  Result result(problem);
  const fastif::Clouds clouds = result.clouds(problem);
  emu::launch(2, 64, 0, [=] { fastif::farthest_first_begin_kernel(clouds, b); });

  const int stride = static_cast<int>(fastif::ceil_div(d, fastif::kCodeChunk)) * fastif::kChunkQuads;
  const int pitch = stride / fastif::kChunkQuads % 2 == 1 ? stride : stride + fastif::kChunkQuads;
  std::vector<fastif::CodeQuad> code(n * stride, {-7, -7, -7, -7});
  std::vector<double> scale(n, NAN), sq_norm(n, NAN), residual(n, NAN), mu(d, NAN);
  std::vector<unsigned char> picked(n, 7);
  std::vector<int64_t> middle(sizes.middle_room, -7);
  std::vector<fastif::Best> slots(sizes.blocks, {NAN, -7});
  std::vector<unsigned> counts(3 * fastif::kDigits, 77);
  fastif::LazyState state;
  fastif::LazyCloud<T> a;
  a.codes = {stride, code.data(), scale.data(), sq_norm.data(), residual.data(), mu.data()};
  a.picked = reinterpret_cast<bool*>(picked.data());
  a.middle = middle.data();
  a.slots = slots.data();
  a.counts = counts.data();
  a.state = &state;
  a.middle_room = sizes.middle_room;
  a.pool_room = sizes.pool_room;
  a.staged_rows = sizes.staged_rows;
  a.pitch = pitch;
  for (int64_t j = 0; j < b; ++j) {
    a.points = problem.points.data() + j * n * d;
    a.cloud = clouds.one(j, problem.picks[j]);
    emu::launch(2, 64, 0, [=] { fastif::farthest_first_lazy_begin_kernel<T>(a); });
    emu::launch(static_cast<unsigned>((d + 1) / 2), 64, 0, [=] {
      fastif::farthest_first_middle_kernel<T>(a.points, n, d, a.cloud.mask, a.cloud.starts, a.codes);
    });
    emu::launch(2, 64, 0, [=] { fastif::farthest_first_encode_kernel<T>(a.points, n, d, a.cloud.mask, a.codes); });
    for (int launches = 0; !a.cloud.progress->done && launches < 10000; ++launches) {
      const int64_t made = launches == 0 ? 0 : state.made;
      emu::launch(
          sizes.blocks, sizes.threads, sizes.staged_rows * pitch * sizeof(fastif::CodeQuad),
          [=] { fastif::farthest_first_lazy_kernel<T>(a, sizes.budget); }, /*cooperative=*/true);
      expect(sizes.budget > 0 || state.made - made <= fastif::kCentres, "%s: %d picks in a turn", problem.name.c_str(),
             static_cast<int>(state.made - made));
    }
    compared += state.compared;
  }
  emu::launch(2, 64, 0, [=] { fastif::farthest_first_end_kernel(clouds, b); });
  return result;
}

constexpr uint64_t kForever = ~uint64_t{0};

template <typename T>
void compare(const Problem<T>& problem) {
  const Result want = definition(problem);
  int run = 0;
  for_schedules([&] {
    // Every combination of these comes in some schedule: one block or several; a middle set and a pool of one point, of
    // a few, of all; centres 64 and 8 at a time; a launch for all and one for each turn.
    const Sizes all[] = {{1, 32, 8192, 16, 64, kForever}, {2, 64, 24, 7, 16, 1000},      {3, 32, 9, 3, 8, 2000},
                         {2, 32, 1, 1, 64, 1000},         {1, 64, 40, 32, 64, kForever}, {5, 32, 17, 16, 24, 3000}};
    for (int s = run++ % 2; s < 6; s += 2) {
      uint64_t compared = 0;
      char how[80];
      std::snprintf(how, sizeof how, "%u x %u threads, middle %d, pool %d, staged %d", all[s].blocks, all[s].threads,
                    all[s].middle_room, all[s].pool_room, all[s].staged_rows);
      expect_same(emulate(problem, all[s], compared), want, problem, how);
    }
  });
}

// Dots of a warp's tile against plain sums, with lanes' owners as the layout says.
template <int M, int N>
void compare_dots() {
  constexpr int chunks = 2, pitch = (chunks + 1) * fastif::kChunkQuads, length = chunks * fastif::kCodeChunk;
  for_schedules([&] {
    std::mt19937 random(5);
    std::vector<fastif::CodeQuad> rows(16 * M * pitch), centres(8 * N * pitch);
    const auto entry = [&](auto& side, int row, int j) -> int8_t& {
      return reinterpret_cast<int8_t*>(&side[row * pitch])[j];
    };
    for (auto* side : {&rows, &centres})
      for (size_t row = 0; row < side->size() / pitch; ++row)
        for (int j = 0; j < length; ++j)
          entry(*side, static_cast<int>(row), j) = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
    std::vector<int> got(16 * M * 8 * N, -1);
    emu::launch(1, 32, 0, [&] {
      const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
      unsigned row[2 * M];
      for (int i = 0; i < 2 * M; ++i) row[i] = (8 * i + g) * pitch + t;
      int dots[M][N][4];
      fastif::code_dots<M, N>(rows.data(), row, &centres[g * pitch + t], pitch, chunks, dots);
      for (int m = 0; m < M; ++m)
        for (int c = 0; c < N; ++c)
          for (int e = 0; e < 4; ++e) got[(16 * m + 8 * (e / 2) + g) * 8 * N + 8 * c + 2 * t + e % 2] = dots[m][c][e];
    });
    for (int r = 0; r < 16 * M; ++r)
      for (int c = 0; c < 8 * N; ++c) {
        int want = 0;
        for (int j = 0; j < length; ++j) want += entry(rows, r, j) * entry(centres, c, j);
        expect(got[r * 8 * N + c] == want, "dots: row %d, centre %d: %d, not %d", r, c, got[r * 8 * N + c], want);
      }
  });
}

// Points near a few directions, at several offsets and scales: what the certificate has to be right about.
template <typename T>
Problem<T> hard(const char* name, int64_t n, int64_t d, int64_t k, double offset, double scale, double spread) {
  Problem<T> p{name, 1, n, d, k, 1, uniform<T>(n * d, static_cast<unsigned>(n + d)), {n / 2}, {k}};
  std::mt19937 random(static_cast<unsigned>(n));
  for (int64_t i = 0; i < n; ++i) {
    const double size = scale * std::pow(10.0, spread * (static_cast<double>(random()) / 4294967296.0 - 0.5));
    for (int64_t j = 0; j < d; ++j) {
      T& x = p.points[i * d + j];
      x = static_cast<T>((static_cast<double>(x) + 3 * ((i + j) % 4 == 0)) * size + offset);
    }
  }
  return p;
}

template <typename T>
void all() {
  for (const auto& problem : problems<T>()) compare(problem);
  const bool single = sizeof(T) == 4;
  compare(hard<T>("offset", 90, 70, 40, 1e4, 1, 0));
  compare(hard<T>("far", 90, 20, 30, 1e6, 1, 0));
  compare(hard<T>("tails", 150, 33, 60, 0, 1, 8));
  compare(hard<T>("tiny", 60, 40, 20, 0, single ? 1e-40 : 1e-160, 0));
  compare(hard<T>("huge", 60, 40, 20, 0, single ? 1e36 : 1e139, 3));
  compare(hard<T>("extremes", 60, 5, 50, 0, single ? 1 : 1e-20, single ? 60 : 250));
  Problem<T> whole = hard<T>("integers", 130, 10, 130, 0, 1, 0);
  for (T& x : whole.points) x = std::round(2 * x);
  compare(whole);
  // One large entry, the others of the size of a step of the code: all that tells the points apart is in the residuals.
  Problem<T> fine = hard<T>("fine", 120, 3, 100, 0, 1, 0);
  for (int64_t i = 0; i < fine.n; ++i) {
    fine.points[3 * i] = T(i % 2 == 0 ? 127 : -127);
    for (int64_t j = 1; j < 3; ++j) fine.points[3 * i + j] = std::fmod(fine.points[3 * i + j], T(1)) * T(2);
  }
  compare(fine);
}

// The filter does its work: far fewer pairs than all are computed as defined, whatever is masked out.
void is_lazy() {
  auto problem = hard<float>("lazy", 700, 64, 150, 5, 1, 0);
  problem.mask.assign(700, 1);
  for (int64_t i = 0; i < 700; i += 10) {
    problem.mask[i + 1] = 0;
    std::fill_n(&problem.points[(i + 1) * 64], 64, NAN);
  }
  const Result want = definition(problem);
  uint64_t compared = 0;
  expect_same(emulate(problem, {2, 64, 128, 32, 64, kForever}, compared), want, problem, "lazy");
  const int pairs = 630 * 150;
  expect(compared < pairs / 10, "of %d pairs, %d were computed", pairs, static_cast<int>(compared));
}

// Hundreds of given picks that change nothing for the points in the pool: even so a turn, which is all of a launch
// without a budget, takes some of them only.
template <typename T>
void many_given() {
  Problem<T> problem{"many given", 1, 660, 2, 620, 600, uniform<T>(660 * 2, 8), std::vector<int64_t>(600), {620}};
  std::iota(problem.starts.rbegin(), problem.starts.rend(), 0);
  for (int64_t i = 620; i < 660; ++i) problem.points[2 * i] += T(100 * (i - 600));  // all others are near pick 0
  const Result want = definition(problem);
  for (const int middle_room : {64, 8192}) {
    uint64_t compared = 0;
    expect_same(emulate(problem, {2, 64, middle_room, 32, 64, 0}, compared), want, problem, "many given");
  }
}

}  // namespace

int main() {
  compare_dots<1, 1>();
  compare_dots<2, 8>();
  if constexpr (!EMU_ASAN) all<float>();
  if constexpr (!EMU_TSAN) all<double>();  // a sanitizer sees one type: they are slow
  is_lazy();
  many_given<float>();
  return report("farthest_first_lazy");
}
