// The scales and offsets of a tile of a quantised matrix, lanes are its sixteen rows. Included by
// the AVX-512 and AMX files that multiply codes.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "backend/cpu/kernels.h"

namespace mustafar {
namespace {

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

}  // namespace
}  // namespace mustafar
