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

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> farthest_first_cuda(const at::Tensor& points, int64_t k,
                                                                               const at::Tensor& start,
                                                                               const std::optional<at::Tensor>& picks,
                                                                               const std::optional<at::Tensor>& mask,
                                                                               std::optional<double> until_radius) {
  const auto arguments = check_farthest_first(points, k, start, picks, mask, until_radius);
  TORCH_CHECK_NOT_IMPLEMENTED(arguments.starts() == 1 && !picks && !mask && !until_radius,
                              "farthest_first: several starts, picks, mask and until_radius are not on CUDA yet");
  const c10::cuda::CUDAGuard guard(points.device());
  check_farthest_first_points(arguments);
  const auto& x = arguments.points;
  auto indices = at::empty(arguments.shape(k), x.options().dtype(at::kLong));
  auto sq_radii = at::empty(arguments.shape(k), x.options().dtype(at::kDouble));
  auto sq_dists = at::empty(arguments.shape(arguments.n()), x.options().dtype(at::kDouble));
  auto nearest = at::empty(arguments.shape(arguments.n()), x.options().dtype(at::kLong));
  for (int64_t j = 0; j < arguments.clouds(); ++j) {
    const int64_t first = arguments.start.const_data_ptr<int64_t>()[j];
    const auto of_cloud = [&](const at::Tensor& result) { return arguments.batched ? result[j] : result; };
    auto cloud_indices = of_cloud(indices), cloud_radii = of_cloud(sq_radii);
    auto cloud_dists = of_cloud(sq_dists), cloud_nearest = of_cloud(nearest);
    if (x.scalar_type() == at::kFloat) {
      run<float>(x[j], k, first, cloud_indices, cloud_radii, cloud_dists, cloud_nearest);
    } else {
      run<double>(x[j], k, first, cloud_indices, cloud_radii, cloud_dists, cloud_nearest);
    }
  }
  return {indices, sq_radii, sq_dists, nearest};
}

}  // namespace
}  // namespace fastif

TORCH_LIBRARY_IMPL(fastif, CUDA, m) { m.impl("farthest_first", fastif::farthest_first_cuda); }
