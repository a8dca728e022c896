// The kernels of factor_dots against sums over factors in float64, launched as factor_dots/cuda/launch.cu launches
// them.
#include "emulate.h"
#include "factor_dots/cuda/kernel.cuh"

namespace {

using fastif::ceil_div;
using fastif::kFactorThreads;
using fastif::kFactorTile;

std::vector<int8_t> integers(int64_t count, unsigned seed, bool largest) {
  const auto drawn = uniform<double>(count, seed);
  std::vector<int8_t> values(count);
  for (int64_t i = 0; i < count; ++i)
    values[i] = static_cast<int8_t>(largest ? (drawn[i] < 0 ? -127 : 127) : 127 * drawn[i]);
  return values;
}

// Example i has i % (most + 1) factors, so that some have none.
void factor_dots(int64_t n, int64_t most, int64_t o, int64_t d, int64_t q, bool scaled, bool largest = false) {
  std::vector<int64_t> ends(n);
  int64_t factors = 0;
  for (int64_t i = 0; i < n; ++i) ends[i] = factors += i % (most + 1);
  const auto left = integers(factors * o, 1, largest), right = integers(factors * d, 2, largest);
  const auto scale = uniform<float>(factors, 3), queries = uniform<float>(q * o * d, 4);
  std::vector<double> want(q * n);
  for (int64_t k = 0; k < q; ++k)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t f = i ? ends[i - 1] : 0; f < ends[i]; ++f)
        for (int64_t r = 0; r < o; ++r)
          for (int64_t c = 0; c < d; ++c)
            want[k * n + i] += (scaled ? double(scale[f]) : 1) * left[f * o + r] * right[f * d + c] *
                               double(queries[(k * o + r) * d + c]);
  std::vector<float> first;
  for_schedules([&] {
    const int64_t items = q * ceil_div(factors, kFactorTile);
    for (const int64_t blocks : {std::max<int64_t>(1, items), int64_t{1}}) {
      if (blocks != items && emu::schedule.order != emu::Order::shuffle) continue;
      std::vector<float> products(q * factors, NAN), got(q * n, NAN);
      const float* const s = scaled ? scale.data() : nullptr;
      emu::launch(static_cast<unsigned>(blocks), kFactorThreads, 0, [&] {
        fastif::factor_products_kernel(left.data(), right.data(), s, queries.data(), factors, o, d, q, products.data());
      });
      emu::launch(static_cast<unsigned>(std::min(blocks, ceil_div(q * n, kFactorThreads))), kFactorThreads, 0,
                  [&] { fastif::factor_sums_kernel(products.data(), ends.data(), factors, n, q, got.data()); });
      const double error = relative_error(got, want);
      expect(error <= 3e-6, "factor_dots n=%d most=%d o=%d d=%d q=%d: %.2e", int(n), int(most), int(o), int(d), int(q),
             error);
      if (first.empty()) first = got;
      expect(std::memcmp(first.data(), got.data(), got.size() * sizeof(float)) == 0, "factor_dots: not the same bits");
    }
  });
}

}  // namespace

int main() {
  factor_dots(3, 1, 1, 1, 1, true);
  factor_dots(5, 0, 3, 2, 2, true);  // no factors
  factor_dots(40, 4, 7, 33, 2, false);
  factor_dots(23, 3, 65, 5, 3, true);
  if (!EMU_TSAN && !EMU_ASAN) {
    factor_dots(130, 2, 70, 100, 2, true);
    factor_dots(60, 2, 130, 40, 1, true, /*largest=*/true);
  }
  return report("factor_dots");
}
