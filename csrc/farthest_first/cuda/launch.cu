#include <algorithm>

#include "kernel.cuh"
#include "launch.h"

namespace fastif {
namespace {

// Without opting in to more, a block has 48 KiB of shared memory; 2 KiB are kept for the reductions.
constexpr int64_t kCentreBytes = 46 * 1024;

template <typename T, bool kWholeGrid>
auto kernel_of(int64_t d) {
  const bool cached = d * static_cast<int64_t>(sizeof(double)) <= kCentreBytes;
  return cached ? farthest_first_kernel<T, true, kWholeGrid> : farthest_first_kernel<T, false, kWholeGrid>;
}

size_t shared_bytes(int64_t d) {
  const int64_t bytes = d * static_cast<int64_t>(sizeof(double));
  return bytes <= kCentreBytes ? static_cast<size_t>(bytes) : 0;
}

constexpr int kThreads = 256;

unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(items, kThreads), 1, 1 << 16));
}

}  // namespace

template <typename T>
cudaError_t farthest_first_plan(int64_t n, int64_t d, int device, FarthestPlan* plan) {
  int processors = 0, of_grid = 0, of_blocks = 0;
  if (auto error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_grid, kernel_of<T, true>(d), kFarthestThreads,
                                                                 shared_bytes(d)))
    return error;
  if (auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_blocks, kernel_of<T, false>(d),
                                                                 kFarthestBlockThreads, shared_bytes(d)))
    return error;
  const int64_t rows_per_block = kFarthestThreads / kWarp * kFarthestRows;
  plan->blocks =
      static_cast<int>(std::min<int64_t>(static_cast<int64_t>(processors) * of_grid, ceil_div(n, rows_per_block)));
  plan->slot_bytes = 2 * static_cast<int64_t>(sizeof(Best)) * plan->blocks;
  plan->clouds_at_once = static_cast<int64_t>(processors) * of_blocks;
  return cudaSuccess;
}

void farthest_first_begin(const Clouds& clouds, int64_t b, cudaStream_t stream) {
  farthest_first_begin_kernel<<<blocks_for(b * clouds.n), kThreads, 0, stream>>>(clouds, b);
}

void farthest_first_end(const Clouds& clouds, int64_t b, cudaStream_t stream) {
  farthest_first_end_kernel<<<blocks_for(b * clouds.n), kThreads, 0, stream>>>(clouds, b);
}

template <typename T>
cudaError_t farthest_first_launch(const FarthestPlan& plan, const T* points, const Clouds& cloud, int64_t last,
                                  void* slots, cudaStream_t stream) {
  Clouds clouds = cloud;
  int64_t first_cloud = 0;
  Best* best = static_cast<Best*>(slots);
  void* arguments[] = {&points, &clouds, &first_cloud, &last, &best};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel_of<T, true>(cloud.d)), dim3(plan.blocks),
                                     dim3(kFarthestThreads), arguments, shared_bytes(cloud.d), stream);
}

template <typename T>
void farthest_first_launch_blocks(const T* points, const Clouds& clouds, int64_t b, int64_t last, cudaStream_t stream) {
  constexpr int64_t most = (int64_t{1} << 31) - 1;  // blocks of a launch
  const auto kernel = kernel_of<T, false>(clouds.d);
  for (int64_t first = 0; first < b; first += most) {
    const auto blocks = static_cast<unsigned>(std::min(most, b - first));
    kernel<<<blocks, kFarthestBlockThreads, shared_bytes(clouds.d), stream>>>(points, clouds, first, last, nullptr);
  }
}

#define FASTIF_INSTANTIATE(T)                                                                                 \
  template cudaError_t farthest_first_plan<T>(int64_t, int64_t, int, FarthestPlan*);                          \
  template cudaError_t farthest_first_launch<T>(const FarthestPlan&, const T*, const Clouds&, int64_t, void*, \
                                                cudaStream_t);                                                \
  template void farthest_first_launch_blocks<T>(const T*, const Clouds&, int64_t, int64_t, cudaStream_t);
FASTIF_INSTANTIATE(float)
FASTIF_INSTANTIATE(double)

}  // namespace fastif
