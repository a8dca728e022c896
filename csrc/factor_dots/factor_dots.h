// factor_dots: products of queries with sums of outer products of int8 vectors, which are neither formed nor unpacked.
//
// Example i has ranks[i] factors, in the order of the examples:
//   out[q, i] = sum_{f of i} scale_f left_f^T Q_q right_f          [q, n] float32
//
// An entry of a query may be rounded: by 1/65,000 of the largest in its row or in its column, which the shapes decide,
// or by 2^-127 where that is more. Sums over 512 entries of a vector are then exact, or float32; those of all these are
// float32.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>

#include "../common/checks.h"

namespace fastif {

// The type of every device's kernel.
using FactorDotsOp = Tensor(const Tensor& left, const Tensor& right, const std::optional<Tensor>& scale,
                            const Tensor& ranks, const Tensor& queries, const std::optional<Tensor>& along);

inline void check_device(const char* op, const char* name, const Tensor& x, const Tensor& left) {
  CHECK_VALUE(x.device() == left.device(), op, ": ", name, " must be on the device of left (", left.device(), "), got ",
              x.device());
}

inline void check_factor_dots(const Tensor& left,                    // [F, o] int8
                              const Tensor& right,                   // [F, d] int8
                              const std::optional<Tensor>& scale,    // [F] float32
                              const Tensor& ranks,                   // [n] int32, >= 0, which sum to F
                              const Tensor& queries,                 // [q, o, d] float32; with along, [q, o, r]
                              const std::optional<Tensor>& along) {  // [q, r, d] float32
  constexpr auto op = "factor_dots";
  check_rank(op, "left", "[F, o]", left, 2);
  check_rank(op, "right", "[F, d]", right, 2);
  check_rank(op, "ranks", "[n]", ranks, 1);
  check_rank(op, "queries", along ? "[q, o, r]" : "[q, o, d]", queries, 3);
  CHECK_TYPE(left.scalar_type() == kChar, op, ": left must be int8, got ", left.scalar_type());
  check_same_type(op, "right", right, "left", left);
  CHECK_TYPE(ranks.scalar_type() == kInt, op, ": ranks must be int32, got ", ranks.scalar_type());
  CHECK_TYPE(queries.scalar_type() == kFloat, op, ": queries must be float32, got ", queries.scalar_type());
  check_device(op, "ranks", ranks, left);
  check_device(op, "queries", queries, left);
  const int64_t f = left.size(0), o = left.size(1), d = right.size(1);
  CHECK_VALUE(o > 0 && d > 0, op, ": vectors must not be empty, got left ", left.sizes(), " and right ", right.sizes());
  CHECK_VALUE(right.size(0) == f, op, ": right must have F=", f, " rows, got ", right.size(0));
  if (along) {
    check_rank(op, "along", "[q, r, d]", *along, 3);
    check_same_type(op, "along", *along, "queries", queries);
    const int64_t q = queries.size(0), r = queries.size(2);
    CHECK_VALUE(queries.size(1) == o && r > 0, op, ": queries must be [q, o=", o, ", r > 0], got ", queries.sizes());
    CHECK_VALUE(along->size(0) == q && along->size(1) == r && along->size(2) == d, op, ": along must be [q=", q,
                ", r=", r, ", d=", d, "], got ", along->sizes());
    check_finite_rows(op, "along", *along);
  } else {
    CHECK_VALUE(queries.size(1) == o && queries.size(2) == d, op, ": queries must be [q, o=", o, ", d=", d, "], got ",
                queries.sizes());
  }
  if (scale) {
    check_rank(op, "scale", "[F]", *scale, 1);
    CHECK_TYPE(scale->scalar_type() == kFloat, op, ": scale must be float32, got ", scale->scalar_type());
    check_device(op, "scale", *scale, left);
    CHECK_VALUE(scale->size(0) == f, op, ": scale must have F=", f, " entries, got ", scale->size(0));
    check_finite_rows(op, "scale", *scale);
  }
  check_finite_rows(op, "queries", queries);
  const int64_t least = ranks.numel() == 0 ? 0 : aminmax(ranks).first.item<int64_t>();
  CHECK_VALUE(least >= 0, op, ": ranks must be >= 0, got ", least);
  const int64_t all = ranks.numel() == 0 ? 0 : sum(ranks).item<int64_t>();
  CHECK_VALUE(all == f, op, ": ranks must sum to F=", f, ", got ", all);
}

// Inputs are finite, so that only an overflow is not.
inline void check_factor_dots_result(const Tensor& out) {
  if (out.numel() == 0 || std::isfinite(sum(out).item<double>())) return;
  CHECK_VALUE(all(isfinite(out)).item<bool>(), "factor_dots: the result overflows Float; scale the queries");
}

}  // namespace fastif
