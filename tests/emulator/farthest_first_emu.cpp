// farthest_first_kernel, by the whole grid and by a block per cloud, against the definition in farthest_first.h, bit
// for bit, at several grid sizes.
#include "farthest_first/cuda/kernel.cuh"
#include "farthest_first_problems.h"

namespace {

template <typename T, bool kCached, bool kWholeGrid>
Result emulate(const Problem<T>& problem, unsigned blocks, unsigned threads, int64_t picks_at_once) {
  Result result(problem);
  const fastif::Clouds clouds = result.clouds(problem);
  const int64_t b = problem.b;
  emu::launch(2, 64, 0, [=] { fastif::farthest_first_begin_kernel(clouds, b); });
  const size_t shared = kCached ? problem.d * sizeof(double) : 0;
  const T* const x = problem.points.data();
  if (kWholeGrid) {
    std::vector<fastif::Best> slots(2 * blocks, {NAN, -7});
    for (int64_t j = 0; j < b; ++j) {
      const fastif::Clouds one = clouds.one(j, problem.picks[j]);
      const T* const own = x + j * problem.n * problem.d;
      for (int64_t last = 0; last < problem.picks[j];) {
        last = std::min(last + picks_at_once, problem.picks[j]);
        emu::launch(
            blocks, threads, shared,
            [&, own] { fastif::farthest_first_kernel<T, kCached, true>(own, one, 0, last, slots.data()); },
            /*cooperative=*/true);
      }
    }
  } else {
    for (int64_t last = 0; last < problem.k;) {
      last = std::min(last + picks_at_once, problem.k);
      emu::launch(static_cast<unsigned>(b), threads, shared,
                  [=] { fastif::farthest_first_kernel<T, kCached, false>(x, clouds, 0, last, nullptr); });
    }
  }
  emu::launch(2, 64, 0, [=] { fastif::farthest_first_end_kernel(clouds, b); });
  return result;
}

template <typename T>
void compare(const Problem<T>& problem) {
  const Result want = definition(problem);
  for_schedules([&] {
    const bool shuffle = emu::schedule.order == emu::Order::shuffle;
    for (const auto& [blocks, threads] : {std::pair{1u, 32u}, {2u, 64u}, {5u, 32u}}) {
      for (const bool cached : {true, false}) {
        if (cached != (threads == 64) && !shuffle) continue;
        const int64_t at_once = threads == 64 ? problem.k : 3;
        expect_same(cached ? emulate<T, true, true>(problem, blocks, threads, at_once)
                           : emulate<T, false, true>(problem, blocks, threads, at_once),
                    want, problem, cached ? "cached, grid" : "grid");
        if (blocks > 2) continue;
        expect_same(cached ? emulate<T, true, false>(problem, 0, threads, at_once)
                           : emulate<T, false, false>(problem, 0, threads, at_once),
                    want, problem, cached ? "cached, blocks" : "blocks");
      }
    }
  });
}

template <typename T>
void all() {
  for (const auto& problem : problems<T>()) compare(problem);
}

}  // namespace

int main() {
  if constexpr (!EMU_ASAN) all<float>();
  if constexpr (!EMU_TSAN) all<double>();  // a sanitizer sees one type: they are slow
  return report("farthest_first");
}
