// Work cut into tasks that do not depend on the number of threads, so that no result does.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

// Of MKL, where torch was built with it; as torch sets it up, it otherwise cuts the sums of a product by the number of
// threads even where it may use one alone.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int);

namespace fastif {

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// piece(first, last) on pieces of [begin, end), each of `grain` or more, by torch's threads. What a piece throws leaves
// this as it is: across the stable ABI it would lose its type and its text.
template <typename Piece>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Piece& piece) {
  std::exception_ptr thrown;
  std::mutex guard;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      piece(first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!thrown) thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

// While it lives, matrix products of this thread take one thread, and their sums are cut as one thread cuts them.
class OneThread {
 public:
  OneThread() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

// A single task gets two threads, of which one rests: outside a parallel region a matrix product would take them all,
// and cut its sums accordingly.
inline int64_t threads_for(int64_t tasks) { return std::min<int64_t>(num_threads(), std::max<int64_t>(2, tasks)); }

// Calls work(task, thread) for every task, thread < threads_for(tasks). Which thread takes which task is left to
// chance.
template <typename Work>
void for_tasks(int64_t tasks, const Work& work) {
  std::atomic<int64_t> next{0};
  parallel_for(0, threads_for(tasks), 1, [&](int64_t first, int64_t last) {
    const OneThread one_thread;
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t task; (task = next++) < tasks;) work(task, thread);
    }
  });
}

}  // namespace fastif
