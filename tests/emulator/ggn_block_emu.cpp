// The kernels of ggn_block_ and kronecker_block_ against the sum over examples in float64, launched as
// ggn_block/cuda/launch.cu launches them, by the plans of plan.h and by others, on tensor cores and without.
#include "emulate.h"
#include "ggn_block/cuda/kernel.cuh"
#include "ggn_block/cuda/plan.h"

namespace {

using fastif::ceil_div;
using fastif::CudaCores;
using fastif::ggn_plan;
using fastif::GgnPlan;
using fastif::GivenHessians;
using fastif::SoftmaxHessians;
using fastif::TensorCores;

struct Shape {
  int64_t n, d, c;
};

// out + sum_i H_i (x) x_i x_i^T. hessian(i, a, b) is H_i[a, b]; `sizes` gets the sums of the terms' magnitudes.
template <typename T, typename Hessian>
std::vector<double> definition(const std::vector<T>& out, const std::vector<T>& x, Shape shape, Hessian hessian,
                               std::vector<double>* sizes = nullptr) {
  const auto [n, d, c] = shape;
  std::vector<double> sum(out.begin(), out.end());
  if (sizes) sizes->assign(sum.size(), 0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t a = 0; a < c; ++a)
      for (int64_t b = 0; b < c; ++b) {
        const double h = hessian(i, a, b);
        for (int64_t j = 0; j < d; ++j)
          for (int64_t k = 0; k < d; ++k) {
            const int64_t entry = ((a * d + j) * c + b) * d + k;
            const double term = h * double(x[i * d + j]) * double(x[i * d + k]);
            sum[entry] += term;
            if (sizes) (*sizes)[entry] += std::abs(term);
          }
      }
  return sum;
}

// What the shape would not be given: tiles of `side`, the diagonal on its own or not, so many splits and items at a
// time.
GgnPlan plan_of(Shape shape, int side, bool sum_diagonal, int64_t splits, int64_t batch) {
  const int64_t across = ceil_div(shape.d, side), pairs = shape.c * (shape.c - 1) / 2;
  GgnPlan plan;
  plan.side = side;
  plan.tiles = across * (across + 1) / 2;
  plan.sum_diagonal = sum_diagonal;
  plan.grams = sum_diagonal ? pairs : pairs + shape.c;
  plan.split_length = ceil_div(shape.n, splits);
  plan.splits = ceil_div(shape.n, plan.split_length);
  plan.batch = sum_diagonal || batch == 0 ? plan.grams * plan.tiles : batch;
  plan.scratch = plan.batch * plan.splits * side * side;
  return plan;
}

template <typename T, int R, typename Cores, typename Hessians>
void run(const GgnPlan& plan, const T* x, Hessians hessians, Shape shape, T* out) {
  const auto [n, d, c] = shape;
  const int side = plan.side;
  constexpr unsigned threads = fastif::kCombineTile * fastif::kCombineRows;
  const int64_t all = plan.grams * plan.tiles, parts = side / 32 * (side / 32);
  std::vector<T> scratch(plan.scratch, T(NAN));
  T* const s = scratch.data();
  for (int64_t first = 0; first < all; first += plan.batch) {
    const int64_t items = std::min(plan.batch, all - first);
    emu::launch(items * plan.splits, fastif::kTileThreads, 0, [=] {
      fastif::ggn_gram_kernel<T, R, Cores>(x, hessians, n, d, c, first, plan.tiles, plan.splits, plan.split_length, s);
    });
    emu::launch(items * parts, threads, 0,
                [=] { fastif::ggn_combine_kernel<T>(s, d, c, first, plan.tiles, plan.splits, side, out); });
  }
  if (plan.sum_diagonal && all > 0)
    emu::launch(c * plan.tiles * parts, threads, 0,
                [=] { fastif::ggn_combine_diagonal_kernel<T>(s, d, c, plan.tiles, plan.splits, side, out); });
}

template <typename T, typename Hessians>
std::vector<T> run(const GgnPlan& plan, const std::vector<T>& x, Hessians hessians, Shape shape, std::vector<T> out) {
  if constexpr (sizeof(T) == 8) {
    run<T, 4, CudaCores>(plan, x.data(), hessians, shape, out.data());
  } else if (plan.side == 64) {
    (plan.tensor_cores ? run<T, 4, TensorCores, Hessians> : run<T, 4, CudaCores, Hessians>)(plan, x.data(), hessians,
                                                                                            shape, out.data());
  } else {
    (plan.tensor_cores ? run<T, 8, TensorCores, Hessians> : run<T, 8, CudaCores, Hessians>)(plan, x.data(), hessians,
                                                                                            shape, out.data());
  }
  return out;
}

// hessian(i, a, b) is what `hessians` stands for; `start` is what `out` holds before, zero or not.
template <typename T, typename Hessians, typename Hessian>
void compare(const char* op, Shape shape, GgnPlan plan, const std::vector<T>& x, Hessians hessians, Hessian hessian,
             const std::vector<T>& start) {
  const auto want = definition(start, x, shape, hessian);
  for (const bool tensor_cores : {false, true}) {
    if (tensor_cores ? sizeof(T) == 8 : sizeof(T) == 4 && (EMU_TSAN || EMU_ASAN)) continue;
    plan.tensor_cores = tensor_cores;
    char name[160];
    std::snprintf(name, sizeof name, "%s n=%d d=%d c=%d tile=%d %zu-byte %s sum_diagonal=%d splits=%d batch=%d", op,
                  int(shape.n), int(shape.d), int(shape.c), plan.side, sizeof(T), tensor_cores ? "tensor" : "cuda",
                  plan.sum_diagonal, int(plan.splits), int(plan.batch));
    std::vector<T> first;
    for_schedules([&] {
      const auto got = run(plan, x, hessians, shape, start);
      const double error = relative_error(got, want);
      expect(error <= (sizeof(T) == 4 ? 1e-6 : 1e-14), "%s: %.2e", name, error);
      if (first.empty()) first = got;
      expect(first == got, "%s: not the same bits in every order", name);
      bool symmetric = true;
      const int64_t side = start[0] != 0 ? 0 : shape.c * shape.d;
      for (int64_t i = 0; i < side; ++i)
        for (int64_t j = 0; j < i; ++j) symmetric = symmetric && got[i * side + j] == got[j * side + i];
      expect(symmetric, "%s: not symmetric", name);
    });
  }
}

// Entry (a, b) of H_i in float64, as the two ops define it; the vectors must outlive what is returned.
template <typename T>
auto softmax_hessian(const std::vector<T>& p, const std::vector<T>& w, int64_t c) {
  return [&p, &w, c](int64_t i, int64_t a, int64_t b) {
    double h = a == b ? 0 : -double(p[i * c + a]) * double(p[i * c + b]);
    for (int64_t e = 0; a == b && e < c; ++e)
      if (e != a) h += double(p[i * c + a]) * double(p[i * c + e]);
    return h * double(w[i]);
  };
}

template <typename T>
auto given_hessian(const std::vector<T>& outer, int64_t c) {
  return [&outer, c](int64_t i, int64_t a, int64_t b) {
    return double(outer[(i * c + std::max(a, b)) * c + std::min(a, b)]);
  };
}

template <typename T>
void ggn_block(Shape shape, const GgnPlan& plan, bool confident = false) {
  const auto [n, d, c] = shape;
  const auto x = uniform<T>(n * d, 1);
  auto p = uniform<T>(n * c, 3), w = uniform<T>(n, 4);
  for (T& weight : w) weight = weight < T(-0.5) ? T(0) : weight + T(1);
  for (int64_t i = 0; i < n; ++i) {
    T total = 0;
    for (int64_t a = 0; a < c; ++a) total += p[i * c + a] = confident && a != i % c ? T(1e-12) : p[i * c + a] + T(1);
    for (int64_t a = 0; a < c; ++a) p[i * c + a] /= total;
  }
  const auto hessian = softmax_hessian(p, w, c);
  const std::vector<T> zero(c * d * c * d);
  const SoftmaxHessians<T> hessians{p.data(), w.data()};
  compare("ggn_block_", shape, plan, x, hessians, hessian, zero);
  if (!confident) compare("ggn_block_", shape, plan, x, hessians, hessian, uniform<T>(zero.size(), 2));
}

// NaN above the diagonal of every H_i: reading it shows.
template <typename T>
void kronecker_block(Shape shape, const GgnPlan& plan) {
  const auto [n, d, c] = shape;
  const auto x = uniform<T>(n * d, 1);
  auto outer = uniform<T>(n * c * c, 5);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t a = 0; a < c; ++a)
      for (int64_t b = 0; b < c; ++b) {
        T& h = outer[(i * c + a) * c + b];
        if (i % 3 == 2) h = 0;
        if (b > a) h = T(NAN);
      }
  const auto hessian = given_hessian(outer, c);
  const GivenHessians<T> hessians{outer.data()};
  for (const auto& start : {std::vector<T>(c * d * c * d), uniform<T>(c * d * c * d, 2)})
    compare("kronecker_block_", shape, plan, x, hessians, hessian, start);
}

template <typename T>
GgnPlan own_plan(Shape shape, bool rows_sum_to_zero) {
  return ggn_plan(shape.n, shape.d, shape.c, sizeof(T), rows_sum_to_zero);
}

// Every plan covers its work once, within the scratch and what a launch may hold, and keeps a GPU busy where it can.
void plans() {
  const Shape shapes[] = {{1, 1, 1},        {50'000, 513, 10}, {50'000, 65, 1},    {1'000'000, 8, 2}, {513, 129, 3},
                          {3'000, 64, 100}, {400, 8, 700},     {2'000, 30'000, 1}, {2'000, 130, 96},  {40, 3, 5'000}};
  for (const auto& [n, d, c] : shapes)
    for (const int bytes : {4, 8})
      for (const bool rows_sum_to_zero : {true, false}) {
        const GgnPlan plan = ggn_plan(n, d, c, bytes, rows_sum_to_zero);
        const int64_t across = ceil_div(d, plan.side), pairs = c * (c - 1) / 2, all = plan.grams * plan.tiles;
        bool right = plan.side == 64 || (plan.side == 128 && bytes == 4);
        right = right && plan.tiles == across * (across + 1) / 2 && (rows_sum_to_zero || !plan.sum_diagonal);
        right = right && plan.grams == (plan.sum_diagonal ? pairs : pairs + c);
        if (all == 0) {
          right = right && rows_sum_to_zero && c == 1;
        } else {
          const int64_t most = int64_t{1} << 31, chunks = ceil_div(n, fastif::kChunk);
          right = right && plan.splits * plan.split_length >= n && (plan.splits - 1) * plan.split_length < n;
          right = right && plan.split_length % fastif::kChunk == 0;
          right = right && plan.batch >= 1 && (plan.batch == all || !plan.sum_diagonal);
          right = right && plan.scratch == plan.batch * plan.splits * plan.side * plan.side;
          right = right && plan.scratch * bytes <= fastif::kScratchBytes;
          right = right && plan.batch * plan.splits < most && plan.batch * plan.side * plan.side < most;
          right = right && (2 * plan.splits * all >= fastif::kEnoughBlocks || plan.splits == chunks);
        }
        expect(right, "the plan of n=%d d=%d c=%d %d-byte rows_sum_to_zero=%d", int(n), int(d), int(c), bytes,
               rows_sum_to_zero);
      }
}

void numbering() {
  for (int64_t c : {1, 2, 3, 7, 1000}) {
    int64_t gram = 0;
    bool right = true;
    for (int64_t b = 1; b < c; ++b)
      for (int64_t a = 0; a < b; ++a, ++gram) {
        const auto pair = fastif::class_pair(gram, c);
        right = right && pair.a == a && pair.b == b && fastif::pair_index(a, b) == gram;
      }
    for (int64_t a = 0; a < c; ++a, ++gram) {
      const auto pair = fastif::class_pair(gram, c);
      right = right && pair.a == a && pair.b == a;
    }
    expect(right, "class_pair at c=%d", int(c));
  }
  for (int64_t r : {int64_t{1} << 20, int64_t{3037000499} / 2, int64_t{2147483647}}) {
    const int64_t t = r * (r + 1) / 2;
    expect(fastif::triangle_row(t) == r && fastif::triangle_row(t - 1) == r - 1 && fastif::triangle_row(t + r) == r,
           "triangle_row at %lld", static_cast<long long>(r));
  }
}

// On tensor cores, with rows and columns of scales between 1e-3 and 1e3: every entry to 1e-6 of its terms' magnitudes.
void scaled(Shape shape) {
  const auto [n, d, c] = shape;
  auto x = uniform<float>(n * d, 1), p = uniform<float>(n * c, 3);
  auto outer = uniform<float>(n * c * c, 5);
  const auto powers = uniform<float>(n + d, 6), w = std::vector<float>(n, 1 / float(n));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < d; ++j) x[i * d + j] *= std::pow(10.0f, 3 * (powers[i] + powers[n + j]));
    float total = 0;
    for (int64_t a = 0; a < c; ++a) total += p[i * c + a] = std::exp(8 * p[i * c + a]);
    for (int64_t a = 0; a < c; ++a) p[i * c + a] /= total;
  }
  const auto softmax = softmax_hessian(p, w, c);
  const auto given = given_hessian(outer, c);
  const std::vector<float> zero(c * d * c * d);
  const auto check = [&](const char* op, auto hessians, auto hessian) {
    const bool rows_sum_to_zero = std::is_same_v<decltype(hessians), SoftmaxHessians<float>>;
    std::vector<double> sizes;
    const auto want = definition(zero, x, shape, hessian, &sizes);
    const auto got = run(ggn_plan(n, d, c, sizeof(float), rows_sum_to_zero), x, hessians, shape, zero);
    double worst = 0;
    for (size_t e = 0; e < want.size(); ++e) {
      const double error = std::abs(double(got[e]) - want[e]);
      worst = std::max(worst, !(error < INFINITY) ? INFINITY : error > 0 ? error / sizes[e] : 0);
    }
    expect(worst <= 1e-6, "%s scaled n=%d d=%d c=%d: %.2e", op, int(n), int(d), int(c), worst);
  };
  check("ggn_block_", SoftmaxHessians<float>{p.data(), w.data()}, softmax);
  check("kronecker_block_", GivenHessians<float>{outer.data()}, given);
}

template <typename T>
void all() {
  for (const Shape shape : {Shape{1, 1, 1}, {1, 3, 2}, {50, 1, 4}, {20, 67, 2}}) {
    ggn_block<T>(shape, own_plan<T>(shape, true));
    kronecker_block<T>(shape, own_plan<T>(shape, false));
  }
  const Shape odd{37, 5, 3}, tall{20, 67, 2}, chunks{600, 4, 2};
  ggn_block<T>(odd, plan_of(odd, 64, true, 3, 0));
  ggn_block<T>(odd, plan_of(odd, 64, false, 3, 4));
  kronecker_block<T>(odd, plan_of(odd, 64, false, 3, 4));
  ggn_block<T>(tall, plan_of(tall, 64, true, 2, 0));
  ggn_block<T>(tall, plan_of(tall, 64, false, 1, 2));
  kronecker_block<T>(tall, plan_of(tall, 64, false, 2, 4));
  ggn_block<T>(chunks, plan_of(chunks, 64, true, 1, 0));
  ggn_block<T>({40, 3, 3}, plan_of({40, 3, 3}, 64, false, 1, 1), /*confident=*/true);
  ggn_block<T>({40, 3, 3}, plan_of({40, 3, 3}, 64, true, 1, 1), /*confident=*/true);
  const Shape one{600, 7, 1};  // split in two by its own plan
  kronecker_block<T>(one, own_plan<T>(one, false));
}

}  // namespace

int main() {
  numbering();
  plans();
  if constexpr (!EMU_ASAN) all<float>();
  if constexpr (!EMU_TSAN) all<double>();  // a sanitizer sees one type: they are slow
  const Shape large{19, 70, 2}, larger{9, 130, 2};
  ggn_block<float>(large, plan_of(large, 128, true, 1, 0));
  kronecker_block<float>(large, plan_of(large, 128, false, 1, 0));
  if (!EMU_TSAN && !EMU_ASAN) {
    for (const int64_t d : {1, 7, 63, 64, 65, 129})
      for (const int64_t c : {1, 2, 10})
        for (const int64_t n : {1, c == 10 ? 9 : 513}) scaled({n, d, c});
    ggn_block<float>(larger, plan_of(larger, 128, false, 1, 2));
    kronecker_block<float>(larger, plan_of(larger, 128, false, 2, 2));
  }
  return report("ggn_block_ and kronecker_block_");
}
