// The kernels of ggn_block_ against the sum over examples in float64, launched as ggn_block.cu launches them.
#include "emulate.h"
#include "ggn_block/ggn_block_kernel.cuh"

namespace {

using fastif::ceil_div;

template <typename T>
std::vector<double> definition(const std::vector<T>& out, const std::vector<T>& x, const std::vector<T>& p,
                               const std::vector<T>& w, int64_t n, int64_t d, int64_t c) {
  std::vector<double> sum(out.begin(), out.end());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t a = 0; a < c; ++a)
      for (int64_t b = 0; b < c; ++b) {
        double h = -double(p[i * c + a]) * double(p[i * c + b]);
        if (a == b) {
          h = 0;
          for (int64_t e = 0; e < c; ++e)
            if (e != a) h += double(p[i * c + a]) * double(p[i * c + e]);
        }
        h *= double(w[i]);
        for (int64_t j = 0; j < d; ++j)
          for (int64_t k = 0; k < d; ++k)
            sum[((a * d + j) * c + b) * d + k] += h * double(x[i * d + j]) * double(x[i * d + k]);
      }
  return sum;
}

template <typename T, int R>
void run(std::vector<T>& out, const T* x, const T* p, const T* w, int64_t n, int64_t d, int64_t c, bool sum_diagonal,
         int64_t splits, int64_t batch) {
  constexpr int side = fastif::kTileSide * R;
  constexpr unsigned threads = fastif::kCombineTile * fastif::kCombineRows;
  const int64_t across = ceil_div(d, side), tiles = across * (across + 1) / 2, parts = side / 32 * (side / 32);
  const int64_t grams = c * (c - 1) / 2 + (sum_diagonal ? 0 : c), items = grams * tiles;
  const int64_t split_length = ceil_div(n, splits);
  splits = ceil_div(n, split_length);
  if (sum_diagonal || batch == 0) batch = items;
  std::vector<T> scratch(batch * splits * side * side, T(NAN));
  T *const s = scratch.data(), *const o = out.data();
  for (int64_t first = 0; first < items; first += batch) {
    const int64_t count = std::min(batch, items - first);
    emu::launch(count * splits, fastif::kTileThreads, 0,
                [=] { fastif::ggn_gram_kernel<T, R>(x, p, w, n, d, c, first, tiles, splits, split_length, s); });
    emu::launch(count * parts, threads, 0,
                [=] { fastif::ggn_combine_kernel<T>(s, d, c, first, tiles, splits, side, o); });
  }
  if (sum_diagonal && items > 0)
    emu::launch(c * tiles * parts, threads, 0,
                [=] { fastif::ggn_combine_diagonal_kernel<T>(s, d, c, tiles, splits, side, o); });
}

template <typename T, int R>
void compare(int64_t n, int64_t d, int64_t c, bool sum_diagonal, int64_t splits, int64_t batch,
             bool confident = false) {
  const auto x = uniform<T>(n * d, 1), before = uniform<T>(c * d * c * d, 2);
  auto p = uniform<T>(n * c, 3), w = uniform<T>(n, 4);
  for (T& weight : w) weight = weight < T(-0.5) ? T(0) : weight + T(1);
  for (int64_t i = 0; i < n; ++i) {
    T total = 0;
    for (int64_t a = 0; a < c; ++a) total += p[i * c + a] = confident && a != i % c ? T(1e-12) : p[i * c + a] + T(1);
    for (int64_t a = 0; a < c; ++a) p[i * c + a] /= total;
  }
  const std::vector<T> zero(before.size());
  for (const auto& start : {before, zero}) {
    if (confident && &start != &zero && start[0] != 0) continue;
    const auto want = definition(start, x, p, w, n, d, c);
    std::vector<T> first;
    for_schedules([&] {
      auto got = start;
      run<T, R>(got, x.data(), p.data(), w.data(), n, d, c, sum_diagonal, splits, batch);
      const double error = relative_error(got, want);
      expect(error <= (sizeof(T) == 4 ? 2e-6 : 1e-14),
             "n=%d d=%d c=%d tile=%d %zu-byte sum_diagonal=%d splits=%d: %.2e", int(n), int(d), int(c), 16 * R,
             sizeof(T), sum_diagonal, int(splits), error);
      if (first.empty()) first = got;
      expect(first == got, "n=%d d=%d c=%d: not the same bits in every order", int(n), int(d), int(c));
      bool symmetric = start[0] != 0;
      if (!symmetric) {
        symmetric = true;
        const int64_t side = c * d;
        for (int64_t i = 0; i < side; ++i)
          for (int64_t j = 0; j < i; ++j) symmetric = symmetric && got[i * side + j] == got[j * side + i];
      }
      expect(symmetric, "n=%d d=%d c=%d: not symmetric", int(n), int(d), int(c));
    });
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

template <typename T>
void all() {
  compare<T, 4>(1, 1, 1, true, 1, 0);
  compare<T, 4>(1, 3, 2, true, 1, 0);
  compare<T, 4>(37, 5, 3, true, 3, 0);
  compare<T, 4>(37, 5, 3, false, 3, 4);
  compare<T, 4>(20, 67, 2, true, 2, 0);
  compare<T, 4>(20, 67, 2, false, 1, 2);
  compare<T, 4>(600, 4, 2, true, 1, 0);  // two chunks
  compare<T, 4>(40, 3, 3, false, 1, 1, /*confident=*/true);
  compare<T, 4>(40, 3, 3, true, 1, 1, /*confident=*/true);
}

}  // namespace

int main() {
  numbering();
  if constexpr (!EMU_ASAN) all<float>();
  if constexpr (!EMU_TSAN) all<double>();  // a sanitizer sees one type: they are slow
  compare<float, 8>(19, 70, 2, true, 1, 0);
  if (!EMU_TSAN && !EMU_ASAN) compare<float, 8>(9, 130, 2, false, 1, 2);
  return report("ggn_block_");
}
