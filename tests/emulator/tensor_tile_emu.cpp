// The tile product on tensor cores against float64: as accurate as float32, which one product of TF32 numbers is not,
// whatever the scales of rows and columns, to the ends of float32's range; and the emulator's tensor core by itself.
#include <array>

#include "common/tensor_tile.cuh"
#include "emulate.h"

namespace {

using fastif::kTileSide;
using fastif::OuterStorage;
using fastif::TensorCores;

constexpr double kBound = 1e-6;
constexpr float kMax = std::numeric_limits<float>::max();

// Rows `row` of x [., columns], weighted: the tile whose rows are x's columns from a0 on, and its columns those from
// b0.
struct Problem {
  std::vector<float> x;
  int64_t columns, a0, b0;
  std::vector<int64_t> row;
  std::vector<float> coef;
};

template <int R>
void tile_kernel(const Problem& problem, float* out) {
  constexpr int side = kTileSide * R;
  using Shared = OuterStorage<float, R, R, TensorCores>;
  FASTIF_SHARED(Shared, shared);
  const int64_t d = problem.columns;
  float total[R][R] = {};
  fastif::weighted_outer(
      shared, problem.x.data(), d, problem.a0, d, problem.x.data(), d, problem.b0, d,
      static_cast<int64_t>(problem.row.size()),
      [&](int64_t r, int64_t& row, float& coef) {
        row = problem.row[r];
        coef = problem.coef[r];
      },
      total);
  for (int p = 0; p < R; ++p)
    for (int q = 0; q < R; ++q) out[TensorCores::row<R>(p) * side + TensorCores::column<R>(q)] = total[p][q];
}

float to_tf32(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000) & 0xffffe000); }

// The largest error of an entry beside the sum of its terms' magnitudes, `smallest` at least: of `got`, and of what the
// best possible sum of one product of TF32 numbers each would be.
struct Errors {
  double got = 0, one_product = 0;
};

template <int R>
Errors errors_of(const Problem& problem, const std::vector<float>& got, double smallest = 0) {
  constexpr int side = kTileSide * R;
  Errors errors;
  for (int p = 0; p < side; ++p)
    for (int q = 0; q < side; ++q) {
      const int64_t j = problem.a0 + p, k = problem.b0 + q;
      double want = 0, size = smallest, one_product = 0;
      for (size_t r = 0; r < problem.row.size() && j < problem.columns && k < problem.columns; ++r) {
        const float* const x = problem.x.data() + problem.row[r] * problem.columns;
        const double term = double(problem.coef[r]) * double(x[j]) * double(x[k]);
        want += term;
        size += std::abs(term);
        one_product += double(to_tf32(problem.coef[r] * x[j])) * double(to_tf32(x[k]));
      }
      const double error = std::abs(double(got[p * side + q]) - want);
      const bool zero = size == 0;
      if (!(error < INFINITY) || (zero && error > 0)) return {INFINITY, INFINITY};
      if (zero) continue;
      errors.got = std::max(errors.got, error / size);
      errors.one_product = std::max(errors.one_product, std::abs(one_product - want) / size);
    }
  return errors;
}

template <int R>
std::vector<float> product(const Problem& problem) {
  constexpr int side = kTileSide * R;
  std::vector<float> out(side * side, NAN);
  emu::launch(1, fastif::kTileThreads, 0, [&] { tile_kernel<R>(problem, out.data()); });
  return out;
}

// n rows in an order of their own, some twice; rows and columns of scales between 1e-6 and 1e6, or positive and alike.
Problem random_problem(int64_t n, int64_t columns, int64_t a0, int64_t b0, bool scaled) {
  Problem problem{uniform<float>((n + 1) * columns, 1), columns, a0, b0, {}, uniform<float>(n, 2)};
  const auto powers = uniform<float>(n + 1 + columns, 3);
  for (int64_t i = 0; i <= n; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float& x = problem.x[i * columns + j];
      x = scaled ? x * std::pow(10.0f, 6 * powers[i]) * std::pow(10.0f, 6 * powers[n + 1 + j]) : std::abs(x);
    }
  for (int64_t r = 0; r < n; ++r) {
    problem.row.push_back((r * 7 + r % 2) % (n + 1));
    if (!scaled) problem.coef[r] = std::abs(problem.coef[r]);
  }
  return problem;
}

template <int R>
void random_tiles() {
  constexpr int side = kTileSide * R;
  for (const int64_t n : {0, 1, 8, 17, 513, 1100})
    for (const auto& [columns, a0, b0] : {std::array<int64_t, 3>{1, 0, 0},
                                          {7, 0, 0},
                                          {2 * side + 1, side, 0},
                                          {2 * side + 1, 2 * side, side},
                                          {2 * side, side, side}})
      for (const bool scaled : {true, false}) {
        if ((EMU_TSAN || EMU_ASAN) && (n > 17 || columns == 1)) continue;
        const Problem problem = random_problem(n, columns, a0, b0, scaled);
        std::vector<float> first;
        const auto check = [&] {
          const auto got = product<R>(problem);
          const Errors errors = errors_of<R>(problem, got);
          expect(errors.got <= kBound, "tile %d, n=%d, columns=%d, scaled=%d: %.2e", side, int(n), int(columns), scaled,
                 errors.got);
          expect(n == 0 || scaled == 0 || columns == 1 || errors.one_product > 10 * kBound,
                 "tile %d, n=%d, columns=%d: one product would do, %.2e", side, int(n), int(columns),
                 errors.one_product);
          if (first.empty()) first = got;
          expect(first == got, "tile %d, n=%d: not the same bits in every order", side, int(n));
        };
        if (n <= 17) {
          for_schedules(check);
        } else {
          check();
        }
      }
}

// Where hi would round to infinity, where lo is denormal, where both are.
void ends_of_the_range() {
  const auto tile = [](float x, float y, float coef) {
    const Problem problem{{x, y}, 2, 0, 0, {0}, {coef}};
    const auto got = product<4>(problem);
    // x y coef in float64, beside what TF32 cannot hold of the smaller factor.
    const double weighted = double(coef * x), lost = 0x1p-136;
    const double want[] = {weighted * x, weighted * y, double(coef * y) * y};
    const double room[] = {std::abs(x) + std::abs(weighted), std::abs(y) + std::abs(weighted),
                           std::abs(y) + std::abs(double(coef * y))};
    const float entries[] = {got[0], got[1], got[kTileSide * 4 + 1]};
    for (int e = 0; e < 3; ++e)
      expect(std::abs(entries[e] - want[e]) <= 2 * kBound * std::abs(want[e]) + lost * room[e] + 0x1p-148,
             "x=%g y=%g coef=%g: entry %d is %g, not %g", double(x), double(y), double(coef), e, double(entries[e]),
             want[e]);
  };
  tile(kMax, 1, 0.5f / kMax);                        // a feature that would round up to infinity
  tile(1.5f, -1.25f, 1e38f);                         // weighted ones from 2^126 on
  tile(0.999f, 0.25f, kMax);                         // weighted ones that would
  tile(std::nextafter(kMax, 0.0f), -3e38f, 1e-39f);  // with a denormal weight
  tile(3.3e-36f, 1.7f, 1);                           // lo denormal
  tile(3.3e-39f, 1.7f, 1e3f);                        // hi and lo
  tile(1.234567e-20f, 7.654321e-20f, 0.9f);          // results at the edge of the denormals
  tile(0x1p-149f, 1, 1);                             // the smallest
  tile(-0.0f, 0, kMax);
}

// What the header promises of the two parts of an operand.
void splits() {
  double worst = 0;
  bool tf32 = true, nearest = true;
  const auto mantissas = uniform<float>(4000, 5);
  for (int power = -149; power <= 127; ++power)
    for (const float mantissa : mantissas) {
      const float x = static_cast<float>(std::ldexp(double(mantissa), power + 1));
      const double size = std::abs(double(x));
      fastif::SplitOperands<1> split;
      split.set(0, x);
      const float hi = split.hi[0], lo = split.lo[0];
      tf32 = tf32 && std::isfinite(hi) && (__float_as_uint(hi) & 0x1fff) == 0 && (__float_as_uint(lo) & 0x1fff) == 0;
      nearest = nearest && (size < 0x1p-126 || size > kMax * (1 - 0x1p-12) || hi == to_tf32(x));
      const double lost = std::max(size * (size > kMax * (1 - 0x1p-12) ? 0x1p-21 : 0x1p-23), 0x1p-136);
      worst = std::max(worst, std::abs(double(hi) + double(lo) - double(x)) / lost);
    }
  expect(tf32, "a part is not TF32");
  expect(nearest, "hi is not the nearest");
  expect(worst <= 1, "splitting: %.3f of what may be lost", worst);
}

// The emulator's own: small integers, placed as PTX's tables say, give the exact product.
void tensor_core() {
  const auto a = [](int row, int k) { return float((5 * row + 3 * k) % 17 - 8); };
  const auto b = [](int k, int column) { return float((7 * k + 11 * column) % 13 - 6); };
  const auto c = [](int row, int column) { return float(row - 3 * column); };
  std::vector<float> got(16 * 8);
  float* const out = got.data();
  for_schedules([&] {
    emu::launch(1, 32, 0, [&] {
      const int g = threadIdx.x / 4, t = threadIdx.x % 4;
      const float mine_a[4] = {a(g, t), a(g + 8, t), a(g, t + 4), a(g + 8, t + 4)};
      const float mine_b[2] = {b(t, g), b(t + 4, g)};
      const float mine_c[4] = {c(g, 2 * t), c(g, 2 * t + 1), c(g + 8, 2 * t), c(g + 8, 2 * t + 1)};
      float d[4];
      mma_m16n8k8_tf32(d, mine_a, mine_b, mine_c);
      for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
    });
    bool right = true;
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        float want = c(row, column);
        for (int k = 0; k < 8; ++k) want += a(row, k) * b(k, column);
        right = right && got[row * 8 + column] == want;
      }
    expect(right, "the tensor core's product of integers");
  });
  // Cut, not rounded: at the last bit of the largest term, and at that of the sum.
  expect(emu::cut_sum({1.0, 0x1.8p-24, 0x1.8p-24}) == 1, "small terms are cut one by one");
  expect(emu::cut_sum({-1.5, -0x1p-23, -1.0}) == -2.5f, "the sum is cut toward zero");
  expect(emu::cut_sum({double(kMax), double(kMax)}) == kMax, "and not to infinity");
}

}  // namespace

int main() {
  tensor_core();
  if (!EMU_TSAN && !EMU_ASAN) {
    splits();
    ends_of_the_range();
  }
  random_tiles<4>();
  random_tiles<8>();
  return report("tensor_tile");
}
