// A block's threads as fibers, and how they are switched between: what cuda_emu.h is built on.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMU_TSAN 1
#define EMU_INTERNAL __attribute__((no_sanitize("thread"), noinline))
#else
#define EMU_TSAN 0
#define EMU_INTERNAL
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emu {

inline constexpr int kLanes = 32;
inline constexpr size_t kStackBytes = EMU_TSAN || EMU_ASAN ? 128 * 1024 : 64 * 1024;

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, continues at another's.
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.weak emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");
#endif

struct Fiber {
  dim3 thread;
  unsigned id = 0, lane = 0, warp = 0;
  bool done = false;
  char* stack = nullptr;
#if defined(__x86_64__)
  void* saved = nullptr;
#else
  ucontext_t saved;
#endif
  void* tsan = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// A meeting of the lanes of one mask. Values are kept for two generations: no lane can be further ahead than that.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  uint64_t generation = 0, value[2][kLanes];
};

inline constexpr int kMeetings = 16, kSharedObjects = 16;

struct GridBarrier {
  std::mutex mutex;
  std::condition_variable changed;
  unsigned blocks = 0, arrived = 0, exited = 0;
  uint64_t generation = 0;
};

struct Block {
  dim3 index, threads, grid;
  unsigned number = 0, count = 0, at_barrier = 0, live = 0;
  uint64_t generation = 0, progress = 0;
  int barrier_line = 0;
  const std::function<void()>* body = nullptr;
  GridBarrier* grid_barrier = nullptr;
  std::unique_ptr<Fiber[]> fibers;
  std::unique_ptr<Meeting[]> meetings;  // [warps, kMeetings]
  Fiber* current = nullptr;
  Fiber scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  struct {
    const void* key = nullptr;
    void* memory = nullptr;
  } shared[kSharedObjects];
  size_t dynamic_bytes = 0;
  uint64_t order_of[2] = {}, start = 0, end = 0;  // addresses that stand for the barrier's generations, the two ends
};

inline thread_local Block* block = nullptr;

EMU_INTERNAL inline void switch_to(Fiber& from, Fiber& to, bool from_ends) {
  (void)from_ends;
#if EMU_ASAN
  const bool to_scheduler = &to == &block->scheduler;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack,
                                 to_scheduler ? block->scheduler_stack : to.stack,
                                 to_scheduler ? block->scheduler_stack_bytes : kStackBytes);
#endif
#if EMU_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  emu_switch(&from.saved, to.saved);
#else
  swapcontext(&from.saved, &to.saved);
#endif
#if EMU_ASAN
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(from.fake_stack, &bottom, &bytes);
  if (&from == &block->scheduler) return;
  block->scheduler_stack = bottom;
  block->scheduler_stack_bytes = bytes;
#endif
}

EMU_INTERNAL inline void pause() { switch_to(*block->current, block->scheduler, false); }

inline void happens_before(void* address) {
#if EMU_TSAN
  __tsan_release(address);
#endif
  (void)address;
}

inline void happens_after(void* address) {
#if EMU_TSAN
  __tsan_acquire(address);
#endif
  (void)address;
}

EMU_INTERNAL inline void finish() {
  happens_before(&block->end);
  block->current->done = true;
  --block->live;
  ++block->progress;
  switch_to(*block->current, block->scheduler, true);
  std::abort();
}

EMU_INTERNAL inline const std::function<void()>* kernel() { return block->body; }

EMU_INTERNAL inline void entry() {
  happens_after(&block->start);
#if EMU_ASAN
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  block->scheduler_stack = bottom;
  block->scheduler_stack_bytes = bytes;
#endif
  (*kernel())();
  finish();
}

// Stacks, and the sanitizer's view of a thread, are costly to make: they are used again by later blocks. Each worker of
// a launch keeps its own, for a lock between them would order accesses of blocks that nothing orders on a GPU.
struct Means {
  char* stack = nullptr;
  void* tsan = nullptr;
};

struct Pool {
  std::vector<std::vector<Means>> of_worker;  // grown between launches
  ~Pool() {
    for (auto& spare : of_worker)
      for (const Means& means : spare) std::free(means.stack);
  }
};

inline Pool pool;

inline Means take_means(std::vector<Means>& spare) {
  if (!spare.empty()) {
    const Means means = spare.back();
    spare.pop_back();
#if EMU_ASAN
    __asan_unpoison_memory_region(means.stack, kStackBytes);  // frames that never returned
#endif
    return means;
  }
  Means means;
  means.stack = static_cast<char*>(std::aligned_alloc(64, kStackBytes));
#if EMU_TSAN
  means.tsan = __tsan_create_fiber(0);
#endif
  return means;
}

inline void prepare(Fiber& fiber, std::vector<Means>& spare) {
  const Means means = take_means(spare);
  fiber.stack = means.stack;
  fiber.tsan = means.tsan;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 2;  // entry() finds the stack as after a call
  *top = reinterpret_cast<void*>(&entry);
  for (int r = 0; r < 6; ++r) *--top = nullptr;
  fiber.saved = top;
#else
  getcontext(&fiber.saved);
  fiber.saved.uc_stack.ss_sp = fiber.stack;
  fiber.saved.uc_stack.ss_size = kStackBytes;
  fiber.saved.uc_link = nullptr;
  makecontext(&fiber.saved, entry, 0);
#endif
}

}  // namespace emu
