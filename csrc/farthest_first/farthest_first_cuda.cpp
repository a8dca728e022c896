#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "farthest_first.h"
#include "farthest_first_launch.h"

namespace fastif {
namespace {

template <typename T>
void run(const at::Tensor& points, int64_t k, int64_t start, at::Tensor& indices, at::Tensor& sq_radii,
         at::Tensor& sq_dists, at::Tensor& nearest) {
  const int64_t n = points.size(0), d = points.size(1);
  int blocks = 0;
  int64_t slot_bytes = 0;
  C10_CUDA_CHECK(farthest_first_plan<T>(n, d, points.get_device(), &blocks, &slot_bytes));
  auto slots = at::empty({slot_bytes}, points.options().dtype(at::kByte));
  C10_CUDA_CHECK(farthest_first_launch<T>(points.const_data_ptr<T>(), n, d, k, start,
                                          indices.mutable_data_ptr<int64_t>(), sq_radii.mutable_data_ptr<double>(),
                                          sq_dists.mutable_data_ptr<double>(), nearest.mutable_data_ptr<int64_t>(),
                                          slots.mutable_data_ptr(), blocks, c10::cuda::getCurrentCUDAStream()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> farthest_first_cuda(const at::Tensor& points,  // [n, d]
                                                                               int64_t k, int64_t start) {
  check_farthest_first(points, k, start);
  const c10::cuda::CUDAGuard guard(points.device());
  const auto x = points.contiguous();
  auto indices = at::empty({k}, x.options().dtype(at::kLong));
  auto sq_radii = at::empty({k}, x.options().dtype(at::kDouble));
  auto sq_dists = at::empty({x.size(0)}, x.options().dtype(at::kDouble));
  auto nearest = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  if (x.scalar_type() == at::kFloat) {
    run<float>(x, k, start, indices, sq_radii, sq_dists, nearest);
  } else {
    run<double>(x, k, start, indices, sq_radii, sq_dists, nearest);
  }
  return {indices, sq_radii, sq_dists, nearest};
}

}  // namespace
}  // namespace fastif

TORCH_LIBRARY_IMPL(fastif, CUDA, m) { m.impl("farthest_first", fastif::farthest_first_cuda); }
