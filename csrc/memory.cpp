// Peak bytes of CPU tensors allocated by one thread while a PeakMemory is active. The resident size of the process
// cannot tell this: allocators keep freed pages, and a high-water mark never falls.
//
// A CountingAllocator stands before torch's own. torch would also report to a profiler, but it has room for one alone,
// and to stderr it reports every block that is freed and was there before.
//
// No stable ABI has allocators: this is a module of its own, fastif._memory, for the torch that it was built with and
// no other. fastif works without it.
#include <c10/core/CPUAllocator.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <unordered_map>
#include <utility>

// Read from the library's bytes before it is loaded (fastif/measure.py): its symbols are those of one torch.
extern "C" __attribute__((used, visibility("default"))) const char fastif_built_for[] =
    "fastif was built for torch " TORCH_VERSION;

namespace fastif {
namespace {

// What one thread has allocated since a PeakMemory of it started: these blocks alone, so that one that was there
// before, or that another thread frees, changes nothing. Its thread alone writes to it; the PeakMemory may be stopped
// in any. Whichever of the two leaves last deletes it.
struct AllocationLog {
  int64_t now = 0;
  std::atomic<int64_t> peak{0};
  std::unordered_map<const void*, int64_t> sizes;
  AllocationLog* outer = nullptr;  // of the same thread, begun before
  std::atomic<bool> left{false};   // by one of the two
  inline static std::atomic<int64_t> alive{0};

  AllocationLog() { ++alive; }
  ~AllocationLog() { --alive; }

  // The innermost log of this thread. A plain pointer: tensors are freed while a thread's objects are destroyed.
  static AllocationLog*& innermost() {
    static thread_local AllocationLog* log = nullptr;
    return log;
  }
  static void begin(AllocationLog* log) {
    struct Thread {
      ~Thread() {
        while (innermost()) std::exchange(innermost(), innermost()->outer)->leave();
      }
    };
    static thread_local const Thread thread;
    log->outer = std::exchange(innermost(), log);
  }
  // Tells every log of this thread, and leaves those that nobody will ask any more.
  template <typename Tell>
  static void each(const Tell& tell) {
    for (auto** place = &innermost(); AllocationLog* const log = *place;) {
      if (log->left) {
        *place = log->outer;
        log->leave();
      } else {
        tell(*log);
        place = &log->outer;
      }
    }
  }
  void leave() {
    if (left.exchange(true)) delete this;
  }

  void allocated(const void* block, int64_t bytes) {
    freed(block);  // by another thread, if it is there: its address is in use anew
    sizes.emplace(block, bytes);
    now += bytes;
    peak = std::max<int64_t>(peak, now);
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
    if (block)
      AllocationLog::each([&](AllocationLog& log) { log.allocated(block.get(), static_cast<int64_t>(bytes)); });
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
    AllocationLog::each([block](AllocationLog& log) { log.freed(block); });
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
    AllocationLog::begin(log_ = new AllocationLog);
  }
  // What the thread that started it has allocated until now; nothing where allocations cannot be counted.
  std::optional<int64_t> stop() {
    if (!log_) return std::nullopt;
    const int64_t peak = log_->peak;
    std::exchange(log_, nullptr)->leave();
    AllocationLog::each([](AllocationLog&) {});  // if it is of this thread, that leaves it now
    return peak;
  }
  static int64_t alive() { return AllocationLog::alive; }

 private:
  AllocationLog* log_ = nullptr;
};

}  // namespace
}  // namespace fastif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using fastif::PeakMemory;
  pybind11::class_<PeakMemory>(m, "PeakMemory")
      .def(pybind11::init<>())
      .def("start", &PeakMemory::start)
      .def("stop", &PeakMemory::stop, "Ends the measurement; returns the peak in bytes.")
      .def_static("alive", &PeakMemory::alive, "Measurements whose memory is held, of all threads.");
}
