// Every dot product kernel of this processor against plain loops: the integer ones to the last bit, the float32 ones
// within the error that the filter's certificate grants them.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "farthest_first/cpu/dots.h"

using namespace fastif;

int main() {
  std::mt19937 draw(0);
  int kinds = 0, failures = 0;
  for (const char* name : {"vnni", "avxvnni", "int8", "avx512", "avx2", "generic"}) {
    const auto codes = codes_named(name);
    if (!codes) continue;
    ++kinds;
    const bool integer = holds_int8(*codes);
    for (const int64_t steps : {1, 2, 15, 16, 17, 64, 129, 16384}) {
      for (int vectors = 1; vectors <= kGroup / kVector; ++vectors) {
        const int centres = vectors * kVector;
        const bool extreme = vectors == 2;  // the largest sums: every entry 127 or -127
        const auto random_codes = [&](int rows) {
          std::vector<char> out(rows * kUnit * steps);
          for (size_t i = 0; i < out.size(); ++i) {
            const int q = static_cast<int>(draw() % 255) - 127;
            out[i] = static_cast<char>(extreme ? (q < 0 ? -127 : 127) : q);
          }
          if (!integer) {
            for (size_t i = 0; i < out.size(); i += kUnit) {
              const float value = std::normal_distribution<float>()(draw);
              std::memcpy(&out[i], &value, kUnit);
            }
          }
          return out;
        };
        const auto x = random_codes(kTileRows), c = random_codes(centres);
        std::vector<char> packed(c.size());
        for (int k = 0; k < centres; ++k) {
          for (int64_t s = 0; s < steps; ++s) {
            const int32_t bits = unit(&c[kUnit * (k * steps + s)]) ^ (integer ? kFlip : 0);
            std::memcpy(&packed[kUnit * (s * centres + k)], &bits, kUnit);
          }
        }
        const char* rows[kTileRows];
        int32_t offset[kTileRows] = {};
        for (int r = 0; r < kTileRows; ++r) {
          rows[r] = &x[r * kUnit * steps];
          for (int64_t j = 0; j < kUnit * steps; ++j) offset[r] -= 128 * static_cast<signed char>(rows[r][j]);
        }
        Dots dots;
        tile_dots(*codes, rows, offset, packed.data(), steps, vectors, dots);
        for (int r = 0; r < kTileRows; ++r) {
          for (int k = 0; k < centres; ++k) {
            const char *row = rows[r], *centre = &c[k * kUnit * steps];
            double exact = 0, size = 0;
            for (int64_t j = 0; integer && j < kUnit * steps; ++j) {
              exact += static_cast<signed char>(row[j]) * static_cast<signed char>(centre[j]);
            }
            for (int64_t s = 0; !integer && s < steps; ++s) {
              const double product = static_cast<double>(real(row + kUnit * s)) * real(centre + kUnit * s);
              exact += product;
              size += std::abs(product);
            }
            const char* got = dots.bytes + kUnit * (kGroup * r + k);
            const double allowed = 1.07 * static_cast<double>(steps + 1) * 0x1p-24 * size;
            const double tile = integer ? unit(got) : real(got);
            const double pair = pair_dot(*codes, row, offset[r], centre, steps);
            if (!(std::abs(tile - exact) <= allowed) || !(std::abs(pair - exact) <= allowed)) {
              if (++failures < 10) std::printf("%s steps %ld: %g, tile %g, pair %g\n", name, steps, exact, tile, pair);
            }
          }
        }
      }
    }
  }
  std::printf("%d kinds, %d failures\n", kinds, failures);
  return failures != 0;
}
