#include "tiles.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../../common/simd.h"
#include "../../common/tasks.h"

#ifdef FASTIF_X86
#include <immintrin.h>
#endif

namespace fastif {
namespace {

// A tile of a gradient has 6 rows, whose operand is read number by number, and 2 vectors of columns: 12 sums in
// registers, enough to hide the latency of multiply-adds.
constexpr int64_t kTileRows = 6;

// Forms the tile g = sum_s x[s]^T y[s] of one example, x [t, kTileRows] and y [t, width], and adds its squares up:
//   norm false   out[m][j] += factor[0] g[m][j]^2           out [kTileRows, width]
//   norm true    out[j] += sum_m factor[m][j] g[m][j]^2     factor [kTileRows, width], out [width]
template <typename T>
using Micro = void (*)(const T* x, const T* y, int64_t t, const T* factor, T* out);

template <typename T>
struct Kernels {
  int64_t width;
  Micro<T> micro[2][2];  // [norm][vectors - 1]
};

#ifdef FASTIF_X86
namespace avx512 {
#define FASTIF_TARGET __attribute__((target("avx512f")))
#define FASTIF_INLINE FASTIF_TARGET __attribute__((always_inline)) inline
FASTIF_INLINE __m512 load(const float* x) { return _mm512_loadu_ps(x); }
FASTIF_INLINE __m512d load(const double* x) { return _mm512_loadu_pd(x); }
FASTIF_INLINE void store(float* x, __m512 v) { _mm512_storeu_ps(x, v); }
FASTIF_INLINE void store(double* x, __m512d v) { _mm512_storeu_pd(x, v); }
FASTIF_INLINE __m512 splat(float x) { return _mm512_set1_ps(x); }
FASTIF_INLINE __m512d splat(double x) { return _mm512_set1_pd(x); }
FASTIF_INLINE __m512 multiply_add(__m512 x, __m512 y, __m512 z) { return _mm512_fmadd_ps(x, y, z); }
FASTIF_INLINE __m512d multiply_add(__m512d x, __m512d y, __m512d z) { return _mm512_fmadd_pd(x, y, z); }
#include "micro.h"
#undef FASTIF_INLINE
#undef FASTIF_TARGET
}  // namespace avx512

namespace avx2 {
#define FASTIF_TARGET __attribute__((target("avx2,fma")))
#define FASTIF_INLINE FASTIF_TARGET __attribute__((always_inline)) inline
FASTIF_INLINE __m256 load(const float* x) { return _mm256_loadu_ps(x); }
FASTIF_INLINE __m256d load(const double* x) { return _mm256_loadu_pd(x); }
FASTIF_INLINE void store(float* x, __m256 v) { _mm256_storeu_ps(x, v); }
FASTIF_INLINE void store(double* x, __m256d v) { _mm256_storeu_pd(x, v); }
FASTIF_INLINE __m256 splat(float x) { return _mm256_set1_ps(x); }
FASTIF_INLINE __m256d splat(double x) { return _mm256_set1_pd(x); }
FASTIF_INLINE __m256 multiply_add(__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }
FASTIF_INLINE __m256d multiply_add(__m256d x, __m256d y, __m256d z) { return _mm256_fmadd_pd(x, y, z); }
#include "micro.h"
#undef FASTIF_INLINE
#undef FASTIF_TARGET
}  // namespace avx2
#endif

namespace generic {  // 16-byte vectors: the compiler finds instructions for them on any processor
#define FASTIF_TARGET
template <typename T>
struct alignas(16) Vector {
  static constexpr int kLanes = 16 / sizeof(T);
  T lane[kLanes];
  Vector operator*(const Vector& y) const {
    Vector z;
    for (int l = 0; l < kLanes; ++l) z.lane[l] = lane[l] * y.lane[l];
    return z;
  }
};
template <typename T>
inline Vector<T> load(const T* x) {
  Vector<T> v;
  std::memcpy(v.lane, x, sizeof v);
  return v;
}
template <typename T>
inline void store(T* x, const Vector<T>& v) {
  std::memcpy(x, v.lane, sizeof v);
}
template <typename T>
inline Vector<T> splat(T x) {
  Vector<T> v;
  for (T& lane : v.lane) lane = x;
  return v;
}
template <typename T>
inline Vector<T> multiply_add(const Vector<T>& x, const Vector<T>& y, Vector<T> z) {
  for (int l = 0; l < Vector<T>::kLanes; ++l) z.lane[l] += x.lane[l] * y.lane[l];
  return z;
}
#include "micro.h"
#undef FASTIF_TARGET
}  // namespace generic

template <typename T>
Kernels<T> best_kernels() {
#ifdef FASTIF_X86
  if (isa() == Isa::avx512) return avx512::kernels<T>();
  if (isa() == Isa::avx2) return avx2::kernels<T>();
#endif
  return generic::kernels<T>();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A region is what one task keeps in its second-level cache: up to 128 tiles, no more than 8 of them side by side.
constexpr int64_t kRegionTiles = 128, kRegionColumns = 8;
constexpr int64_t kTasks = 64;       // enough for the cores of large machines, where the work can be cut so
constexpr int64_t kSlabRows = 2048;  // no fewer positions are worth sums of their own
constexpr int64_t kExamples = 256;   // a float32 sum of many examples loses digits with its length: two levels

// panels[p][s][j] = x[s][(first + p) W + j], s < t: `count` panels of W columns, 0 past the last of `columns`. A few
// rows at a time: they are in the first-level cache for every panel, while the next ones are on their way.
template <int64_t W, typename T>
void pack(const T* x, int64_t t, int64_t columns, int64_t first, int64_t count, T* panels) {
  constexpr int64_t kBlock = 16;
  for (int64_t s0 = 0; s0 < t; s0 += kBlock) {
    const int64_t s1 = std::min(t, s0 + kBlock);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t column = (first + p) * W, width = std::min(W, columns - column);
      const T* from = x + s0 * columns + column;
      T* to = panels + (p * t + s0) * W;
      for (int64_t s = s0; s < s1; ++s, from += columns, to += W) {
        __builtin_prefetch(from + kBlock * columns);
        if (width == W) {
          std::memcpy(to, from, W * sizeof(T));
        } else {
          std::copy_n(from, width, to);
          std::fill(to + width, to + W, T(0));
        }
      }
    }
  }
}

template <typename T>
void pack_columns(const T* x, int64_t t, int64_t columns, int64_t first, int64_t count, int64_t width, T* panels) {
  if (width == 4) return pack<4>(x, t, columns, first, count, panels);
  if (width == 8) return pack<8>(x, t, columns, first, count, panels);
  if (width == 16) return pack<16>(x, t, columns, first, count, panels);
  return pack<32>(x, t, columns, first, count, panels);
}

// The gradients' tiles and who works on which. Gradients are turned where that fills the tiles better: x is the operand
// whose columns make up rows of tiles, y the other.
template <typename T>
class Tiles {
 public:
  Tiles(const Tensor& inputs, const Tensor& output_grads) : kernels_(best_kernels<T>()) {
    n = inputs.size(0), t = inputs.size(1);
    const T *a = inputs.const_data_ptr<T>(), *u = output_grads.const_data_ptr<T>();
    const int64_t d = inputs.size(2), o = output_grads.size(2);
    const auto padded = [&](int64_t rows, int64_t columns) {
      const int64_t vector = kernels_.width / 2;
      return ceil_div(rows, kTileRows) * kTileRows * ceil_div(columns, vector) * vector;
    };
    turned = padded(d, o) < padded(o, d);
    x_ = turned ? a : u, y_ = turned ? u : a;
    rows = turned ? d : o, columns = turned ? o : d;
    x_panels = ceil_div(rows, kTileRows), y_panels = ceil_div(columns, width());
    y_regions = ceil_div(y_panels, kRegionColumns);
    region_columns = ceil_div(y_panels, y_regions);
    x_regions = ceil_div(x_panels, kRegionTiles / region_columns);
    region_rows = ceil_div(x_panels, x_regions);
  }

  int64_t width() const { return kernels_.width; }
  int64_t tile_size() const { return kTileRows * kernels_.width; }
  int64_t regions() const { return x_regions * y_regions; }

  struct Region {
    int64_t x0, x1, y0, y1;  // panels
    int64_t tiles() const { return (x1 - x0) * (y1 - y0); }
  };
  Region region(int64_t index) const {
    const int64_t i = index / y_regions, j = index % y_regions;
    return {x_panels * i / x_regions, x_panels * (i + 1) / x_regions, y_panels * j / y_regions,
            y_panels * (j + 1) / y_regions};
  }

  int64_t packed_size() const { return t * (region_rows * kTileRows + region_columns * width()); }

  // Calls visit(x panel, y panel, micro kernel, x, y) for every tile of the region, column after column of tiles.
  template <bool norm, typename Visit>
  void example(int64_t i, const Region& r, T* packed, Visit visit) const {
    T *const x = packed, *const y = packed + t * region_rows * kTileRows;
    pack<kTileRows>(x_ + i * t * rows, t, rows, r.x0, r.x1 - r.x0, x);
    pack_columns(y_ + i * t * columns, t, columns, r.y0, r.y1 - r.y0, width(), y);
    for (int64_t q = r.y0; q < r.y1; ++q) {
      const Micro<T> micro = kernels_.micro[norm][(columns - q * width()) * 2 > width()];
      for (int64_t p = r.x0; p < r.x1; ++p) {
        visit(p, q, micro, x + (p - r.x0) * t * kTileRows, y + (q - r.y0) * t * width());
      }
    }
  }

  // The place in [o, d] of entry (m, j) of tile (p, q), or -1 in the padding.
  template <typename Visit>
  void entries(int64_t p, int64_t q, Visit visit) const {  // visit(row of g, column of g, index in the tile)
    const int64_t height = std::min(kTileRows, rows - p * kTileRows), wide = std::min(width(), columns - q * width());
    for (int64_t m = 0; m < height; ++m) {
      for (int64_t j = 0; j < wide; ++j) {
        const int64_t row = p * kTileRows + m, column = q * width() + j;
        visit(turned ? column : row, turned ? row : column, m * width() + j);
      }
    }
  }

  int64_t n, t, rows, columns, x_panels, y_panels, x_regions, y_regions, region_rows, region_columns;
  bool turned;

 private:
  Kernels<T> kernels_;
  const T *x_, *y_;
};

// Calls work(task, scratch) for every task; the scratch is the thread's.
template <typename T, typename Work>
void for_tasks_with(int64_t scratch_size, int64_t tasks, Work work) {
  const Tensor scratch = empty({threads_for(tasks), scratch_size}, type_of<T>);
  T* const memory = scratch.mutable_data_ptr<T>();
  for_tasks(tasks, [&](int64_t task, int64_t thread) { work(task, memory + thread * scratch_size); });
}

// A task owns one region over one of `slabs` equal ranges of the examples (several where regions alone are few).
template <typename T>
void add_squares(const Tensor& inputs, const Tensor& output_grads, const T* weights, T* out) {
  const Tiles<T> tiles(inputs, output_grads);
  const int64_t slabs =
      std::clamp<int64_t>(kTasks / tiles.regions(), 1, std::clamp<int64_t>(tiles.n * tiles.t / kSlabRows, 1, tiles.n));
  const int64_t size = tiles.tile_size(), all = tiles.x_panels * tiles.y_panels * size;
  const Tensor sums = zeros({slabs, all}, inputs);  // tile after tile
  T* const sum = sums.mutable_data_ptr<T>();
  const int64_t packed = tiles.packed_size(), own = tiles.region_rows * tiles.region_columns * size;
  for_tasks_with<T>(packed + own, slabs * tiles.regions(), [&](int64_t task, T* scratch) {
    const int64_t slab = task / tiles.regions();
    const auto region = tiles.region(task % tiles.regions());
    const int64_t end = tiles.n * (slab + 1) / slabs;
    T* const part = scratch + packed;
    for (int64_t i = tiles.n * slab / slabs; i < end;) {
      std::fill_n(part, region.tiles() * size, T(0));
      for (const int64_t stop = std::min(end, i + kExamples); i < stop; ++i) {
        T* to = part;
        tiles.template example<false>(i, region, scratch,
                                      [&](int64_t, int64_t, Micro<T> micro, const T* x, const T* y) {
                                        micro(x, y, tiles.t, weights + i, to);
                                        to += size;
                                      });
      }
      const T* from = part;
      for (int64_t q = region.y0; q < region.y1; ++q) {
        for (int64_t p = region.x0; p < region.x1; ++p, from += size) {
          T* const to = sum + slab * all + (q * tiles.x_panels + p) * size;
          for (int64_t e = 0; e < size; ++e) to[e] += from[e];
        }
      }
    }
  });
  const int64_t d = inputs.size(2);
  parallel_for(0, tiles.y_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) {
      for (int64_t p = 0; p < tiles.x_panels; ++p) {
        tiles.entries(p, q, [&](int64_t row, int64_t column, int64_t e) {
          T total = 0;
          for (int64_t s = 0; s < slabs; ++s) total += sum[s * all + (q * tiles.x_panels + p) * size + e];
          out[row * d + column] += total;
        });
      }
    }
  });
}

// A task owns one region of a few neighbouring examples.
template <typename T>
void sq_norms(const Tensor& inputs, const Tensor& output_grads, const std::optional<Tensor>& scale, T* out) {
  const Tiles<T> tiles(inputs, output_grads);
  const int64_t size = tiles.tile_size();
  const Tensor factors = zeros({scale ? tiles.x_panels * tiles.y_panels : 1, size}, inputs);
  T* const factor = factors.mutable_data_ptr<T>();
  if (scale) {
    const T* const from = scale->const_data_ptr<T>();
    for (int64_t q = 0; q < tiles.y_panels; ++q) {
      for (int64_t p = 0; p < tiles.x_panels; ++p) {
        tiles.entries(p, q, [&](int64_t row, int64_t column, int64_t e) {
          factor[(q * tiles.x_panels + p) * size + e] = from[row * scale->stride(0) + column * scale->stride(1)];
        });
      }
    }
  } else {
    std::fill_n(factor, size, T(1));
  }
  const int64_t group = std::max<int64_t>(1, (1 << 18) / (tiles.t * tiles.region_rows * tiles.region_columns * size));
  const int64_t groups = ceil_div(tiles.n, group);
  const Tensor parts = empty({tiles.n, tiles.regions()}, kDouble);
  double* const part = parts.mutable_data_ptr<double>();
  const int64_t packed = tiles.packed_size();
  for_tasks_with<T>(packed + tiles.width(), groups * tiles.regions(), [&](int64_t task, T* scratch) {
    const int64_t begin = task / tiles.regions() * group, index = task % tiles.regions();
    const auto region = tiles.region(index);
    T* const lanes = scratch + packed;
    for (int64_t i = begin; i < std::min(tiles.n, begin + group); ++i) {
      double total = 0;
      tiles.template example<true>(
          i, region, scratch, [&](int64_t p, int64_t q, Micro<T> micro, const T* x, const T* y) {
            if (p == region.x0) std::fill_n(lanes, tiles.width(), T(0));
            micro(x, y, tiles.t, factor + (scale ? (q * tiles.x_panels + p) * size : 0), lanes);
            if (p == region.x1 - 1) {
              for (int64_t j = 0; j < tiles.width(); ++j) total += static_cast<double>(lanes[j]);
            }
          });
      part[i * tiles.regions() + index] = total;
    }
  });
  for (int64_t i = 0; i < tiles.n; ++i) {
    double total = 0;
    for (int64_t r = 0; r < tiles.regions(); ++r) total += part[i * tiles.regions() + r];
    out[i] = static_cast<T>(total);
  }
}

}  // namespace

void add_squares_by_tiles(const Tensor& inputs, const Tensor& output_grads, const Tensor& weights, const Tensor& out) {
  with_type_of(out, [&]<typename T>(T) {
    add_squares<T>(inputs, output_grads, weights.const_data_ptr<T>(), out.mutable_data_ptr<T>());
  });
}

void sq_norms_by_tiles(const Tensor& inputs, const Tensor& output_grads, const std::optional<Tensor>& scale,
                       const Tensor& out) {
  with_type_of(out, [&]<typename T>(T) { sq_norms<T>(inputs, output_grads, scale, out.mutable_data_ptr<T>()); });
}

}  // namespace fastif
