// Peak bytes of CPU tensors allocated by one thread while a PeakMemory is active. The resident size of the process
// cannot tell this: allocators keep freed pages, and a high-water mark never falls.
//
// A CountingAllocator stands before torch's own. torch would also report to a profiler, but it has room for one alone,
// and to stderr it reports every block that is freed and was there before.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <utility>

namespace fastif {

// What one thread has allocated since a PeakMemory of it started: these blocks alone, so that one that was there
// before, or that another thread frees, changes nothing.
struct AllocationLog {
  int64_t now = 0, peak = 0;
  std::unordered_map<const void*, int64_t> sizes;
  AllocationLog* outer = nullptr;  // of the same thread, begun before

  // The innermost log of this thread. A plain pointer: tensors are freed while a thread's objects are destroyed.
  static AllocationLog*& active() {
    static thread_local AllocationLog* log = nullptr;
    return log;
  }
  void allocated(const void* block, int64_t bytes) {
    freed(block);  // by another thread, if it is there: its address is in use anew
    sizes.emplace(block, bytes);
    now += bytes;
    peak = std::max(peak, now);
  }
  void freed(const void* block) {
    const auto found = sizes.find(block);
    if (found == sizes.end()) return;
    now -= found->second;
    sizes.erase(found);
  }
};

// Hands every call on to the allocator that was there before it, and tells the logs of the calling thread.
class CountingAllocator : public c10::Allocator {
 public:
  // Puts it in its place, once; whether it is there: an allocator of a higher priority may be, or one that cannot be
  // stood before.
  static bool install() {
    static const CountingAllocator* counting = [] {  // never destroyed: there are blocks to the end
      before() = c10::GetCPUAllocator();
      auto* made = new CountingAllocator;
      if (before()->raw_deleter()) c10::SetCPUAllocator(made);
      return made;
    }();
    return c10::GetCPUAllocator() == counting;
  }

  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr block = before()->allocate(bytes);
    const bool ours = block.compare_exchange_deleter(before()->raw_deleter(), &release);
    TORCH_INTERNAL_ASSERT(ours, "CountingAllocator: a block has another deleter than its allocator");
    for (auto* log = AllocationLog::active(); log && block; log = log->outer)
      log->allocated(block.get(), static_cast<int64_t>(bytes));
    return block;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { before()->copy_data(to, from, bytes); }

 private:
  static c10::Allocator*& before() {
    static c10::Allocator* allocator = nullptr;
    return allocator;
  }
  static void release(void* block) {
    for (auto* log = AllocationLog::active(); log; log = log->outer) log->freed(block);
    before()->raw_deleter()(block);
  }
};

class PeakMemory {
 public:
  PeakMemory() = default;
  PeakMemory(const PeakMemory&) = delete;
  PeakMemory& operator=(const PeakMemory&) = delete;
  ~PeakMemory() { stop(); }

  void start() {
    TORCH_CHECK_VALUE(!log_, "PeakMemory: is already active");
    if (!CountingAllocator::install()) return;
    log_ = new AllocationLog;
    log_->outer = std::exchange(AllocationLog::active(), log_);
  }
  std::optional<int64_t> stop() {  // nothing where allocations cannot be counted, and in a thread that did not start it
    AllocationLog* const mine = std::exchange(log_, nullptr);
    for (auto** place = &AllocationLog::active(); mine && *place; place = &(*place)->outer) {
      if (*place != mine) continue;
      *place = mine->outer;
      const int64_t peak = mine->peak;
      delete mine;
      return peak;
    }
    return std::nullopt;  // a log of another thread stays with it
  }

 private:
  AllocationLog* log_ = nullptr;
};

}  // namespace fastif
