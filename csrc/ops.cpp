// Every op's schema, one line each; the pybind11 module tells what was built. Contracts: csrc/<op>/<op>.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "common/memory.h"
#include "common/simd.h"

TORCH_LIBRARY(fastif, m) {
  m.def(
      "farthest_first(Tensor points, int k, int start=0) -> (Tensor indices, Tensor sq_radii, Tensor sq_dists, Tensor "
      "nearest)");
  m.def("ggn_block_(Tensor(a!) out, Tensor features, Tensor probs, Tensor weights) -> ()");
  m.def(
      "per_sample_grad_accumulate(Tensor inputs, Tensor output_grads, Tensor weights, Tensor groups, int num_groups) "
      "-> Tensor");
  m.def("per_sample_grad_accumulate_squares(Tensor inputs, Tensor output_grads, Tensor weights) -> Tensor");
  m.def("per_sample_grad_sq_norms(Tensor inputs, Tensor output_grads, Tensor? scale=None) -> Tensor");
  m.def("per_sample_grad_dots(Tensor inputs, Tensor output_grads, Tensor directions) -> Tensor");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("built_with_cuda", [] {
#ifdef FASTIF_CUDA
    return true;
#else
    return false;
#endif
  });
  m.def("isa", fastif::isa_name, "Vector instructions in use on this processor: avx512, avx2 or generic.");
  pybind11::class_<fastif::PeakMemory>(m, "PeakMemory")
      .def(pybind11::init<>())
      .def("start", &fastif::PeakMemory::start)
      .def("stop", &fastif::PeakMemory::stop, "Ends the measurement; returns the peak in bytes.");
}
