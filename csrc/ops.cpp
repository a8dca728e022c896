// Every op's schema, one line each; the pybind11 module tells what was built. Contracts: csrc/<op>/<op>.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <utility>

#include "common/memory.h"
#include "common/poll.h"
#include "common/simd.h"

TORCH_LIBRARY(fastif, m) {
  m.def(
      "farthest_first(Tensor points, int k, Tensor start, Tensor? picks=None, Tensor? mask=None, "
      "float? until_radius=None) -> (Tensor indices, Tensor sq_radii, Tensor sq_dists, Tensor nearest)");
  m.def("ggn_block_(Tensor(a!) out, Tensor features, Tensor probs, Tensor weights) -> ()");
  m.def("kronecker_block_(Tensor(a!) out, Tensor features, Tensor outer) -> ()");
  m.def(
      "per_sample_grad_accumulate(Tensor inputs, Tensor output_grads, Tensor weights, Tensor groups, int num_groups) "
      "-> Tensor");
  m.def("per_sample_grad_accumulate_squares(Tensor inputs, Tensor output_grads, Tensor weights) -> Tensor");
  m.def("per_sample_grad_sq_norms(Tensor inputs, Tensor output_grads, Tensor? scale=None) -> Tensor");
  m.def("per_sample_grad_dots(Tensor inputs, Tensor output_grads, Tensor directions) -> Tensor");
}

// Read from the library's bytes before it is loaded (fastif/ops/_library.py): under another torch, loading it would
// register the kernels for the wrong devices.
extern "C" __attribute__((used, visibility("default"))) const char fastif_built_for[] =
    "fastif was built for torch " TORCH_VERSION;

namespace {

// The progress callback of the ops that this thread runs: callable(done, total), or null.
thread_local PyObject* progress = nullptr;

void poll_python(int64_t done, int64_t total) {
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  if (progress) pybind11::reinterpret_borrow<pybind11::object>(progress)(done, total);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  fastif::poll_python = poll_python;
  m.def(
      "set_progress",
      [](const pybind11::object& callback) {
        PyObject* former = std::exchange(progress, callback.is_none() ? nullptr : callback.inc_ref().ptr());
        Py_XDECREF(former);
      },
      "The long ops of this thread call callback(done, total) now and then; None ends that.");
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
      .def("stop", &fastif::PeakMemory::stop, "Ends the measurement; returns the peak in bytes.")
      .def_static("alive", &fastif::PeakMemory::alive, "Measurements whose memory is held, of all threads.");
}
