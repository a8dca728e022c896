#include <algorithm>

#include "kernel.cuh"
#include "launch.h"

namespace fastif {
namespace {

unsigned blocks_for(int64_t items) { return static_cast<unsigned>(std::min<int64_t>(items, int64_t{1} << 30)); }

}  // namespace

void factor_dots_launch(const int8_t* left, const int8_t* right, const float* scale, const int64_t* ends,
                        const float* queries, int64_t factors, int64_t o, int64_t d, int64_t n, int64_t q,
                        float* products, float* out, cudaStream_t stream) {
  if (q * n == 0) return;
  if (factors > 0) {
    factor_products_kernel<<<blocks_for(q * ceil_div(factors, kFactorTile)), kFactorThreads, 0, stream>>>(
        left, right, scale, queries, factors, o, d, q, products);
  }
  factor_sums_kernel<<<blocks_for(ceil_div(q * n, kFactorThreads)), kFactorThreads, 0, stream>>>(products, ends,
                                                                                                 factors, n, q, out);
}

}  // namespace fastif
