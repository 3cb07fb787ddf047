// Decode attention, AVX-512: the scores of sixteen rows and heads out of as many accumulators.
// Included by the files of the AVX-512 paths alone.
#pragma once

#include "backend/cpu/attention/decode_avx512_rows.h"

namespace mustafar {
namespace {

// Lane i of the result is the sum of v[i]'s lanes.
inline __m512 sums_of_16(__m512* v) {
  const __m512i lanes =
      _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  const __m512i neighbours =
      _mm512_setr_epi32(1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, v[i], v[i + 8]),
                         _mm512_shuffle_f32x4(v[i], v[i + 8], 0x4e));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, v[i], v[i + 4]),
                         _mm512_permutex2var_ps(v[i], lanes, v[i + 4]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    v[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, v[i], v[i + 2]),
                         _mm512_shuffle_ps(v[i], v[i + 2], 0x4e));
  }
  return _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, v[0], v[1]),
                       _mm512_permutex2var_ps(v[0], neighbours, v[1]));
}

// Sums of 16 / NH rows of NH heads, a head's side by side, to scores [NH][64].
template <int NH>
inline void store_sums(__m512 sums, float* scores) {
  if constexpr (NH == 1) {
    _mm512_store_ps(scores, sums);
  } else if constexpr (NH == 2) {
    _mm256_store_ps(scores, _mm512_castps512_ps256(sums));
    _mm256_store_ps(scores + kTileTokens, _mm512_extractf32x8_ps(sums, 1));
  } else {
    _mm_store_ps(scores, _mm512_castps512_ps128(sums));
    _mm_store_ps(scores + kTileTokens, _mm512_extractf32x4_ps(sums, 1));
    _mm_store_ps(scores + 2 * kTileTokens, _mm512_extractf32x4_ps(sums, 2));
    _mm_store_ps(scores + 3 * kTileTokens, _mm512_extractf32x4_ps(sums, 3));
  }
}

}  // namespace
}  // namespace mustafar
