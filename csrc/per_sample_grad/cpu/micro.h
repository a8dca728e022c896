// The innermost loop of tiles.cpp, which includes this once per instruction set: inside a namespace
// that has load, store, splat and multiply_add on that set's vectors, with FASTIF_TARGET naming the set. No #pragma
// once on purpose.

// `vectors` of the 2 vectors of a tile's columns: the last tile of a row may need one only.
template <typename T, bool norm, int vectors>
FASTIF_TARGET void micro(const T* x, const T* y, int64_t t, const T* factor, T* out) {
  using Vector = decltype(splat(T()));
  constexpr int64_t lanes = sizeof(Vector) / sizeof(T), width = 2 * lanes;
  Vector g[kTileRows][vectors] = {};
  for (int64_t s = 0; s < t; ++s, x += kTileRows, y += width) {
    Vector row[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) row[v] = load(y + v * lanes);
#pragma GCC unroll 6
    for (int m = 0; m < kTileRows; ++m) {
      const Vector left = splat(x[m]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) g[m][v] = multiply_add(left, row[v], g[m][v]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < vectors; ++v) {
    Vector sum = norm ? load(out + v * lanes) : splat(factor[0]);
#pragma GCC unroll 6
    for (int m = 0; m < kTileRows; ++m) {
      const int64_t at = m * width + v * lanes;
      if constexpr (norm) {
        sum = multiply_add(load(factor + at) * g[m][v], g[m][v], sum);
      } else {
        store(out + at, multiply_add(sum * g[m][v], g[m][v], load(out + at)));
      }
    }
    if constexpr (norm) store(out + v * lanes, sum);
  }
}

template <typename T>
Kernels<T> kernels() {
  return {2 * sizeof(splat(T())) / sizeof(T),
          {{micro<T, false, 1>, micro<T, false, 2>}, {micro<T, true, 1>, micro<T, true, 2>}}};
}
