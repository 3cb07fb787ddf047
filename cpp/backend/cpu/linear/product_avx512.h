// What products have in common whose lanes are sixteen rows of a matrix. Included by AVX-512 and
// AMX files.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "backend/cpu/kernels.h"

namespace mustafar {
namespace {

// Adds or stores the sums of rows [row, row + 16), those before args.row1, of activation row b.
inline void store_lanes(const ProductArgs& args, int64_t row, int32_t b, __m512 sum) {
  const int64_t left = args.row1 - row;
  const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
  if (args.bias != nullptr) {
    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, args.bias + row));
  }
  float* y = args.y + b * args.y_stride + (row - args.row0);
  if (args.add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), sum);
  _mm512_mask_storeu_ps(y, mask, sum);
}

// Scales of a tile of a quantised matrix.
inline __m512 load_floats(const Matrix& w, const void* values, int64_t at) {
  const uint16_t* halves = static_cast<const uint16_t*>(values) + at;
  switch (w.scale_dtype) {
    case DType::kF32:
      return _mm512_loadu_ps(static_cast<const float*>(values) + at);
    case DType::kF16:
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
    default: {
      const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }
  }
}

// The zeros of a tile's rows or, with kMinimums, their minimums.
template <Offset kOffset>
inline __m512 load_offsets(const Matrix& w, int64_t at) {
  if constexpr (kOffset == Offset::kMinimums) return load_floats(w, w.offsets, at);
  if constexpr (kOffset == Offset::kNone) {
    return _mm512_set1_ps(static_cast<float>(middle_code(w.dtype)));
  }
  const uint8_t* zeros = static_cast<const uint8_t*>(w.offsets) + at;
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

// sum and what a group adds to it, as QuantisedGemvArgs says.
template <Offset kOffset>
inline __m512 add_group(__m512 part, __m512 scales, __m512 offsets, float input_sum, __m512 sum) {
  const __m512 inputs = _mm512_set1_ps(input_sum);
  if constexpr (kOffset == Offset::kMinimums) {
    return _mm512_fmadd_ps(offsets, inputs, _mm512_fmadd_ps(part, scales, sum));
  }
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(offsets, inputs, part), scales, sum);
}

}  // namespace
}  // namespace mustafar
