// Decode attention, AVX-512: the online softmax over tiles. Included by the files of the AVX-512
// paths alone.
#pragma once

#include "backend/cpu/attention/decode_avx512_rows.h"

namespace mustafar {
namespace {

// 2^x; 0 below -150, NaN for NaN.
inline __m512 exp2_ps(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // the second operand where one is NaN
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(kExp2Terms[0]);
#pragma GCC unroll 6
  for (int i = 1; i < 7; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2Terms[i]));
  return _mm512_scalef_ps(p, n);
}

// 16 bf16 as floats.
inline __m512 load_bf16(const uint16_t* x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16));
}

// 127 * 256. Weights and queries as 16-bit integers reach up to this, so that two signed bytes,
// high * 256 + low, hold them too.
constexpr float kTopCode = 32512.0f;

// How weights are stored.
enum class Codes {
  kFloats,  // f32 [64], of float rows that kBf16 does not serve
  kBf16,    // bf16 [64]
  kBytes,   // of integer rows: int8 [64] of the high bytes and, at a distance, of the low ones:
            // high * 256 + low
};

// 16 codes in two signed bytes: high * 256 + low.
inline void store_bytes(__m512i codes, uint8_t* high, uint8_t* low) {
  const __m512i rounded = _mm512_add_epi32(codes, _mm512_set1_epi32(128));
  _mm_store_si128(reinterpret_cast<__m128i*>(high),
                  _mm512_cvtepi32_epi8(_mm512_srai_epi32(rounded, 8)));
  _mm_store_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(codes));
}

// Softmax of one head over a tile: scores [64] of the rows that are seen become weights, the
// state's maximum and sum are brought up to date. Returns the factor of the output so far. Of ints:
// scores are multiplied by q_unit, q_offset is added and the keys' scales come last; unit: of int
// weights; code_sum: of the tile's int weights; weight_sum: running, of weights times the values'
// scales.
template <Kind kKind, Codes kCodes>
float tile_softmax(const Rows& k, const Rows& v, uint64_t seen, float q_unit, const float* scores,
                   uint8_t* weights, float& running_max, float& running_sum, float& unit,
                   float q_offset, int32_t& code_sum, float& weight_sum, int64_t low_bytes = 0) {
  __m512 s[4];
  __m512 tile_max = _mm512_set1_ps(-__builtin_inff());
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __mmask16 valid = static_cast<__mmask16>(seen >> (16 * i));
    s[i] = _mm512_load_ps(scores + 16 * i);
    if constexpr (kKind == Kind::kInt) {
      s[i] = _mm512_fmadd_ps(s[i], _mm512_set1_ps(q_unit), _mm512_set1_ps(q_offset));
      s[i] = _mm512_mul_ps(s[i], load_bf16(k.scales + 16 * i));
    }
    s[i] = _mm512_mask_blend_ps(valid, _mm512_set1_ps(-__builtin_inff()), s[i]);
    tile_max = _mm512_max_ps(tile_max, s[i]);
  }
  const float tile = _mm512_reduce_max_ps(tile_max);
  const float max = tile > running_max ? tile : running_max;
  const float shift = max == -__builtin_inff() ? 0.0f : max;
  const float rescale =
      running_max == max ? 1.0f : _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(running_max - shift)));
  running_max = max;

  __m512 sum = _mm512_setzero_ps();
  __m512 largest = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    s[i] = exp2_ps(_mm512_sub_ps(s[i], _mm512_set1_ps(shift)));
    if constexpr (kKind == Kind::kInt) {
      sum = _mm512_add_ps(sum, s[i]);
      s[i] = _mm512_mul_ps(s[i], load_bf16(v.scales + 16 * i));
      largest = _mm512_max_ps(largest, s[i]);
#if defined(__AVX512BF16__)
    } else if constexpr (kCodes == Codes::kBf16) {
      // The rounded weights are what values are multiplied by, so these are added up.
      const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(s[i]));
      _mm256_store_si256(reinterpret_cast<__m256i*>(weights + 32 * i), bits);
      sum = _mm512_add_ps(sum,
                          _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
#endif
    } else {
      sum = _mm512_add_ps(sum, s[i]);
      _mm512_store_ps(weights + 64 * i, s[i]);
    }
  }
  running_sum = running_sum * rescale + _mm512_reduce_add_ps(sum);
  if constexpr (kKind == Kind::kInt) {
    const float top = _mm512_reduce_max_ps(largest);
    unit = top / kTopCode;
    const __m512 inverse = _mm512_set1_ps(top > 0 ? kTopCode / top : 0.0f);
    __m512i code_sums = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(s[i], inverse));
      store_bytes(codes, weights + 16 * i, weights + low_bytes + 16 * i);
      code_sums = _mm512_add_epi32(code_sums, codes);
    }
    code_sum = _mm512_reduce_add_epi32(code_sums);
    weight_sum = weight_sum * rescale + unit * static_cast<float>(code_sum);
  }
  return rescale;
}

// What a tile's integer weights are, for NH heads.
template <int NH>
struct IntWeights {
  float rescale[NH];     // of the output so far
  float unit[NH];        // of the weights
  int32_t code_sum[NH];  // of the weights
};

// Softmax of NH heads over a tile: what tile_softmax is of one. scores: [NH][64]; weights: out
// [kTerms][NH][64] bytes without sign; the others are of the heads. Interleaved, as one head's is a
// chain of long latencies.
template <int NH, int kTerms>
__attribute__((noinline)) void int_softmax(const Rows& k, const Rows& v, uint64_t seen,
                                           const float* q_unit, const float* q_offset,
                                           const float* scores, uint8_t* weights, float* max,
                                           float* sum, float* weight_sum, IntWeights<NH>& out) {
  __m512 s[NH][4], shift[NH];
  const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
#pragma GCC unroll 4
  for (int h = 0; h < NH; h++) {
    __m512 tile_max = nothing;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512 x = _mm512_fmadd_ps(_mm512_load_ps(scores + h * kTileTokens + 16 * i),
                                       _mm512_set1_ps(q_unit[h]), _mm512_set1_ps(q_offset[h]));
      s[h][i] = _mm512_mask_mul_ps(nothing, static_cast<__mmask16>(seen >> (16 * i)), x,
                                   load_bf16(k.scales + 16 * i));
      tile_max = _mm512_max_ps(tile_max, s[h][i]);
    }
    shift[h] = tile_max;
  }
#pragma GCC unroll 4
  for (int h = 0; h < NH; h++) {
    const float tile = _mm512_reduce_max_ps(shift[h]);
    const float top = tile > max[h] ? tile : max[h];
    const float from = top == -__builtin_inff() ? 0.0f : top;
    out.rescale[h] =
        max[h] == top ? 1.0f : _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(max[h] - from)));
    max[h] = top;
    shift[h] = _mm512_set1_ps(from);
  }
#pragma GCC unroll 4
  for (int h = 0; h < NH; h++) {
    __m512 total = _mm512_setzero_ps(), largest = total;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      s[h][i] = exp2_ps(_mm512_sub_ps(s[h][i], shift[h]));
      total = _mm512_add_ps(total, s[h][i]);
      s[h][i] = _mm512_mul_ps(s[h][i], load_bf16(v.scales + 16 * i));
      largest = _mm512_max_ps(largest, s[h][i]);
    }
    sum[h] = sum[h] * out.rescale[h] + _mm512_reduce_add_ps(total);
    shift[h] = largest;
  }
  constexpr float kTop = kTerms == 1 ? 255.0f : 65535.0f;
#pragma GCC unroll 4
  for (int h = 0; h < NH; h++) {
    const float top = _mm512_reduce_max_ps(shift[h]);
    out.unit[h] = top / kTop;
    const __m512 inverse = _mm512_set1_ps(top > 0 ? kTop / top : 0.0f);
    __m512i code_sums = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      uint8_t* at = weights + h * kTileTokens + 16 * i;
      __m512i codes;
      if constexpr (kTerms == 1) {
        codes = _mm512_cvttps_epi32(
            _mm512_fmadd_ps(s[h][i], inverse, _mm512_load_ps(kDither.at + 16 * i)));
      } else {
        codes = _mm512_cvtps_epi32(_mm512_mul_ps(s[h][i], inverse));
        _mm_store_si128(reinterpret_cast<__m128i*>(at + NH * kTileTokens),
                        _mm512_cvtepi32_epi8(codes));
      }
      _mm_store_si128(reinterpret_cast<__m128i*>(at),
                      _mm512_cvtepi32_epi8(_mm512_srli_epi32(codes, kTerms == 1 ? 0 : 8)));
      code_sums = _mm512_add_epi32(code_sums, codes);
    }
    out.code_sum[h] = _mm512_reduce_add_epi32(code_sums);
    weight_sum[h] =
        weight_sum[h] * out.rescale[h] + out.unit[h] * static_cast<float>(out.code_sum[h]);
  }
}

}  // namespace
}  // namespace mustafar
