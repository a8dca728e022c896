// A torch tensor as kernels use it, over torch's stable ABI: what is built once runs on every torch from 2.11 on.
//
// Views are made past the dispatcher: they know neither autograd nor autocast, whose state is each thread's own, and so
// may be made on any thread. Matrix products on the CPU likewise (products.h). What else calls the dispatcher.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "errors.h"

namespace fastif {

using torch::headeronly::ScalarType;
inline constexpr ScalarType kFloat = ScalarType::Float, kDouble = ScalarType::Double, kHalf = ScalarType::Half,
                            kBFloat16 = ScalarType::BFloat16, kLong = ScalarType::Long, kBool = ScalarType::Bool,
                            kByte = ScalarType::Byte, kChar = ScalarType::Char, kInt = ScalarType::Int;
template <typename T>
inline constexpr ScalarType type_of = std::is_same_v<T, float>     ? kFloat
                                      : std::is_same_v<T, double>  ? kDouble
                                      : std::is_same_v<T, int64_t> ? kLong
                                                                   : kByte;

using Sizes = std::vector<int64_t>;

struct Device {
  int32_t type, index;
  bool operator==(const Device&) const = default;
  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
};
inline std::ostream& operator<<(std::ostream& out, const Device& device) {
  if (device.is_cpu()) return out << "cpu";
  return out << (device.type == aoti_torch_device_type_cuda() ? "cuda:" : "device:") << device.index;
}

// torch's own words for what failed, from 2.13 on; an older one has no such function and writes them to stderr. Weak,
// and not looked up by dlsym, which newer headers ask of glibc 2.34.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

inline void check_call(AOTITorchError error, const char* name) {
  if (error == AOTI_TORCH_SUCCESS) return;
  fail("RuntimeError", "torch: ", name, " failed: ",
       torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : "see stderr");
}

class Tensor : public torch::stable::Tensor {
 public:
  using Handle = torch::stable::Tensor;

  Tensor() = default;
  Tensor(Handle handle) : Handle(std::move(handle)) {}

  Sizes sizes() const { return {Handle::sizes().begin(), Handle::sizes().end()}; }
  Sizes strides() const { return {Handle::strides().begin(), Handle::strides().end()}; }
  Device device() const {
    Device device{};
    check_call(aoti_torch_get_device_type(get(), &device.type), "device type");
    check_call(aoti_torch_get_device_index(get(), &device.index), "device index");
    return device;
  }
  // Of the whole storage, in bytes.
  int64_t storage_size() const {
    int64_t size = 0;
    check_call(aoti_torch_get_storage_size(get(), &size), "storage size");
    return size;
  }

  // The same memory by other sizes and strides, `offset` entries further on; without history for autograd.
  Tensor strided(const Sizes& sizes, const Sizes& strides, int64_t offset = 0) const {
    AtenTensorHandle made = nullptr;
    check_call(aoti_torch__reinterpret_tensor(get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                              offset, &made),
               "view");
    return Tensor(Handle(made));
  }
  Tensor narrow(int64_t axis, int64_t begin, int64_t length) const {
    auto shape = sizes();
    shape[axis] = length;
    return strided(shape, strides(), begin * stride(axis));
  }
  Tensor slice(int64_t axis, int64_t begin, int64_t end) const { return narrow(axis, begin, end - begin); }
  Tensor select(int64_t axis, int64_t index) const {
    auto shape = sizes(), steps = strides();
    const int64_t offset = index * steps[axis];
    shape.erase(shape.begin() + axis);
    steps.erase(steps.begin() + axis);
    return strided(shape, steps, offset);
  }
  Tensor operator[](int64_t index) const { return select(0, index); }
  Tensor transpose(int64_t a, int64_t b) const {
    auto shape = sizes(), steps = strides();
    std::swap(shape[a], shape[b]);
    std::swap(steps[a], steps[b]);
    return strided(shape, steps);
  }
  Tensor t() const { return transpose(0, 1); }
  // Of contiguous entries; one size may be -1, for what is left.
  Tensor view(Sizes shape) const {
    check_contiguous();
    int64_t known = 1;
    for (const int64_t size : shape) known *= size == -1 ? 1 : size;
    for (int64_t& size : shape) size = size == -1 ? numel() / known : size;
    return strided(shape, contiguous_strides(shape));
  }
  static Sizes contiguous_strides(const Sizes& shape) {
    Sizes steps(shape.size(), 1);
    for (size_t axis = shape.size(); axis-- > 1;) steps[axis - 1] = steps[axis] * std::max<int64_t>(1, shape[axis]);
    return steps;
  }

  Tensor contiguous() const { return is_contiguous() ? *this : copy(scalar_type(), device()); }
  Tensor to(ScalarType type) const { return scalar_type() == type ? *this : copy(type, device()); }
  Tensor to(Device device) const { return device == this->device() ? *this : copy(scalar_type(), device); }
  Tensor cpu() const { return to(Device{aoti_torch_device_type_cpu(), -1}); }
  const Tensor& copy_(const Tensor& from) const {
    check_call(aoti_torch_copy_(get(), from.get(), 0), "copy_");
    return *this;
  }

  template <typename T>
  T item() const;

 private:
  // Into memory of our own: that it cannot be had is told from other errors (empty).
  Tensor copy(ScalarType type, Device device) const;
  void check_contiguous() const {
    if (!is_contiguous()) fail("RuntimeError", "fastif: a view needs contiguous entries");
  }
};

}  // namespace fastif

// As an argument and as a result, our tensor crosses torch's stable ABI as torch's own.
template <>
struct torch::stable::detail::FromImpl<fastif::Tensor> {
  static StableIValue call(const fastif::Tensor& x, uint64_t version, bool internal) {
    return FromImpl<torch::stable::Tensor>::call(x, version, internal);
  }
};
template <>
struct torch::stable::detail::ToImpl<fastif::Tensor> {
  static fastif::Tensor call(StableIValue x, uint64_t version, bool internal) {
    return ToImpl<torch::stable::Tensor>::call(x, version, internal);
  }
};

namespace fastif {

inline Tensor empty(const Sizes& sizes, ScalarType type, Device device = {aoti_torch_device_type_cpu(), -1}) {
  AtenTensorHandle made = nullptr;
  const auto strides = Tensor::contiguous_strides(sizes);
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device.type,
                               device.index, &made) != AOTI_TORCH_SUCCESS)
    fail("MemoryError", "fastif: cannot allocate a tensor of shape ", sizes);
  return Tensor(Tensor::Handle(made));
}
inline Tensor empty(const Sizes& sizes, const Tensor& as) { return empty(sizes, as.scalar_type(), as.device()); }
inline Tensor Tensor::copy(ScalarType type, Device device) const { return empty(sizes(), type, device).copy_(*this); }
inline Tensor zeros(const Sizes& sizes, ScalarType type, Device device) {
  auto made = empty(sizes, type, device);
  check_call(aoti_torch_zero_(made.get()), "zero_");
  return made;
}
inline Tensor zeros(const Sizes& sizes, const Tensor& as) { return zeros(sizes, as.scalar_type(), as.device()); }
// Memory of the caller's, on the CPU and only to be read.
template <typename T>
Tensor tensor_at(const T* memory, const Sizes& sizes) {
  const auto strides = Tensor::contiguous_strides(sizes);
  return torch::stable::from_blob(const_cast<T*>(memory), {sizes.data(), sizes.size()},
                                  {strides.data(), strides.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type_of<T>);
}

// aten::name of the dispatcher, whose results are `results` tensors or one number.
namespace detail {
template <size_t N, typename... Args>
std::array<StableIValue, N> call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, std::max(N, sizeof...(Args))> stack{torch::stable::detail::from(args)...};
  check_call(torch_call_dispatcher(name, overload, stack.data(), TORCH_TARGET_VERSION), name);
  std::array<StableIValue, N> results;
  std::copy_n(stack.begin(), N, results.begin());
  return results;
}
}  // namespace detail
template <typename... Args>
Tensor call(const char* name, const char* overload, const Args&... args) {
  return torch::stable::detail::to<Tensor>(detail::call<1>(name, overload, args...)[0]);
}
template <typename... Args>
std::pair<Tensor, Tensor> call_for_two(const char* name, const char* overload, const Args&... args) {
  const auto results = detail::call<2>(name, overload, args...);
  return {torch::stable::detail::to<Tensor>(results[0]), torch::stable::detail::to<Tensor>(results[1])};
}
inline bool ask(const char* name, const Tensor& x) {
  return torch::stable::detail::to<bool>(detail::call<1>(name, "", x)[0]);
}

template <typename T>
T Tensor::item() const {
  const auto type = scalar_type();
  if constexpr (std::is_same_v<T, bool>) {
    bool x = false;
    check_call(aoti_torch_item_bool(get(), &x), "item");
    return x;
  } else if constexpr (std::is_same_v<T, int64_t>) {
    int64_t x = 0;
    check_call(aoti_torch_item_int64(get(), &x), "item");
    return x;
  } else if (type == kDouble) {
    double x = 0;
    check_call(aoti_torch_item_float64(get(), &x), "item");
    return x;
  } else if (type == kFloat) {
    float x = 0;
    check_call(aoti_torch_item_float32(get(), &x), "item");
    return x;
  }
  return to(kDouble).item<T>();
}

inline Tensor sum(const Tensor& x) { return call("aten::sum", "", x, std::optional<ScalarType>()); }
inline Tensor sum(const Tensor& x, const Sizes& axes) {
  return call("aten::sum", "dim_IntList", x, std::optional<Sizes>(axes), false, std::optional<ScalarType>());
}
inline Tensor isfinite(const Tensor& x) { return call("aten::isfinite", "", x); }
inline Tensor all(const Tensor& x) { return call("aten::all", "", x); }
// The least and the greatest entry, of all or along an axis.
inline std::pair<Tensor, Tensor> aminmax(const Tensor& x, std::optional<int64_t> axis = std::nullopt) {
  return call_for_two("aten::aminmax", "", x, axis, false);
}

// work(zero) with a zero of x's type, float or double.
template <typename Work>
decltype(auto) with_type_of(const Tensor& x, const Work& work) {
  return x.scalar_type() == kFloat ? work(float{}) : work(double{});
}

}  // namespace fastif
