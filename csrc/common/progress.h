// The progress of one run of an op on the CPU, whose threads all work for it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <utility>

#include "poll.h"
#include "tasks.h"

namespace fastif {

// The thread that runs the op makes one. From there on, this thread and those that it sets to work here have it for
// theirs, so that kernels need not hand it on. The thread that made it polls ten times a second. When that or a piece
// of work throws, the other threads stop where they look next, and the exception leaves the op.
class Progress {
 public:
  explicit Progress(int64_t total) : total_(total), work_(this) {}

  // `steps` more are done.
  static void advance(int64_t steps = 1) {
    if (!mine_) return;
    mine_->done_.fetch_add(steps, std::memory_order_relaxed);
    mine_->look();
  }

  // parallel_for in pieces of `grain`, with a look before each.
  template <typename F>
  static void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& piece) {
    Progress* const run = mine_;
    if (!run) return fastif::parallel_for(begin, end, grain, piece);
    fastif::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
      const Work work(run);
      try {
        for (; first < last; first += grain) {
          run->look();
          piece(first, std::min(last, first + grain));
        }
      } catch (const Stopped&) {  // another thread's exception is the reason, which parallel_for rethrows
      } catch (...) {
        run->stopped_ = true;
        throw;
      }
    });
    if (run->stopped_) throw Stopped{};  // inside another parallel_for: on to that one
  }

  // task(0), ..., task(count - 1): every thread takes one after another. The thread that polls does so to the end.
  template <typename F>
  static void for_each(int64_t count, const F& task) {
    std::atomic<int64_t> next = 0, left = count;
    struct Taken {
      std::atomic<int64_t>& left;
      ~Taken() { --left; }
    };
    parallel_for(0, num_threads(), 1, [&](int64_t, int64_t) {
      for (int64_t i; (i = next++) < count;) {
        const Taken taken{left};
        task(i);
      }
      if (!mine_ || std::this_thread::get_id() != mine_->caller_) return;
      for (int64_t waits = 0; left > 0; ++waits) {
        mine_->look();
        if (waits < 1000) {
          std::this_thread::yield();
        } else {
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
      }
    });
  }

 private:
  struct Stopped {};
  struct Work {  // while it lives, its thread works for `run`
    explicit Work(Progress* run) : before(std::exchange(mine_, run)) {}
    ~Work() { mine_ = before; }
    Work(const Work&) = delete;
    Work& operator=(const Work&) = delete;
    Progress* const before;
  };
  using Clock = std::chrono::steady_clock;

  void look() {
    if (stopped_) throw Stopped{};
    if (std::this_thread::get_id() != caller_ || Clock::now() - polled_ < std::chrono::milliseconds(100)) return;
    poll(done_, total_);
    polled_ = Clock::now();
  }

  inline static thread_local Progress* mine_ = nullptr;
  const int64_t total_;
  const Work work_;
  const std::thread::id caller_ = std::this_thread::get_id();
  std::atomic<int64_t> done_ = 0;
  std::atomic<bool> stopped_ = false;
  Clock::time_point polled_ = Clock::now();
};

}  // namespace fastif
