#include <algorithm>

#include "farthest_first_kernel.cuh"
#include "farthest_first_launch.h"

namespace fastif {
namespace {

// Without opting in to more, a block has 48 KiB of shared memory; 2 KiB are kept for the reductions.
constexpr int64_t kCentreBytes = 46 * 1024;

template <typename T>
auto kernel_of(int64_t d) {
  const bool cached = d * static_cast<int64_t>(sizeof(double)) <= kCentreBytes;
  return cached ? farthest_first_kernel<T, true> : farthest_first_kernel<T, false>;
}

size_t shared_bytes(int64_t d) {
  const int64_t bytes = d * static_cast<int64_t>(sizeof(double));
  return bytes <= kCentreBytes ? static_cast<size_t>(bytes) : 0;
}

}  // namespace

template <typename T>
cudaError_t farthest_first_plan(int64_t n, int64_t d, int device, int* blocks, int64_t* slot_bytes) {
  int processors = 0, resident = 0;
  if (auto error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (auto error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel_of<T>(d), kFarthestThreads, shared_bytes(d)))
    return error;
  const int64_t rows_per_block = kFarthestThreads / kWarp * kFarthestRows;
  *blocks =
      static_cast<int>(std::min<int64_t>(static_cast<int64_t>(processors) * resident, ceil_div(n, rows_per_block)));
  *slot_bytes = 2 * static_cast<int64_t>(sizeof(Best)) * *blocks;
  return cudaSuccess;
}

template <typename T>
cudaError_t farthest_first_launch(const T* points, int64_t n, int64_t d, int64_t k, int64_t start, int64_t* indices,
                                  double* sq_radii, double* sq_dists, int64_t* nearest, void* slots, int blocks,
                                  cudaStream_t stream) {
  Best* best = static_cast<Best*>(slots);
  void* arguments[] = {&points, &n, &d, &k, &start, &indices, &sq_radii, &sq_dists, &nearest, &best};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel_of<T>(d)), dim3(blocks),
                                     dim3(kFarthestThreads), arguments, shared_bytes(d), stream);
}

#define FASTIF_INSTANTIATE(T)                                                                                    \
  template cudaError_t farthest_first_plan<T>(int64_t, int64_t, int, int*, int64_t*);                            \
  template cudaError_t farthest_first_launch<T>(const T*, int64_t, int64_t, int64_t, int64_t, int64_t*, double*, \
                                                double*, int64_t*, void*, int, cudaStream_t);
FASTIF_INSTANTIATE(float)
FASTIF_INSTANTIATE(double)

}  // namespace fastif
