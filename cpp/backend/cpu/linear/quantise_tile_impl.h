// Rounding of weights to codes, over Simd: lanes are the rows of a tile, so that every sum has the
// order of the inputs, and every instruction set computes the same bits (the project is compiled
// without contraction to fused multiply-adds).
//
// A group's values are taken from the middle of their range: v = w - middle. For each of kShrinks
// codes q spread over that part of the range, the line through the points (q, v) has the least
// squared error; the shrink whose line explains most of the values' variance gives scale and
// minimum. Eight bits need no shrink. Both are rounded to f16, the scale first and the minimum for
// the scale as stored, and codes are round((w - minimum) / scale) for the two as stored.
#pragma once

#include <cstdint>
#include <cstring>

#include "backend/cpu/kernels.h"
#include "backend/cpu/linear/quantised_codes_impl.h"

namespace mustafar {
namespace {

constexpr float kShrinks[] = {1.0f, 0.97f, 0.94f, 0.9f, 0.86f};
constexpr int kShrinks4Bits = 5, kShrinks8Bits = 1;

inline Floats select(Ints mask, Floats yes, Floats no) {
  return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask));
}
inline Floats splat(float x) { return (Floats)Simd::set1(x); }
inline Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }

// To the nearest integer, of ties to the even one, within [low, high]; |x| < 2^22.
inline Floats round_within(Floats x, float low, float high) {
  const Floats magic = splat(12582912.0f);
  const Floats rounded = (x + magic) - magic;
  const Floats above = select(rounded < splat(low), splat(low), rounded);
  return select(above > splat(high), splat(high), above);
}

// x / y, 0 where y is 0 or the quotient not finite.
inline Floats divide(Floats x, Floats y) {
  const Floats quotient = x / y;
  const Ints fine = magnitude(quotient) <= splat(3.4028234663852886e38f);
  return select(fine, quotient, splat(0.0f));
}

// Row-major weights to [inner][16], zero where there are none.
template <class Load>
void transpose_tile(const Matrix& stored, int64_t row0, int64_t inner, float* out) {
  const auto* w = static_cast<const typename Load::Element*>(stored.data);
  for (int64_t r = 0; r < kTileRows; r += Simd::kWidth) {
    for (int64_t c = 0; c < inner; c += Simd::kWidth) {
      Simd::F rows[Simd::kWidth];
      const int64_t left = stored.cols - c;
      for (int i = 0; i < Simd::kWidth; i++) {
        const int64_t row = row0 + r + i;
        const auto* p = w + row * stored.cols + c;
        if (row >= stored.rows || left <= 0) {
          rows[i] = Simd::zero();
        } else if (left >= Simd::kWidth) {
          rows[i] = Load::load(p);
        } else {
          rows[i] = Load::load_partial(p, static_cast<int>(left));
        }
      }
      Simd::transpose(rows);
      for (int i = 0; i < Simd::kWidth; i++) Simd::store(out + (c + i) * kTileRows + r, rows[i]);
    }
  }
}

// How a group's codes become weights.
struct Line {
  Floats scale, minimum;  // as stored in f16
};

// The line of n inputs, x: [n][16], stored at scale and minimum [kWidth]. top: the largest code.
inline Line fit_line(const float* x, int64_t n, float top, uint16_t* scale, uint16_t* minimum) {
  Floats low = (Floats)Simd::load(x), high = low;
  for (int64_t c = 1; c < n; c++) {
    const Floats w = (Floats)Simd::load(x + c * kTileRows);
    low = select(w < low, w, low);
    high = select(w > high, w, high);
  }
  const Floats range = high - low, middle = low + range * splat(0.5f);
  const Floats count = splat(static_cast<float>(n)), half = splat(0.5f * top);
  Floats sum = splat(0.0f);
  for (int64_t c = 0; c < n; c++) sum = sum + ((Floats)Simd::load(x + c * kTileRows) - middle);

  Floats best = splat(0.0f), slope = splat(0.0f), codes = splat(0.0f);
  const int n_shrinks = top > 15.0f ? kShrinks8Bits : kShrinks4Bits;
  for (int k = 0; k < n_shrinks; k++) {
    const Floats factor = divide(splat(top / kShrinks[k]), range);
    Floats q_sum = splat(0.0f), qq_sum = splat(0.0f), qv_sum = splat(0.0f);
    for (int64_t c = 0; c < n; c++) {
      const Floats v = (Floats)Simd::load(x + c * kTileRows) - middle;
      const Floats q = round_within(v * factor + half, 0.0f, top) - half;
      q_sum = q_sum + q;
      qq_sum = qq_sum + q * q;
      qv_sum = qv_sum + q * v;
    }
    const Floats covariance = count * qv_sum - q_sum * sum;
    const Floats mean = divide(covariance, count * qq_sum - q_sum * q_sum);
    const Floats score = covariance * mean;
    const Ints better = score > best;
    best = select(better, score, best);
    slope = select(better, mean, slope);
    codes = select(better, q_sum, codes);
  }
  Line line;
  Simd::store_f16(scale, (Simd::F)slope);
  line.scale = (Floats)Simd::load_f16(scale);
  const Floats first = middle + (sum - line.scale * codes) / count - line.scale * half;
  Simd::store_f16(minimum, (Simd::F)first);
  line.minimum = (Floats)Simd::load_f16(minimum);
  return line;
}

bool quantise_tile(const Matrix& stored, const QuantisedShape& shape, int64_t tile, uint8_t* codes,
                   uint16_t* scales, uint16_t* minimums, float* scratch) {
  const int64_t inner = shape.inner();
  switch (stored.dtype) {
    case DType::kF32:
      transpose_tile<LoadF32>(stored, tile * kTileRows, inner, scratch);
      break;
    case DType::kF16:
      transpose_tile<LoadF16>(stored, tile * kTileRows, inner, scratch);
      break;
    default:
      transpose_tile<LoadBF16>(stored, tile * kTileRows, inner, scratch);
  }
  const bool is_4_bits = shape.dtype == DType::kInt4;
  const float top = is_4_bits ? 15.0f : 255.0f;
  codes += tile * shape.tile_code_bytes();
  scales += tile * shape.tile_scales();
  minimums += tile * shape.tile_scales();
  Floats bad = splat(0.0f);  // NaN where something is not finite
  for (int64_t lane = 0; lane < kTileRows; lane += Simd::kWidth) {
    for (int64_t c = 0, group = 0; c < inner; group++) {
      const int64_t end = c + shape.group < inner ? c + shape.group : inner;
      const int64_t n = end < shape.cols ? end - c : shape.cols - c;  // the rest is no weight
      const float* x = scratch + c * kTileRows + lane;
      for (int64_t i = 0; i < n; i++) {
        bad = bad + (Floats)Simd::load(x + i * kTileRows) * splat(0.0f);
      }
      const int64_t at = group * kTileRows + lane;
      const Line line = fit_line(x, n, top, scales + at, minimums + at);
      bad = bad + line.scale * splat(0.0f) + line.minimum * splat(0.0f);
      const Floats factor = divide(splat(1.0f), line.scale);
      Words word = {};
      for (; c < end; c++) {
        const Floats w = (Floats)Simd::load(scratch + c * kTileRows + lane);
        const Floats q = round_within((w - line.minimum) * factor, 0.0f, top);
        const Words code = (Words) __builtin_convertvector(q, Ints);
        word |= code << (8 * (c % 4) + (is_4_bits ? c / 4 % 2 * 4 : 0));
        if ((c + 1) % shape.line_inputs() == 0) {
          const int64_t line_at = c / shape.line_inputs() * kLineBytes;
          std::memcpy(codes + line_at + lane * 4, &word, sizeof word);
          word = Words{};
        }
      }
    }
  }
  bool finite = true;
  for (int i = 0; i < Simd::kWidth; i++) finite = finite && bad[i] == 0.0f;
  return finite;
}

}  // namespace
}  // namespace mustafar
