#include "pairs.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "../../common/progress.h"
#include "../../common/simd.h"

#ifdef FASTIF_X86
#include <immintrin.h>
#endif

namespace fastif {
namespace {

// A register tile is kGroup columns of the left factor by kPanel of the right one. Both factors are formed for kRows
// examples at a time, so that a panel and a group stay in the first-level cache. Sums over kRows examples are formed in
// registers and then added up: two-level summation, error about (kRows + n / kRows) instead of n roundings.
constexpr int64_t kGroup = 12, kPanel = 32, kRows = 128;
constexpr int64_t kPairChunk = 96;                   // class pairs that are summed at a time
constexpr int64_t kFewPairs = 15;                    // up to here x_ij x_ik serves too few sums to be formed
constexpr int64_t kMostRows = 192, kLeastRows = 32;  // features of a tile

// sums[m][t] += sum_i left[i][m] * right[i][t], m < M, t < kPanel.
using Micro = void (*)(const float* left, const float* right, int64_t rows, float* sums, int64_t stride);

#ifdef FASTIF_X86
template <int M>
__attribute__((target("avx512f"))) void micro_avx512(const float* left, const float* right, int64_t rows, float* sums,
                                                     int64_t stride) {
  __m512 sum[M][2] = {};
  for (int64_t i = 0; i < rows; ++i, left += kGroup, right += kPanel) {
    const __m512 low = _mm512_loadu_ps(right), high = _mm512_loadu_ps(right + 16);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const __m512 s = _mm512_set1_ps(left[m]);
      sum[m][0] = _mm512_fmadd_ps(s, low, sum[m][0]);
      sum[m][1] = _mm512_fmadd_ps(s, high, sum[m][1]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m, sums += stride) {
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), sum[m][0]));
    _mm512_storeu_ps(sums + 16, _mm512_add_ps(_mm512_loadu_ps(sums + 16), sum[m][1]));
  }
}

// 16 registers hold 6 x 16 sums at a time: up to four quarters of the same tile.
template <int M>
__attribute__((target("avx2,fma"))) void micro_avx2(const float* left, const float* right, int64_t rows, float* sums,
                                                    int64_t stride) {
  if constexpr (M > 6) {
    micro_avx2<6>(left, right, rows, sums, stride);
    micro_avx2<M - 6>(left + 6, right, rows, sums + 6 * stride, stride);
  } else {
    for (int half = 0; half < 2; ++half, right += 16, sums += 16) {
      const float *l = left, *r = right;
      __m256 sum[M][2] = {};
      for (int64_t i = 0; i < rows; ++i, l += kGroup, r += kPanel) {
        const __m256 low = _mm256_loadu_ps(r), high = _mm256_loadu_ps(r + 8);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
          const __m256 s = _mm256_set1_ps(l[m]);
          sum[m][0] = _mm256_fmadd_ps(s, low, sum[m][0]);
          sum[m][1] = _mm256_fmadd_ps(s, high, sum[m][1]);
        }
      }
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        float* const to = sums + m * stride;
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum[m][0]));
        _mm256_storeu_ps(to + 8, _mm256_add_ps(_mm256_loadu_ps(to + 8), sum[m][1]));
      }
    }
  }
}

template <int... M>
Micro chosen(int64_t m, std::integer_sequence<int, M...>) {
  static constexpr Micro avx512[] = {micro_avx512<M + 1>...}, avx2[] = {micro_avx2<M + 1>...};
  return (isa() == Isa::avx512 ? avx512 : avx2)[m - 1];
}

Micro micro_of(int64_t m) { return chosen(m, std::make_integer_sequence<int, kGroup>{}); }
#else
Micro micro_of(int64_t) { return nullptr; }
#endif

// panel[i][t] = x[i][t], zero past `width`.
FASTIF_CLONES void copy_panel(const float* __restrict__ x, int64_t stride, int64_t rows, int64_t width,
                              float* __restrict__ panel) {
  for (int64_t i = 0; i < rows; ++i, x += stride, panel += kPanel) {
    if (width == kPanel) {
      for (int64_t t = 0; t < kPanel; ++t) panel[t] = x[t];
    } else {
      for (int64_t t = 0; t < kPanel; ++t) panel[t] = t < width ? x[t] : 0;
    }
  }
}

// right[i][t] = x[i] * panel[i][t]: one feature times a panel of them.
FASTIF_CLONES void form_row(const float* __restrict__ panel, const float* __restrict__ x, int64_t stride, int64_t rows,
                            float* __restrict__ right) {
  for (int64_t i = 0; i < rows; ++i, x += stride, panel += kPanel, right += kPanel) {
    const float s = *x;
    for (int64_t t = 0; t < kPanel; ++t) right[t] = s * panel[t];
  }
}

// Neighbours in a packed triangle that lie in one of its rows: entries at, at + 1, ... are those from (row, column) on.
struct Run {
  int64_t row, column, at, length;
};

// right[i][t] = product t of a panel with itself. Each run writes a whole panel's width; what is too much is written
// over by the next run or row.
FASTIF_CLONES void form_triangle(const float* __restrict__ panel, const Run* runs, int64_t count, int64_t rows,
                                 float* __restrict__ right) {
  for (int64_t i = 0; i < rows; ++i, panel += kPanel, right += kPanel) {
    for (int64_t r = 0; r < count; ++r) {
      const float s = panel[runs[r].row];
      const float* const from = panel + runs[r].column;
      float* const to = right + runs[r].at;
      for (int64_t t = 0; t < kPanel; ++t) to[t] = s * from[t];
    }
  }
}

// left[i][m] = scale[i] * x[i][m], m < count.
FASTIF_CLONES void form_scaled(const float* __restrict__ x, int64_t stride, int64_t rows, int64_t count,
                               const float* __restrict__ scale, float* __restrict__ left) {
  for (int64_t i = 0; i < rows; ++i, x += stride, left += kGroup) {
    if (count == kGroup) {
      for (int64_t m = 0; m < kGroup; ++m) left[m] = scale[i] * x[m];
    } else {
      for (int64_t m = 0; m < count; ++m) left[m] = scale[i] * x[m];
    }
  }
}

// The runs of the entries [first, last) of a triangle whose row r holds `shortest` + r entries.
std::vector<Run> runs_of(int64_t first, int64_t last, int64_t shortest) {
  std::vector<Run> runs;
  for (int64_t row = 0, start = 0; start < last; start += shortest + row++) {
    const int64_t from = std::max(first, start), to = std::min(last, start + shortest + row);
    if (from < to) runs.push_back({row, from - start, from - first, to - from});
  }
  return runs;
}

// Features [j0, j1) by [k0, k1): a panel with itself (its lower triangle) or with features that come after it.
struct Tile {
  int64_t j0, j1, k0, k1;
  bool diagonal() const { return j0 == k0; }
  int64_t height() const { return j1 - j0; }
  int64_t width() const { return k1 - k0; }
};

struct Problem {
  float* out;
  const float* x;
  OutputHessians hessians;
  int64_t n, d, c;
  int64_t shortest;  // row of the triangle of class pairs: 0 where the diagonal blocks are sums of the others

  Problem(float* out, const float* x, const OutputHessians& hessians, int64_t n, int64_t d, int64_t c)
      : out(out), x(x), hessians(hessians), n(n), d(d), c(c), shortest(hessians.outer ? 1 : 0) {}

  int64_t pairs() const { return c * (c - 1) / 2 + shortest * c; }
  bool few() const { return pairs() <= kFewPairs; }

  std::pair<int64_t, int64_t> pair(int64_t p) const {
    int64_t a = 0, start = 0;
    for (; start + shortest + a <= p; ++a) start += shortest + a;
    return {a, p - start};
  }

  // factors[i * stride + m] = +-H_i[pair m of the runs], rows from `begin` on: minus where it is a product of
  // probabilities, which keeps the sums positive.
  void form_factors(int64_t begin, int64_t rows, const std::vector<Run>& runs, int64_t stride, float* factors) const {
    for (int64_t i = begin; i < begin + rows; ++i, factors += stride) {
      for (const Run& run : runs) {
        const float* const from =
            (hessians.outer ? hessians.outer + (i * c + run.row) * c : hessians.probs + i * c) + run.column;
        const float s = hessians.outer ? 1 : hessians.weights[i] * hessians.probs[i * c + run.row];
        for (int64_t m = 0; m < run.length; ++m) factors[run.at + m] = s * from[m];
      }
    }
  }

  // out[a, j, b, k] += sign * value(j - j0, k - k0) on the tile, on its mirror image in (j, k) where it has one, and
  // the same for (b, a). Mirror images are added row by row of `out`, too.
  template <typename Value>
  void add(int64_t a, int64_t b, const Tile& tile, float sign, const Value& value) const {
    for (const auto& [first, second] : {std::pair{a, b}, std::pair{b, a}}) {
      float* const block = out + (first * d * c + second) * d;
      const int64_t stride = c * d;
      for (int64_t j = tile.j0; j < tile.j1; ++j) {
        float* const row = block + j * stride;
        const int64_t end = tile.diagonal() ? j + 1 : tile.k1;
        for (int64_t k = tile.k0; k < end; ++k) row[k] += sign * value(j - tile.j0, k - tile.k0);
      }
      for (int64_t k = tile.k0; k < tile.k1; ++k) {
        float* const row = block + k * stride;
        for (int64_t j = tile.diagonal() ? k + 1 : tile.j0; j < tile.j1; ++j) {
          row[j] += sign * value(j - tile.j0, k - tile.k0);
        }
      }
      if (a == b) return;
    }
  }

  // Adds the sums of a pair: those of two different classes also to the diagonal blocks, where these are sums.
  template <typename Value>
  void add_pair(int64_t p, const Tile& tile, float* diagonal, int64_t entries, const float* sums,
                const Value& value) const {
    const auto [a, b] = pair(p);
    add(a, b, tile, hessians.outer ? 1 : -1, value);
    if (hessians.outer) return;
    for (int64_t e = 0; e < entries; ++e) diagonal[a * entries + e] += sums[e];
    for (int64_t e = 0; e < entries; ++e) diagonal[b * entries + e] += sums[e];
  }
};

// Every pair of classes on one tile; one thread owns it, so nothing is shared and the order of summation does not
// depend on the number of threads.
void add_tile(const Problem& problem, const Tile& tile) {
  const int64_t d = problem.d, pairs = problem.pairs(), chunk = std::min(kPairChunk, pairs);
  std::vector<std::vector<Run>> triangle;  // by panel's width of products
  if (tile.diagonal()) {
    const int64_t products = tile.width() * (tile.width() + 1) / 2;
    for (int64_t e = 0; e < products; e += kPanel) {
      triangle.push_back(runs_of(e, std::min(products, e + kPanel), 1));
    }
  }
  const int64_t rights = tile.diagonal() ? static_cast<int64_t>(triangle.size()) : tile.height();
  const int64_t entries = rights * kPanel, lefts = (chunk + kGroup - 1) / kGroup, left_size = kRows * kGroup;
  const int64_t diagonals = problem.hessians.outer ? 0 : problem.c * entries;
  // A panel of right and one of features, with one more that form_triangle may write or read.
  const std::unique_ptr<float[]> scratch(
      new float[lefts * left_size + 2 * (kRows + 1) * kPanel + chunk * entries + diagonals]);
  float* const left = scratch.get();
  float* const right = left + lefts * left_size;
  float* const panel = right + (kRows + 1) * kPanel;
  float* const sums = panel + (kRows + 1) * kPanel;  // [chunk, entries]
  float* const diagonal = sums + chunk * entries;    // [c, entries]
  std::fill_n(panel + kRows * kPanel, kPanel, 0.f);
  std::fill_n(diagonal, diagonals, 0.f);
  const auto value_in = [&](const float* of) {
    return [of, &tile](int64_t j, int64_t k) { return of[(tile.diagonal() ? j * (j + 1) / 2 : j * kPanel) + k]; };
  };
  for (int64_t first = 0; first < pairs; first += chunk) {
    const int64_t count = std::min(chunk, pairs - first), groups = (count + kGroup - 1) / kGroup;
    struct Group {
      std::vector<Run> runs;
      Micro micro;
      float *left, *sums;
    };
    std::vector<Group> parts;
    for (int64_t g = 0; g < groups; ++g) {  // as equal as they can be
      const int64_t from = count * g / groups, to = count * (g + 1) / groups;
      parts.push_back({runs_of(first + from, first + to, problem.shortest), micro_of(to - from), left + g * left_size,
                       sums + from * entries});
    }
    std::fill_n(sums, count * entries, 0.f);
    for (int64_t begin = 0; begin < problem.n; begin += kRows) {
      const int64_t rows = std::min(kRows, problem.n - begin);
      for (const Group& part : parts) problem.form_factors(begin, rows, part.runs, kGroup, part.left);
      copy_panel(problem.x + begin * d + tile.k0, d, rows, tile.width(), panel);
      for (int64_t r = 0; r < rights; ++r) {
        if (tile.diagonal()) {
          form_triangle(panel, triangle[r].data(), static_cast<int64_t>(triangle[r].size()), rows, right);
        } else {
          form_row(panel, problem.x + begin * d + tile.j0 + r, d, rows, right);
        }
        for (const Group& part : parts) part.micro(part.left, right, rows, part.sums + r * kPanel, entries);
      }
      Progress::advance();
    }
    for (int64_t p = 0; p < count; ++p) {
      const float* const of = sums + p * entries;
      problem.add_pair(first + p, tile, diagonal, entries, of, value_in(of));
    }
  }
  if (problem.hessians.outer) return;
  for (int64_t a = 0; a < problem.c; ++a) problem.add(a, a, tile, 1, value_in(diagonal + a * entries));
}

// The same for few pairs of classes: the left factor is H_i[a, b] x_ij, the right one x_ik, pair after pair. On a tile
// of the diagonal the panels see the groups of features that reach below the diagonal.
void add_tile_of_few(const Problem& problem, const Tile& tile) {
  const int64_t d = problem.d, pairs = problem.pairs();
  const int64_t groups = (tile.height() + kGroup - 1) / kGroup, panels = (tile.width() + kPanel - 1) / kPanel;
  const int64_t stride = panels * kPanel, entries = groups * kGroup * stride, left_size = kRows * kGroup;
  const int64_t diagonals = problem.hessians.outer ? 0 : problem.c * entries;
  const std::unique_ptr<float[]> scratch(
      new float[groups * left_size + panels * kRows * kPanel + kRows * pairs + pairs * entries + diagonals]);
  float* const left = scratch.get();
  float* const panel = left + groups * left_size;
  float* const factors = panel + panels * kRows * kPanel;  // [pairs, kRows]
  float* const sums = factors + pairs * kRows;             // [pairs, entries]
  float* const diagonal = sums + pairs * entries;          // [c, entries]
  std::fill_n(sums, pairs * entries + diagonals, 0.f);
  for (int64_t begin = 0; begin < problem.n; begin += kRows) {
    const int64_t rows = std::min(kRows, problem.n - begin);
    const float* const x = problem.x + begin * d;
    for (int64_t k = 0; k < panels; ++k) {
      const int64_t column = tile.k0 + k * kPanel;
      copy_panel(x + column, d, rows, std::min(kPanel, tile.k1 - column), panel + k * kRows * kPanel);
    }
    for (int64_t p = 0; p < pairs; ++p) {
      problem.form_factors(begin, rows, runs_of(p, p + 1, problem.shortest), 1, factors + p * kRows);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t height = std::min(kGroup, tile.height() - g * kGroup);
        form_scaled(x + tile.j0 + g * kGroup, d, rows, height, factors + p * kRows, left + g * left_size);
      }
      for (int64_t k = 0; k < panels; ++k) {
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t height = std::min(kGroup, tile.height() - g * kGroup);
          if (tile.diagonal() && g * kGroup + height <= k * kPanel) continue;
          micro_of(height)(left + g * left_size, panel + k * kRows * kPanel, rows,
                           sums + p * entries + g * kGroup * stride + k * kPanel, stride);
        }
      }
    }
    Progress::advance();
  }
  const auto value_in = [stride](const float* of) {
    return [of, stride](int64_t j, int64_t k) { return of[j * stride + k]; };
  };
  for (int64_t p = 0; p < pairs; ++p) {
    const float* const of = sums + p * entries;
    problem.add_pair(p, tile, diagonal, entries, of, value_in(of));
  }
  if (problem.hessians.outer) return;
  for (int64_t a = 0; a < problem.c; ++a) problem.add(a, a, tile, 1, value_in(diagonal + a * entries));
}

// The lower triangle in tiles: as tall as leaves every thread some of them.
std::vector<Tile> tiles_of(int64_t d, int64_t width) {
  const int64_t wanted = d * (d + 1) / 2 / (2 * width * num_threads());
  const int64_t most = std::clamp(wanted, kLeastRows, kMostRows);
  std::vector<Tile> tiles;
  for (int64_t k0 = 0; k0 < d; k0 += width) {
    const int64_t k1 = std::min(d, k0 + width), rest = d - k1, parts = (rest + most - 1) / most;
    for (int64_t r = 0; r < parts; ++r) {
      tiles.push_back({k1 + rest * r / parts, k1 + rest * (r + 1) / parts, k0, k1});
    }
    tiles.push_back({k0, k1, k0, k1});
  }
  return tiles;
}

}  // namespace

bool can_add_pairs() { return isa() != Isa::generic; }

void add_pairs(float* out, const float* x, const OutputHessians& hessians, int64_t n, int64_t d, int64_t c) {
  const Problem problem(out, x, hessians, n, d, c);
  if (problem.pairs() == 0) return;
  const bool few = problem.few();
  const auto tiles = tiles_of(d, few ? 4 * kPanel : kPanel);
  const int64_t count = static_cast<int64_t>(tiles.size());
  const int64_t chunks = few ? 1 : (problem.pairs() + kPairChunk - 1) / kPairChunk;
  const Progress progress(count * chunks * ((n + kRows - 1) / kRows));
  Progress::for_each(count, [&](int64_t t) {
    if (few) {
      add_tile_of_few(problem, tiles[t]);
    } else {
      add_tile(problem, tiles[t]);
    }
  });
}

}  // namespace fastif
