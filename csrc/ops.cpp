// Every op's schema, one line each. Contracts: csrc/<op>/<op>.h.
#include <torch/csrc/stable/library.h>

#include "common/python.h"

STABLE_TORCH_LIBRARY(fastif, m) {
  m.def(
      "farthest_first(Tensor points, int k, Tensor start, Tensor? picks=None, Tensor? mask=None, "
      "float? until_radius=None) -> (Tensor indices, Tensor sq_radii, Tensor sq_dists, Tensor nearest)");
  m.def(
      "factor_dots(Tensor left, Tensor right, Tensor? scale, Tensor ranks, Tensor queries, Tensor? along=None) -> "
      "Tensor");
  m.def("ggn_block_(Tensor(a!) out, Tensor features, Tensor probs, Tensor weights) -> ()");
  m.def("kronecker_block_(Tensor(a!) out, Tensor features, Tensor outer) -> ()");
  m.def(
      "per_sample_grad_accumulate(Tensor inputs, Tensor output_grads, Tensor weights, Tensor groups, int num_groups) "
      "-> Tensor");
  m.def("per_sample_grad_accumulate_squares(Tensor inputs, Tensor output_grads, Tensor weights) -> Tensor");
  m.def("per_sample_grad_sq_norms(Tensor inputs, Tensor output_grads, Tensor? scale=None) -> Tensor");
  m.def("per_sample_grad_dots(Tensor inputs, Tensor output_grads, Tensor directions) -> Tensor");
}

PyMODINIT_FUNC PyInit__C() { return fastif::python::create(); }
