// The progress of one run of an op on the CPU, shared by its threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "poll.h"

namespace fastif {

// The thread that made it, which runs the op, polls ten times a second. When that throws, the other threads stop where
// they look next, and the exception leaves the op.
class Progress {
 public:
  explicit Progress(int64_t total) : total_(total) {}

  void advance(int64_t steps = 1) {
    done_.fetch_add(steps, std::memory_order_relaxed);
    look();
  }

  // at::parallel_for in pieces of `grain`, with a look before each.
  template <typename F>
  void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& piece) {
    at::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
      try {
        for (; first < last; first += grain) {
          look();
          piece(first, std::min(last, first + grain));
        }
      } catch (const Stopped&) {  // at::parallel_for throws on what came first: let it be the reason
      }
    });
    if (stopped_) throw Stopped{};  // inside another parallel_for: on to that one
  }

 private:
  struct Stopped {};
  using Clock = std::chrono::steady_clock;

  void look() {
    if (std::this_thread::get_id() != caller_) {
      if (stopped_) throw Stopped{};
      return;
    }
    const auto now = Clock::now();
    if (now - polled_ < std::chrono::milliseconds(100)) return;
    try {
      poll(done_, total_);
    } catch (...) {
      stopped_ = true;
      throw;
    }
    polled_ = Clock::now();
  }

  const int64_t total_;
  const std::thread::id caller_ = std::this_thread::get_id();
  std::atomic<int64_t> done_ = 0;
  std::atomic<bool> stopped_ = false;
  Clock::time_point polled_ = Clock::now();
};

}  // namespace fastif
