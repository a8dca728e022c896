#include <algorithm>

#include "lazy_kernel.cuh"
#include "lazy_launch.h"

namespace fastif {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(threads, kThreads), 1, 1 << 16));
}

// Hands out the scratch piece by piece.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename E>
  E* take(int64_t count) {
    constexpr int64_t alignment = 256;
    E* const piece = reinterpret_cast<E*>(memory_ + used_);
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(E)), alignment) * alignment;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

template <typename T>
LazyCloud<T> lazy_cloud(const LazyPlan& plan, const T* points, const Clouds& cloud, void* scratch, int64_t* used) {
  LazyCloud<T> made;
  Carver carver(scratch);
  made.points = points;
  made.cloud = cloud;
  made.codes.stride = plan.stride;
  made.codes.code = carver.take<CodeQuad>(cloud.n * plan.stride);
  made.codes.scale = carver.take<double>(cloud.n);
  made.codes.sq_norm = carver.take<double>(cloud.n);
  made.codes.residual = carver.take<double>(cloud.n);
  made.codes.mu = carver.take<double>(cloud.d);
  made.picked = carver.take<bool>(cloud.n);
  made.middle = carver.take<int64_t>(kMiddle);
  made.slots = carver.take<Best>(plan.blocks);
  made.counts = carver.take<unsigned>(3 * kDigits);
  made.state = carver.take<LazyState>(1);
  made.middle_room = kMiddle;
  made.pool_room = kPool;
  made.staged_rows = plan.staged_rows;
  made.pitch = plan.pitch;
  if (used) *used = carver.used();
  return made;
}

}  // namespace

template <typename T>
cudaError_t farthest_first_lazy_plan(int64_t n, int64_t d, int device, LazyPlan* plan) {
  *plan = {};
  if (d > kMaxCodeDim) return cudaSuccess;
  const auto kernel = farthest_first_lazy_kernel<T>;
  int processors = 0, most = 0, per_processor = 0;
  cudaFuncAttributes attributes;
  if (auto error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (auto error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  if (auto error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  plan->stride = static_cast<int>(ceil_div(d, kCodeChunk)) * kChunkQuads;
  // An odd number of chunks apart, the codes of neighbouring rows lie in different banks.
  plan->pitch = plan->stride / kChunkQuads % 2 == 1 ? plan->stride : plan->stride + kChunkQuads;
  const int64_t room = (most - static_cast<int64_t>(attributes.sharedSizeBytes)) / (plan->pitch * kQuad);
  plan->staged_rows = static_cast<int>(room >= 64 ? std::min<int64_t>(room / 64 * 64, kCentres) : room / 8 * 8);
  if (plan->staged_rows == 0 || n * plan->stride >= int64_t{1} << 32) return cudaSuccess;
  plan->shared_bytes = static_cast<int64_t>(plan->staged_rows) * plan->pitch * kQuad;
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(plan->shared_bytes)))
    return error;
  if (auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kLazyThreads,
                                                                 static_cast<size_t>(plan->shared_bytes)))
    return error;
  if (per_processor == 0) return cudaSuccess;
  plan->usable = true;
  plan->blocks =
      static_cast<int>(std::min<int64_t>(static_cast<int64_t>(processors) * per_processor, ceil_div(n, kLazyThreads)));
  lazy_cloud<T>(*plan, nullptr, {.n = n, .d = d}, nullptr, &plan->scratch_bytes);
  return cudaSuccess;
}

template <typename T>
void farthest_first_lazy_begin(const LazyPlan& plan, const T* points, const Clouds& cloud, void* scratch,
                               cudaStream_t stream) {
  const auto a = lazy_cloud(plan, points, cloud, scratch, nullptr);
  farthest_first_lazy_begin_kernel<T><<<blocks_for(cloud.n), kThreads, 0, stream>>>(a);
  farthest_first_middle_kernel<T><<<blocks_for(cloud.d * kWarp), kThreads, 0, stream>>>(
      points, cloud.n, cloud.d, cloud.mask, cloud.starts, a.codes);
  farthest_first_encode_kernel<T>
      <<<blocks_for(cloud.n * kWarp), kThreads, 0, stream>>>(points, cloud.n, cloud.d, cloud.mask, a.codes);
}

template <typename T>
cudaError_t farthest_first_lazy_launch(const LazyPlan& plan, const T* points, const Clouds& cloud, void* scratch,
                                       uint64_t budget, cudaStream_t stream) {
  auto a = lazy_cloud(plan, points, cloud, scratch, nullptr);
  void* arguments[] = {&a, &budget};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(farthest_first_lazy_kernel<T>), dim3(plan.blocks),
                                     dim3(kLazyThreads), arguments, static_cast<size_t>(plan.shared_bytes), stream);
}

#define FASTIF_INSTANTIATE(T)                                                                                   \
  template cudaError_t farthest_first_lazy_plan<T>(int64_t, int64_t, int, LazyPlan*);                           \
  template void farthest_first_lazy_begin<T>(const LazyPlan&, const T*, const Clouds&, void*, cudaStream_t);    \
  template cudaError_t farthest_first_lazy_launch<T>(const LazyPlan&, const T*, const Clouds&, void*, uint64_t, \
                                                     cudaStream_t);
FASTIF_INSTANTIATE(float)
FASTIF_INSTANTIATE(double)

}  // namespace fastif
