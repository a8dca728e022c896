// Work cut into tasks that do not depend on the number of threads, so that no result does.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <atomic>

namespace fastif {

// A single task gets two threads, of which one rests: outside a parallel region a matrix product would take them all,
// and cut its sums accordingly.
inline int64_t threads_for(int64_t tasks) {
  return std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(2, tasks));
}

// Calls work(task, thread) for every task, thread < threads_for(tasks). Which thread takes which task is left to
// chance. Tensor operations inside run on the one thread, past autograd and autocast, whose state is each thread's own.
template <typename Work>
void for_tasks(int64_t tasks, Work work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads_for(tasks), 1, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t task; (task = next++) < tasks;) work(task, thread);
    }
  });
}

}  // namespace fastif
