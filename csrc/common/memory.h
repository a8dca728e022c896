// Peak bytes of CPU tensors allocated by one thread while a PeakMemory is active. The resident size of the process
// cannot tell this: allocators keep freed pages, and a high-water mark never falls.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <memory>
#include <optional>

namespace fastif {

class PeakMemory {
 public:
  void start() {
    TORCH_CHECK_VALUE(!log_, "PeakMemory: is already active");
    // The place is torch's profiler's, which takes whatever it finds there for its own. Nobody is put out of it:
    // neither a profiler nor an outer measurement.
    if (c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE)) return;
    log_ = std::make_shared<Log>();
    c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, log_);
  }
  std::optional<int64_t> stop() {  // nothing if somebody else was measuring
    if (!log_) return std::nullopt;
    c10::ThreadLocalDebugInfo::_pop(c10::DebugInfoKind::PROFILER_STATE);
    const int64_t peak = log_->peak;
    log_.reset();
    return peak;
  }

 private:
  struct Log : c10::MemoryReportingInfoBase {
    int64_t now = 0, peak = 0;
    void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device device) override {
      if (!device.is_cpu()) return;
      now += bytes;  // negative when freed
      peak = std::max(peak, now);
    }
    bool memoryProfilingEnabled() const override { return true; }
  };
  std::shared_ptr<Log> log_;
};

}  // namespace fastif
