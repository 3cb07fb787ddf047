// Decode attention, AVX2: the online softmax over tiles. Included by the AVX2 path alone.
#pragma once

#include "backend/cpu/attention/decode_avx2_rows.h"

namespace mustafar {
namespace {

inline float sum_of(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float max_of(__m256 x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// 2^x; 0 below -126, NaN for NaN.
inline __m256 exp2_ps(__m256 x) {
  const __m256 floor_at = _mm256_set1_ps(-126.0f);
  const __m256 tiny = _mm256_cmp_ps(x, floor_at, _CMP_LT_OQ);
  x = _mm256_max_ps(floor_at, x);  // the second operand where one is NaN
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(x, n);
  __m256 p = _mm256_set1_ps(kExp2Terms[0]);
#pragma GCC unroll 6
  for (int i = 1; i < 7; i++) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2Terms[i]));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
  return _mm256_andnot_ps(tiny, p);
}

constexpr float kTopCode = 32767.0f;  // the largest 16-bit code of queries and weights

// How a tile's weights are stored, 64 of a head.
enum class Weights {
  kFloats,  // of float rows
  kWords,   // of integer rows: int16
  kBytes,   // the same: without sign, rounded down after kDither
};
constexpr int32_t weight_bytes(Weights weights) {
  return weights == Weights::kFloats ? 4 : weights == Weights::kWords ? 2 : 1;
}

// Eight codes from 0 to 255 of each of four, in order.
inline __m256i pack_bytes(const __m256i* codes) {
  const __m256i words = _mm256_packus_epi16(_mm256_packs_epi32(codes[0], codes[1]),
                                            _mm256_packs_epi32(codes[2], codes[3]));
  return _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Softmax of one head over a tile: scores [64] of the rows that are seen become weights. Returns
// the factor of the output so far. Of ints: scores are multiplied by q_unit, q_offset is added and
// the keys' scales come last; unit: of int weights; weight_sum: running, of weights times the
// values' scales.
template <Weights kWeights>
float tile_softmax(const Rows& k, const Rows& v, uint64_t seen, float q_unit, const float* scores,
                   uint8_t* weights, float& running_max, float& running_sum, float& unit,
                   float q_offset, float& weight_sum) {
  constexpr bool kInts = kWeights != Weights::kFloats;
  const __m256 minus_infinity = _mm256_set1_ps(-__builtin_inff());
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256 s[8];
  __m256 top = minus_infinity;
  for (int i = 0; i < 8; i++) {
    s[i] = _mm256_load_ps(scores + 8 * i);
    if constexpr (kInts) {
      s[i] = _mm256_fmadd_ps(s[i], _mm256_set1_ps(q_unit), _mm256_set1_ps(q_offset));
      s[i] = _mm256_mul_ps(s[i], load_bf16(k.scales + 8 * i));
    }
    const __m256i bits = _mm256_set1_epi32(static_cast<int32_t>(seen >> (8 * i) & 0xff));
    const __m256i valid = _mm256_cmpeq_epi32(_mm256_and_si256(bits, lane_bit), lane_bit);
    s[i] = _mm256_blendv_ps(minus_infinity, s[i], _mm256_castsi256_ps(valid));
    top = _mm256_max_ps(top, s[i]);
  }
  const float tile = max_of(top);
  const float max = tile > running_max ? tile : running_max;
  const float shift = max == -__builtin_inff() ? 0.0f : max;
  const float rescale =
      running_max == max ? 1.0f : _mm256_cvtss_f32(exp2_ps(_mm256_set1_ps(running_max - shift)));
  running_max = max;

  __m256 sum = _mm256_setzero_ps(), largest = sum, scaled = sum;
  for (int i = 0; i < 8; i++) {
    s[i] = exp2_ps(_mm256_sub_ps(s[i], _mm256_set1_ps(shift)));
    sum = _mm256_add_ps(sum, s[i]);
    if constexpr (kInts) {
      s[i] = _mm256_mul_ps(s[i], load_bf16(v.scales + 8 * i));
      largest = _mm256_max_ps(largest, s[i]);
      scaled = _mm256_add_ps(scaled, s[i]);
    } else {
      _mm256_store_ps(reinterpret_cast<float*>(weights) + 8 * i, s[i]);
    }
  }
  running_sum = running_sum * rescale + sum_of(sum);
  if constexpr (kInts) {
    const float largest_weight = max_of(largest);
    constexpr float kTop = kWeights == Weights::kBytes ? 255.0f : kTopCode;
    unit = largest_weight / kTop;
    const __m256 inverse = _mm256_set1_ps(largest_weight > 0 ? kTop / largest_weight : 0.0f);
    if constexpr (kWeights == Weights::kBytes) {
      __m256i code_sums = _mm256_setzero_si256();
      for (int i = 0; i < 8; i += 4) {
        __m256i codes[4];
        for (int j = 0; j < 4; j++) {
          codes[j] = _mm256_cvttps_epi32(
              _mm256_fmadd_ps(s[i + j], inverse, _mm256_load_ps(kDither.at + 8 * (i + j))));
          code_sums = _mm256_add_epi32(code_sums, codes[j]);
        }
        _mm256_store_si256(reinterpret_cast<__m256i*>(weights + 8 * i), pack_bytes(codes));
      }
      weight_sum = weight_sum * rescale + unit * sum_of(_mm256_cvtepi32_ps(code_sums));
    } else {
      weight_sum = weight_sum * rescale + sum_of(scaled);
      for (int i = 0; i < 8; i += 2) {
        const __m256i codes =
            _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(s[i], inverse)),
                               _mm256_cvtps_epi32(_mm256_mul_ps(s[i + 1], inverse)));
        _mm256_store_si256(reinterpret_cast<__m256i*>(weights + 16 * i),
                           _mm256_permute4x64_epi64(codes, 0xd8));
      }
    }
  }
  return rescale;
}

}  // namespace
}  // namespace mustafar
