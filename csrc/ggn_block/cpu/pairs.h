// Sums over pairs on the CPU: the part that ggn_block_ and kronecker_block_ share.
//
//   out[a, j, b, k] += sum_i H_i[a, b] x_ij x_ik,   H_i symmetric
//
// Seen with the pairs (a >= b) for rows and the pairs (j >= k) for columns this is one matrix product over i,
// left^T right with left[i, ab] = H_i[a, b] and right[i, jk] = x_ij x_ik: both symmetries are used, neither factor is
// ever larger than a cache holds, and each product x_ij x_ik serves all pairs of classes.
#pragma once

#include <cstdint>

namespace fastif {

struct OutputHessians {
  const float *probs = nullptr, *weights = nullptr;  // [n, c], [n]: H_i = w_i (diag(p_i) - p_i p_i^T), or
  const float* outer = nullptr;                      // [n, c, c]: H_i itself, whose lower triangle is read
};

// Whether this processor has the vector instructions of add_pairs.
bool can_add_pairs();

void add_pairs(float* out,      // [c, d, c, d]
               const float* x,  // [n, d]
               const OutputHessians& hessians, int64_t n, int64_t d, int64_t c);

}  // namespace fastif
