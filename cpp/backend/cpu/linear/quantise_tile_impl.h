// Rounding of weights to codes, over Simd: lanes are the rows of a tile, so that every sum has the
// order of the inputs, and every instruction set computes the same bits (the project is compiled
// without contraction to fused multiply-adds).
//
//   8 bits  scale = largest |w| / 127, codes -127 to 127
//   4 bits  codes -8 to 7. m, the first of the values largest in size, is tried at each of
//           kDivisors: codes q = round(w divisor / m), and a = sum w q, b = sum q^2. The divisor
//           with the largest a^2 / b has the least squared error with its best scale a / b.
//
// The scale is rounded to f16, and codes are round(w / scale) for the scale as stored.
#pragma once

#include <cstdint>
#include <cstring>

#include "backend/cpu/kernels.h"
#include "backend/cpu/linear/quantised_codes_impl.h"

namespace mustafar {
namespace {

constexpr float kDivisors[] = {-8.0f,  -7.0f,  -7.25f, -7.5f, -7.75f, -8.25f, -8.5f,
                               -8.75f, -9.25f, 7.0f,   7.25f, -6.5f,  -9.75f};

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

// The scale of n inputs, x: [n][16].
inline Floats scale_8(const float* x, int64_t n) {
  Floats most = splat(0.0f);
  for (int64_t c = 0; c < n; c++) {
    const Floats size = magnitude((Floats)Simd::load(x + c * kTileRows));
    most = select(size > most, size, most);
  }
  return most / splat(127.0f);
}

inline Floats scale_4(const float* x, int64_t n) {
  Floats most = splat(0.0f);
  for (int64_t c = 0; c < n; c++) {
    const Floats v = (Floats)Simd::load(x + c * kTileRows);
    most = select(magnitude(v) > magnitude(most), v, most);
  }
  Floats best = splat(0.0f), scale = splat(0.0f);
  for (const float divisor : kDivisors) {
    const Floats factor = divide(splat(divisor), most);
    Floats a = splat(0.0f), b = splat(0.0f);
    for (int64_t c = 0; c < n; c++) {
      const Floats v = (Floats)Simd::load(x + c * kTileRows);
      const Floats q = round_within(v * factor, -8.0f, 7.0f);
      a = a + v * q;
      b = b + q * q;
    }
    const Floats mean = divide(a, b), score = a * mean;
    const Ints better = score > best;
    best = select(better, score, best);
    scale = select(better, mean, scale);
  }
  return scale;
}

bool quantise_tile(const Matrix& stored, const QuantisedShape& shape, int64_t tile, uint8_t* codes,
                   uint16_t* scales, float* scratch) {
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
  const float low = is_4_bits ? -8.0f : -127.0f, high = is_4_bits ? 7.0f : 127.0f;
  const Floats middle = splat(static_cast<float>(middle_code(shape.dtype)));
  codes += tile * shape.tile_code_bytes();
  scales += tile * shape.tile_scales();
  Floats bad = splat(0.0f);  // NaN where something is not finite
  for (int64_t lane = 0; lane < kTileRows; lane += Simd::kWidth) {
    for (int64_t c = 0, group = 0; c < inner; group++) {
      const int64_t end = c + shape.group < inner ? c + shape.group : inner;
      const float* x = scratch + c * kTileRows + lane;
      for (int64_t i = 0; i < end - c; i++) {
        bad = bad + (Floats)Simd::load(x + i * kTileRows) * splat(0.0f);
      }
      const Floats scale = is_4_bits ? scale_4(x, end - c) : scale_8(x, end - c);
      uint16_t* halves = scales + group * kTileRows + lane;
      Simd::store_f16(halves, (Simd::F)scale);
      const Floats stored_scale = (Floats)Simd::load_f16(halves);
      bad = bad + stored_scale * splat(0.0f);
      const Floats factor = divide(splat(1.0f), stored_scale);
      Words word = {};
      for (; c < end; c++) {
        const Floats v = (Floats)Simd::load(scratch + c * kTileRows + lane);
        const Floats q = round_within(v * factor, low, high) + middle;
        const Words code = (Words) __builtin_convertvector(q, Ints);
        word |= code << (8 * (c % 4) + (is_4_bits ? c / 4 % 2 * 4 : 0));
        if ((c + 1) % shape.line_inputs() == 0) {
          const int64_t line = c / shape.line_inputs();
          std::memcpy(codes + line * kLineBytes + lane * 4, &word, sizeof word);
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
