// Dot products of coded rows: a register tile of rows and centres at a time, for each kind of processor.
//
// A code is a row of `steps` units of 4 bytes, the last one filled with zeros: four int8, whose dot products are exact
// int32 and hence the same bits from every integer kernel, or one float32, whose dot products are sums in one chain, a
// product and a sum rounded together or apart.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

namespace fastif {

// vnni (AVX-512), avxvnni (256 bits) and int8 (any processor, for tests) hold int8; the others float32.
enum class Codes { vnni, avxvnni, int8, avx512, avx2, generic };

inline bool holds_int8(Codes codes) { return codes <= Codes::int8; }

// The best that this processor has, int8 only if allowed, or the named one where the processor has it.
Codes best_codes(bool int8);
std::optional<Codes> codes_named(const std::string& name);

inline constexpr int kUnit = 4;
// Rows of a register tile; centres in a vector, and in a tile.
inline constexpr int kTileRows = 6, kVector = 16, kGroup = 64;

inline int32_t unit(const char* code) {
  int32_t bits;
  std::memcpy(&bits, code, kUnit);
  return bits;
}
inline float real(const char* code) { return std::bit_cast<float>(unit(code)); }

struct alignas(64) Dots {
  char bytes[kUnit * kTileRows * kGroup];  // [kTileRows, kGroup] int32 or float
};

// The integer kernels multiply signed by unsigned bytes: packed centres hold q + 128, which the sum of row r undoes by
// starting at offset[r] = -128 sum q.
inline constexpr int32_t kFlip = static_cast<int32_t>(0x80808080u);

// out[r, c] = rows[r] . centre c of 16 `vectors` centres, packed as [steps, vectors, kVector] units.
void tile_dots(Codes codes, const char* const* rows, const int32_t* offset, const char* packed, int64_t steps,
               int vectors, Dots& out);

// row . centre, neither of them packed.
double pair_dot(Codes codes, const char* row, int32_t offset, const char* centre, int64_t steps);

}  // namespace fastif
