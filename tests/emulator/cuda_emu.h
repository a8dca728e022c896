// Runs CUDA kernel code on the host: a block is an OS thread, and its CUDA threads are fibers that the block's thread
// switches between in a chosen order. What it is for is finding mistakes, so it is strict:
//   * Shared memory is allocated per block and filled with 0xff (NaN, -1): reading what nobody wrote shows.
//   * Barriers: every thread must arrive, all at the same source line. Anything else is reported as divergence, and
//     where; the process then exits with kFault.
//   * Warp operations wait for exactly the lanes in their mask and check that the caller is one of them.
//   * Under -fsanitize=thread each CUDA thread is a thread of its own to the sanitizer. Only barriers, __syncwarp and
//     grid.sync order their accesses (shuffles do not): a missing barrier is a data race even where it did no harm.
//   * Under -fsanitize=address an access past the end of shared memory lands in a red zone.
//   * Atomics are atomic, and order nothing else.
// It knows nothing of speed, of weak memory order, of alignment, or of what was not needed here (textures, ...). Tensor
// cores: tensor_core_emu.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "fibers_emu.h"

namespace emu {

enum class Order { forward, reverse, shuffle };  // in which warps, and lanes of a warp, get their turn

struct Schedule {
  Order order = Order::forward;
  bool greedy = true;  // a warp runs until it can go no further; else each thread runs to its next wait, in turn
  unsigned seed = 0;
};

inline Schedule schedule;
inline constexpr int kFault = 3;  // exit status when the emulator finds misuse

[[noreturn]] inline void fault(const char* message, unsigned block) {
  std::fprintf(stderr, "emulator: block %u: %s\n", block, message);
  std::fflush(stderr);
  std::_Exit(kFault);
}

// --- What kernels call ----------------------------------------------------------------------------------------------

EMU_INTERNAL inline const dim3& thread_index() { return block->current->thread; }
EMU_INTERNAL inline const dim3& block_index() { return block->index; }
EMU_INTERNAL inline const dim3& block_dim() { return block->threads; }
EMU_INTERNAL inline const dim3& grid_dim() { return block->grid; }

EMU_INTERNAL inline void meet_block(int line, bool whole_grid) {
  Block& b = *block;
  uint64_t* const order = &b.order_of[b.generation % 2];
  happens_before(order);
  ++b.progress;
  const int place = whole_grid ? -line : line;
  if (b.at_barrier == 0) b.barrier_line = place;
  if (b.barrier_line != place) {
    char text[160];
    std::snprintf(text, sizeof text, "divergent barrier: thread %u at line %d, others at line %d", b.current->id,
                  std::abs(place), std::abs(b.barrier_line));
    fault(text, b.number);
  }
  const uint64_t generation = b.generation;
  if (++b.at_barrier == b.count) {
    happens_after(order);
    if (whole_grid) {
      if (b.grid_barrier == nullptr) fault("grid.sync in a launch that is not cooperative", b.number);
      GridBarrier& g = *b.grid_barrier;
      std::unique_lock lock(g.mutex);
      const uint64_t round = g.generation;
      if (g.exited > 0) fault("grid.sync after a block has exited", b.number);
      if (++g.arrived == g.blocks) {
        g.arrived = 0;
        ++g.generation;
        g.changed.notify_all();
      } else {
        while (g.generation == round) g.changed.wait(lock);
      }
      lock.unlock();
      happens_before(order);
    }
    b.at_barrier = 0;
    ++b.generation;
  } else {
    while (b.generation == generation) pause();
  }
  happens_after(order);
}

// Every lane of `mask` gives a value; all 32 are returned.
EMU_INTERNAL inline const uint64_t* exchange(unsigned mask, uint64_t value, bool orders_memory) {
  Block& b = *block;
  Fiber& self = *b.current;
  if (!(mask >> self.lane & 1)) fault("a lane calls a warp operation with a mask that it is not in", b.number);
  Meeting* m = &b.meetings[self.warp * kMeetings];
  Meeting* const end = m + kMeetings;
  while (m != end && m->mask != mask && m->mask != 0) ++m;
  if (m == end) fault("too many different warp masks", b.number);
  m->mask = mask;
  const uint64_t generation = m->generation;
  uint64_t* const values = m->value[generation % 2];
  if (orders_memory) happens_before(values);
  values[self.lane] = value;
  ++b.progress;
  if (++m->arrived == static_cast<unsigned>(__builtin_popcount(mask))) {
    m->arrived = 0;
    ++m->generation;
  } else {
    while (m->generation == generation) pause();
  }
  if (orders_memory) happens_after(values);
  return values;
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
EMU_INTERNAL T from_lane(const uint64_t* values, unsigned lane) {
  const uint64_t bits = values[lane % kLanes];
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

EMU_INTERNAL inline unsigned own_lane() { return block->current->lane; }

// The block's object for this declaration: made by the first thread that reaches it.
EMU_INTERNAL inline void* shared_memory(const void* key, size_t bytes, size_t alignment) {
  for (auto& object : block->shared) {
    if (object.key == key) {
      happens_after(object.memory);  // its making, nothing later
      return object.memory;
    }
    if (object.key != nullptr) continue;
    const size_t whole = (bytes + alignment - 1) / alignment * alignment;
    object.key = key;
    object.memory = std::aligned_alloc(alignment, whole == 0 ? alignment : whole);
    __builtin_memset(object.memory, 0xff, whole);
    happens_before(object.memory);
    return object.memory;
  }
  fault("too many shared objects", block->number);
}

// A clock that ticks when it is read, a microsecond at a time; each block of a launch has its own.
inline thread_local uint64_t ticks = 0;
EMU_INTERNAL inline uint64_t nanoseconds() { return 1000 * ++ticks; }

EMU_INTERNAL inline size_t dynamic_bytes() { return block->dynamic_bytes; }

// --- Running --------------------------------------------------------------------------------------------------------

EMU_INTERNAL inline bool is_done(const Fiber& fiber) { return fiber.done; }

EMU_INTERNAL inline void schedule_block(Block& b) {
  const unsigned warps = (b.count + kLanes - 1) / kLanes;
  std::vector<unsigned> warp_order(warps), lane_order(kLanes);
  for (unsigned w = 0; w < warps; ++w) warp_order[w] = schedule.order == Order::reverse ? warps - 1 - w : w;
  for (unsigned l = 0; l < kLanes; ++l) lane_order[l] = schedule.order == Order::reverse ? kLanes - 1 - l : l;
  std::mt19937 random(schedule.seed + 7919 * b.number);
  uint64_t seen = ~uint64_t{0};
  while (b.live > 0) {
    if (seen == b.progress) {
      char text[160];
      std::snprintf(text, sizeof text, "deadlock: %u of %u threads wait at the barrier of line %d, %u have not ended",
                    b.at_barrier, b.count, std::abs(b.barrier_line), b.live);
      fault(text, b.number);
    }
    seen = b.progress;
    if (schedule.order == Order::shuffle) {
      std::shuffle(warp_order.begin(), warp_order.end(), random);
      std::shuffle(lane_order.begin(), lane_order.end(), random);
    }
    for (const unsigned warp : warp_order) {
      uint64_t before;
      do {
        before = b.progress;
        for (const unsigned lane : lane_order) {
          const unsigned id = warp * kLanes + lane;
          if (id >= b.count || is_done(b.fibers[id])) continue;
          b.current = &b.fibers[id];
          switch_to(b.scheduler, *b.current, false);
        }
      } while (schedule.greedy && before != b.progress);
    }
  }
}

inline void run_block(Block& b, std::vector<Means>& spare) {
  block = &b;
  b.count = b.live = b.threads.x * b.threads.y * b.threads.z;
  b.fibers = std::make_unique<Fiber[]>(b.count);
  b.meetings = std::make_unique<Meeting[]>(static_cast<size_t>((b.count + kLanes - 1) / kLanes) * kMeetings);
#if EMU_TSAN
  b.scheduler.tsan = __tsan_get_current_fiber();
#endif
  for (unsigned id = 0; id < b.count; ++id) {
    Fiber& fiber = b.fibers[id];
    fiber.id = id;
    fiber.lane = id % kLanes;
    fiber.warp = id / kLanes;
    fiber.thread = {id % b.threads.x, id / b.threads.x % b.threads.y, id / (b.threads.x * b.threads.y)};
    prepare(fiber, spare);
  }
  happens_before(&b.start);
  schedule_block(b);
  happens_after(&b.end);
  for (unsigned id = 0; id < b.count; ++id) spare.push_back({b.fibers[id].stack, b.fibers[id].tsan});
  for (auto& object : b.shared) std::free(object.memory);
  if (b.grid_barrier != nullptr) {
    std::lock_guard lock(b.grid_barrier->mutex);
    ++b.grid_barrier->exited;
    if (b.grid_barrier->arrived > 0) fault("a block exits while others wait in grid.sync", b.number);
  }
  block = nullptr;
}

// Runs `body` as a kernel: emu::launch(grid, threads, dynamic_bytes, [=] { kernel(args...); }). A cooperative launch
// has all blocks at once, as many OS threads; else two threads take the blocks in turn.
inline void launch(dim3 grid, dim3 threads, size_t dynamic_bytes, const std::function<void()>& body,
                   bool cooperative = false) {
  const unsigned blocks = grid.x * grid.y * grid.z;
  GridBarrier barrier;
  barrier.blocks = blocks;
  const unsigned workers = cooperative ? blocks : std::min(blocks, 2u);
  if (pool.of_worker.size() < workers) pool.of_worker.resize(workers);
  std::vector<std::thread> team;
  for (unsigned w = 0; w < workers; ++w) {
    team.emplace_back([&, w] {
      for (unsigned number = w; number < blocks; number += workers) {
        Block b;
        b.number = number;
        b.index = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
        b.threads = threads;
        b.grid = grid;
        b.body = &body;
        b.dynamic_bytes = dynamic_bytes;
        b.grid_barrier = cooperative ? &barrier : nullptr;
        run_block(b, pool.of_worker[w]);
      }
    });
  }
  for (auto& thread : team) thread.join();
}

}  // namespace emu

// --- The language ---------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_dim())
#define gridDim (emu::grid_dim())
#define __syncthreads() emu::meet_block(__LINE__, false)
#define FASTIF_SHARED(type, name)   \
  static const char name##_key = 0; \
  type& name = *static_cast<type*>(emu::shared_memory(&name##_key, sizeof(type), 64))
#define FASTIF_DYNAMIC_SHARED(type, name) \
  static const char name##_key = 0;       \
  type* const name = static_cast<type*>(emu::shared_memory(&name##_key, emu::dynamic_bytes(), 16))

inline void __syncwarp(unsigned mask = ~0u) { emu::exchange(mask, 0, true); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned offset) {
  const uint64_t* const values = emu::exchange(mask, emu::to_bits(value), false);
  return emu::from_lane<T>(values, emu::own_lane() ^ offset);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned lane) {
  return emu::from_lane<T>(emu::exchange(mask, emu::to_bits(value), false), lane);
}

inline unsigned __ballot_sync(unsigned mask, bool holds) {
  const uint64_t* const values = emu::exchange(mask, holds, false);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < emu::kLanes; ++lane)
    if (mask >> lane & 1) ballot |= emu::from_lane<unsigned>(values, lane) << lane;
  return ballot;
}

template <typename T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }

inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(emu::to_bits(value)); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline long long __double_as_longlong(double value) { return static_cast<long long>(emu::to_bits(value)); }

// Compiled with -ffp-contract=off: each operation is rounded on its own.
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }

// a b + c toward zero, where it fits a double.
inline float __fmaf_rz(float a, float b, float c) {
  const double exact = static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c);
  const float nearest = static_cast<float>(exact);
  return std::abs(static_cast<double>(nearest)) > std::abs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

namespace cooperative_groups {
struct grid_group {
  void sync(int line = __builtin_LINE()) const { emu::meet_block(line, true); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups
