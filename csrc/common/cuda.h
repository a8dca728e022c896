// What the CUDA wrappers ask of torch and of the CUDA runtime, over torch's stable ABI.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "tensor.h"

namespace fastif {

// While it lives, x's device is the current one: torch's guard sets it for torch's CUDA runtime, and ours, which may be
// linked in, is told besides.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    STD_CUDA_CHECK(cudaSetDevice(x.get_device_index()));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The stream that torch has current on x's device.
inline cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  check_call(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream), "current stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fastif
