// What decode attention has in common on all instruction sets: kinds of rows, how query heads are
// grouped, scratch, the polynomial of 2^x. Included by the files of instruction sets alone;
// everything is internal to them.
#pragma once

#include <cstdint>

#include "backend/cpu/attention/decode_kernels.h"

namespace mustafar {
namespace {

// How the rows of a tile are computed with.
enum class Kind { kF32, kF16, kBF16, kInt };
constexpr int kKinds = 4;

inline Kind kind_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return Kind::kF32;
    case DType::kF16:
      return Kind::kF16;
    case DType::kBF16:
      return Kind::kBF16;
    default:
      return Kind::kInt;
  }
}

// Calls body.operator()<kind>().
template <class Body>
inline void with_kind(Kind kind, Body&& body) {
  switch (kind) {
    case Kind::kF32:
      return body.template operator()<Kind::kF32>();
    case Kind::kF16:
      return body.template operator()<Kind::kF16>();
    case Kind::kBF16:
      return body.template operator()<Kind::kBF16>();
    case Kind::kInt:
      return body.template operator()<Kind::kInt>();
  }
}

// Calls body.operator()<n>(first) for groups of n query heads: fours, then two, then one, whose
// sums fit the registers.
template <class Body>
inline void for_query_groups(int32_t n_queries, Body&& body) {
  int32_t first = 0;
  for (; n_queries - first >= 4; first += 4) body.template operator()<4>(first);
  if (n_queries - first >= 2) {
    body.template operator()<2>(first);
    first += 2;
  }
  if (n_queries > first) body.template operator()<1>(first);
}

// Room for n elements at the front of what is left of a scratch, which shrinks by that. Aligned to
// 64 bytes as the scratch is.
template <typename T>
inline T* take(uint8_t*& scratch, int64_t n) {
  T* const room = reinterpret_cast<T*>(scratch);
  scratch += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  return room;
}

// Partial softmaxes over no token.
inline void clear_softmax(int32_t n_queries, float* max, float* sum) {
  for (int32_t h = 0; h < n_queries; h++) {
    max[h] = -__builtin_inff();
    sum[h] = 0.0f;
  }
}

// What a coded value's distance from the middle of its levels is multiplied by, for each dim of a
// head, beside the row's scale. out: [head_dim].
inline void code_steps(const CodeTable& table, int32_t head_dim, float* out) {
  for (int32_t d = 0; d < head_dim; d++) out[d] = coded_step(table.widths[d]) * table.sigmas[d];
}

// Whether rows are so much rounded or pruned that queries and weights of one byte add next to
// nothing to that (DecodeRun::fine). The smallest quarter of normal numbers has 0.9 % of their
// energy: without it a row is off by a tenth.
inline bool is_coarse(const SlotLayout& layout) {
  if (layout.dtype == DType::kInt8) return 4 * layout.row_keep <= 3 * layout.head_dim;
  return layout.dtype == DType::kInt4 || layout.row_bytes <= layout.head_dim / 2;
}

// Weights of one byte are rounded down after one of these is added, so that a tile's many small
// weights beside a large one add up to what they should: the fractional parts of multiples of the
// golden ratio, which neighbours share evenly.
struct Dither {
  alignas(64) float at[kTileTokens];
};
constexpr Dither make_dither() {
  Dither dither = {};
  for (int i = 0; i < kTileTokens; i++) {
    const double x = (i + 0.5) * 0.6180339887498949;
    dither.at[i] = static_cast<float>((x - static_cast<int>(x)) * 0.99);
  }
  return dither;
}
constexpr Dither kDither = make_dither();

// 2^f for f in [-1/2, 1/2] as a polynomial, the highest power first; relative error below 2e-7.
constexpr float kExp2Terms[] = {1.535336188319500e-4f,
                                1.339887440266574e-3f,
                                9.618437357674640e-3f,
                                5.550332471162809e-2f,
                                2.402264791363012e-1f,
                                6.931472028550421e-1f,
                                1.0f};

}  // namespace
}  // namespace mustafar
