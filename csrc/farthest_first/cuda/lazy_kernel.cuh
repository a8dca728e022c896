// farthest_first on the GPU, lazily: the result of farthest_first_kernel to the last bit, at a fraction of its reads.
//
// The scheme is that of ../cpu/lazy.cpp. A point's minimum distance over SOME of the picks is an upper
// bound. Points live on three levels: a pool whose sq_dists count every pick, a middle set that has seen the picks
// before middle_seen, and all n points, which have seen those before all_seen. Each level is chosen from its parent by
// the order of Best (value, then lowest index); what is left out is remembered by its best, which stays an upper bound
// in this order since sq_dists only fall. While the pool's best is not beaten by what was left out, it is the next
// pick, ties included, and gives the covering radius. If it is, the parent is flushed (the picks that it has not seen
// are compared with all its points) and the level is chosen anew; after a flush of all points the best is exact by
// definition, so every pick is found. Which points a level holds, and in what order, changes no bit of the result: it
// need not be the best ones exactly, nor chosen the same way twice.
//
// One cooperative launch does all of this and decides by itself what comes next; the host is asked for nothing. All
// blocks go through the same turns, with a grid.sync after each:
//   pick    Block 0 alone chooses the pool from the middle set, and picks from it with block barriers only.
//   flush   A tile of 32 rows belongs to one warp, and its row l to lane l, which alone reads and writes sq_dist and
//           nearest of this row. The filter (codes.cuh) settles nearly all pairs in registers; the warp
//           computes the others as defined, four rows at a time. No pair goes through memory, so there is no list to
//           overflow; a row meets the picks in their order, so the earliest of equals stays, without atomics.
//   choose  The middle set, by a radix select of the keys (sq_dist, lowest index).
// At a deadline the launch ends, after the turn, and a turn has one block of centres at most: that many are flushed,
// or picked. The state then waits in global memory for the next launch, and in between the host can look for an
// interrupt.
//
// What it should cost (computed, not measured; H100, n = 1M, d = 512 float32, k = 10k):
//   products   n k d = 5e12, at some 200 to 400 T/s by mma.sync fed from shared memory: 13 to 25 ms, beside 40 reads of
//              the codes, 0.5 GB each: 6 ms
//   test       6 float64 operations and a conversion per pair, at some 14 T/s: 5 ms
//   undecided  0.2 to 0.9 % of n k, as the CPU has measured, each 2 KB of a row (the centre's is in the second-level
//              cache): 40 to 180 GB, 13 to 60 ms
//   picks      about 1.2 us each, the latencies of 16 dependent mma, one exact distance and one argmax: 12 ms
//   turns      about 100, some 50 us each for grid.syncs, middle flush and selects: 5 ms
// Together 50 to 110 ms, against k n d 4 bytes = 20 TB, 6.5 s, for the plain kernel at full bandwidth.
#pragma once

#include "lazy_flush.cuh"

namespace fastif {

__device__ inline uint64_t nanoseconds() {
#ifdef FASTIF_EMULATOR
  return emu::nanoseconds();
#else
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
#endif
}

template <typename T>
__global__ void farthest_first_lazy_begin_kernel(LazyCloud<T> a) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = thread; i < a.cloud.n; i += static_cast<int64_t>(gridDim.x) * blockDim.x) a.picked[i] = false;
  // Nothing beats what is outside: the first pick flushes all.
  if (thread == 0) *a.state = {0, 0, 0, {INFINITY, -1}, Step::pick, 0, {false, false}, 0};
}

// ---- Selection.

__device__ inline bool beats(Best a, Best b) { return a.value > b.value || (a.value == b.value && a.index < b.index); }

// Larger is better, as in Best; no two points have the same.
using Key = unsigned __int128;

__device__ inline Key key_of(Best point, int64_t n) {
  return static_cast<Key>(static_cast<uint64_t>(__double_as_longlong(point.value))) << 64 |
         static_cast<uint64_t>(n - 1 - point.index);
}

// A key such that of the candidates at most `room` have it or a larger one, and at least half of that, if there are so
// many. candidate(i), i < count, is a point or has a negative value. By all blocks (kWholeGrid) or by one; what it
// returns is the same in all threads. Digit by digit: those above the digit in which `room` is reached are in, the next
// pass looks at the points with this digit alone. `turn` numbers the passes: they use three histograms in turn, so that
// one can be cleared while slow blocks still read the one before.
template <bool kWholeGrid, typename Candidate>
__device__ inline Key select(Candidate candidate, int64_t count, int64_t n, int room, LazyShared& shared,
                             unsigned* counts, unsigned& turn) {
  const int lane = threadIdx.x % kWarp;
  const int64_t first = kWholeGrid ? static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x : threadIdx.x;
  const int64_t stride = kWholeGrid ? static_cast<int64_t>(gridDim.x) * blockDim.x : blockDim.x;
  Key prefix = 0;
  int64_t above = 0;
  for (int low = 127;;) {  // bits from `low` up are decided; the sign bit is 0
    const int shift = low > 8 ? low - 8 : 0;
    for (int b = threadIdx.x; b < kDigits; b += blockDim.x) shared.counts[b] = 0;
    __syncthreads();
    for (int64_t i = first; i < count; i += stride) {
      const Best point = candidate(i);
      if (point.value < 0) continue;
      const Key key = key_of(point, n);
      if (key >> low != prefix >> low) continue;
      atomicAdd(&shared.counts[static_cast<int>(key >> shift) & ((1 << (low - shift)) - 1)], 1u);
    }
    __syncthreads();
    if constexpr (kWholeGrid) {
      unsigned* const now = counts + turn % 3 * kDigits;
      unsigned* const next = counts + (turn + 1) % 3 * kDigits;
      for (int b = threadIdx.x; b < kDigits; b += blockDim.x) {
        if (shared.counts[b] > 0) atomicAdd(&now[b], shared.counts[b]);
        if (blockIdx.x == 0) next[b] = 0;
      }
      cooperative_groups::this_grid().sync();
      for (int b = threadIdx.x; b < kDigits; b += blockDim.x) shared.counts[b] = now[b];
      __syncthreads();
      ++turn;
    }
    // Every warp by itself: lane l has the l-th 8 digits from the top.
    constexpr int part = kDigits / kWarp;
    unsigned counted[part];
    int64_t total = 0;
#pragma unroll
    for (int e = 0; e < part; ++e) total += counted[e] = shared.counts[kDigits - 1 - (lane * part + e)];
    int64_t running = total;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int64_t before = __shfl_sync(kAllLanes, running, (lane - offset) & (kWarp - 1));
      if (lane >= offset) running += before;
    }
    running -= total;
    int64_t taken = 0;
    int fit = 0;
#pragma unroll
    for (int e = 0; e < part; ++e) {
      running += counted[e];
      if (above + running > room) continue;
      taken += counted[e];
      ++fit;
    }
    taken = warp_sum(taken);
    const int digit = kDigits - warp_sum(fit);
    __syncthreads();  // all have read the counts
    if (digit == 0 || 2 * (above + taken) >= room) return prefix + (static_cast<Key>(digit) << shift);
    prefix += static_cast<Key>(digit - 1) << shift;
    above += taken;
    low = shift;
  }
}

// ---- Picking, by block 0. The middle set has seen all picks. Ends with the step that must come next.

template <typename T>
__device__ inline void pick_from_pool(const LazyCloud<T>& a, int64_t t, int middle_count, LazyShared& shared,
                                      CodeQuad* staged) {
  const Clouds& cloud = a.cloud;
  const int lane = threadIdx.x % kWarp, first_slot = static_cast<int>(threadIdx.x) / kWarp * kPoolRows;
  const auto candidate = [&](int64_t i) {
    const int64_t row = a.middle[i];
    return Best{a.picked[row] ? -1.0 : cloud.sq_dists[row], row};
  };
  if (threadIdx.x == 0) shared.pool_count = 0;
  unsigned turn = 0;
  const Key threshold = select<false>(candidate, middle_count, cloud.n, a.pool_room, shared, nullptr, turn);
  Best outside_pool = no_best();
  for (int i = threadIdx.x; i < middle_count; i += blockDim.x) {
    const Best point = candidate(i);
    if (point.value < 0) continue;
    if (key_of(point, cloud.n) >= threshold) {
      shared.pool[atomicAdd(&shared.pool_count, 1)] = point.index;
    } else {
      outside_pool = better(outside_pool, point);
    }
  }
  outside_pool = block_best(outside_pool, shared.parts[0]);
  const Best outside_middle = a.state->outside_middle;
  const int pool_count = shared.pool_count;

  // A warp without rows of the pool only takes part in the argmax.
  const bool works = first_slot < pool_count;
  Row own;
  if (lane < kPoolRows && first_slot + lane < pool_count) own = load_row(a, shared.pool[first_slot + lane]);
  RowTerms terms{};
  if (own.sq_dist > 0) terms = row_terms(a.codes, own.index, own.sq_dist);
  bool free = own.index >= 0;
  const bool fits = pool_count <= a.staged_rows;
  if (fits) stage_codes(a, staged, pool_count, [&](int s) { return shared.pool[s]; });
  __syncthreads();
  const CodeQuad* const codes = fits ? staged : a.codes.code;
  unsigned code[2] = {};
  for (int i = 0; works && i < 2; ++i) {
    const int slot = first_slot + 8 * i + lane / 4, real = slot < pool_count ? slot : first_slot;
    code[i] = static_cast<unsigned>(fits ? real * a.pitch : shared.pool[real] * a.codes.stride) + lane % 4;
  }

  Step step;
  for (const int64_t began = t;; ++t) {
    Best next = no_best();
    if (t > 0) {
      next = block_best(free ? Best{own.sq_dist, own.index} : no_best(), shared.parts[t % 2]);
      const bool outside_is_pool = beats(outside_pool, outside_middle);
      if (beats(outside_is_pool ? outside_pool : outside_middle, next)) {
        step = outside_is_pool ? Step::flush_middle : Step::flush_all;
        break;
      }
      const double radius = next.value > 0 ? next.value : 0.0;  // nobody left: every point is picked
      if (threadIdx.x == 0) cloud.sq_radii[t - 1] = radius;
      if (t == cloud.k || (t >= cloud.given && radius <= cloud.stop)) {
        step = Step::finish;
        break;
      }
      if (t - began == kCentres) {  // given picks need not be in the pool, and could go on without end
        step = Step::flush_middle;
        break;
      }
    }
    const int64_t pick = t < cloud.given ? cloud.starts[t] : next.index;
    if (threadIdx.x == 0) {
      cloud.indices[t] = pick;
      a.picked[pick] = true;
    }
    if (own.index == pick) free = false;
    if (!works) continue;
    int dots[1][1][4];
    code_dots<1, 1>(codes, code, a.codes.code + pick * a.codes.stride + lane % 4, 0, a.codes.stride / kChunkQuads,
                    dots);
    const CentreTerms centre = centre_terms(a.codes, pick);
    const uint64_t open = undecided<1, 1>(dots, terms, [&](int) { return centre; }) & 1;
    const double before = own.sq_dist;
    compare_exactly(a, own, open, t, [&](int) { return pick; });
    if (own.sq_dist < before) terms = row_terms(a.codes, own.index, own.sq_dist);
  }
  store_row(a, own);
  if (threadIdx.x == 0) {
    a.state->made = t;
    a.state->step = step;
  }
}

// Runs until the cloud is done, or until `budget` nanoseconds have passed.
template <typename T>
__global__ void __launch_bounds__(kLazyThreads, 1) farthest_first_lazy_kernel(LazyCloud<T> a, uint64_t budget) {
  FASTIF_SHARED(LazyShared, shared);
  FASTIF_DYNAMIC_SHARED(CodeQuad, staged);  // [staged_rows, pitch]
  const auto grid = cooperative_groups::this_grid();
  const bool first_block = blockIdx.x == 0, first_thread = first_block && threadIdx.x == 0;
  LazyState& state = *a.state;
  // The same in all blocks, which all decide by them.
  int64_t made = state.made, all_seen = state.all_seen, middle_seen = state.middle_seen;
  int middle_count = state.middle_count;
  Step step = state.step;
  unsigned turn = 0;
  bool done = false;
  const uint64_t began = first_thread ? nanoseconds() : 0;
  if (first_block)
    for (int b = threadIdx.x; b < 3 * kDigits; b += blockDim.x) a.counts[b] = 0;
  grid.sync();

  for (int half = 0; !done; half ^= 1) {
    const int64_t from = step == Step::flush_middle ? middle_seen : all_seen;
    const int64_t to = made - from < a.staged_rows ? made : from + a.staged_rows;
    if (step == Step::pick) {
      if (first_block) pick_from_pool(a, made, middle_count, shared, staged);
    } else {
      const bool middle = step == Step::flush_middle;
      flush(a, middle ? a.middle : nullptr, middle ? middle_count : a.cloud.n, from, to, shared, staged);
    }
    if (first_thread) state.pause[half] = nanoseconds() - began >= budget;
    grid.sync();

    if (step == Step::pick) {
      made = state.made;
      step = state.step;
    } else if (step == Step::flush_middle) {
      middle_seen = to;
      if (to == made) step = Step::pick;
    } else {
      all_seen = to;
      if (to == made && step == Step::finish) {
        done = true;
      } else if (to == made) {
        const auto candidate = [&](int64_t i) { return Best{a.picked[i] ? -1.0 : a.cloud.sq_dists[i], i}; };
        if (first_thread) state.middle_count = 0;
        const Key threshold = select<true>(candidate, a.cloud.n, a.cloud.n, a.middle_room, shared, a.counts, turn);
        Best outside = no_best();
        const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
        for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < a.cloud.n; i += threads) {
          const Best point = candidate(i);
          if (point.value < 0) continue;
          if (key_of(point, a.cloud.n) >= threshold) {
            a.middle[atomicAdd(&state.middle_count, 1)] = i;
          } else {
            outside = better(outside, point);
          }
        }
        outside = block_best(outside, shared.parts[0]);
        if (threadIdx.x == 0) a.slots[blockIdx.x] = outside;
        grid.sync();
        middle_count = state.middle_count;
        if (first_block) {
          outside = no_best();
          for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) outside = better(outside, a.slots[b]);
          outside = block_best(outside, shared.parts[1]);
          if (threadIdx.x == 0) state.outside_middle = outside;
          __syncthreads();
        }
        middle_seen = made;
        step = Step::pick;
      }
    }
    if (state.pause[half]) break;
  }

  grid.sync();  // nobody reads the state any more
  if (!first_thread) return;
  state.made = made;
  state.all_seen = all_seen;
  state.middle_seen = middle_seen;
  state.step = step;
  *a.cloud.progress = {made, -1, done};
}

}  // namespace fastif
