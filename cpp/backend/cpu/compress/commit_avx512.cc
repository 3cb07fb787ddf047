// Pruning and packing for AVX-512 (VBMI2): 32 dims of a row in a register.
//
// Selection: |x| of a 16-bit float orders as its bits do, so the keep-th largest of a group is
// found bit by bit, from the top, by counting how many are at least as large; ties at the cut keep
// the lowest indices. The kept values are then compressed in registers and, for integers,
// quantised.
#include <immintrin.h>

#include "backend/cpu/compress/commit_kernels.h"

// GCC 12's own headers hand uninitialised vectors to builtins that ignore them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace mustafar {
namespace {

constexpr int32_t kMaxChunks = kMaxPackedDims / 32;

// Magnitudes as integers, every NaN just above infinity.
inline __m512i magnitude_keys(__m512i x, uint16_t infinity) {
  const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
  return _mm512_min_epu16(magnitude, _mm512_set1_epi16(static_cast<int16_t>(infinity + 1)));
}

// Mask of the `keep` largest of the lanes in `lanes`, a run of consecutive ones.
inline uint32_t largest(__m512i keys, uint32_t lanes, uint32_t keep) {
  uint32_t cut = 0;  // the keep-th largest key, bit by bit
  for (uint32_t bit = 0x4000; bit != 0; bit >>= 1) {
    const __m512i candidate = _mm512_set1_epi16(static_cast<int16_t>(cut | bit));
    const uint32_t above = _mm512_cmpge_epu16_mask(keys, candidate) & lanes;
    if (static_cast<uint32_t>(__builtin_popcount(above)) >= keep) cut |= bit;
  }
  const __m512i at = _mm512_set1_epi16(static_cast<int16_t>(cut));
  const uint32_t above = _mm512_cmpgt_epu16_mask(keys, at) & lanes;
  const uint32_t equal = _mm512_cmpeq_epu16_mask(keys, at) & lanes;
  const uint32_t ties = keep - static_cast<uint32_t>(__builtin_popcount(above));
  return above | _pdep_u32((ties < 32 ? uint32_t{1} << ties : 0) - 1, equal);
}

inline uint32_t select(__m512i keys, const SlotLayout& layout) {
  const uint32_t keep = static_cast<uint32_t>(layout.keep);
  if (layout.group == 32) return largest(keys, 0xffffffffu, keep);
  return largest(keys, 0xffffu, keep) | largest(keys, 0xffff0000u, keep);
}

inline void to_floats(__m512i x, DType tail, __m512& a, __m512& b) {
  if (tail == DType::kF16) {
    a = _mm512_cvtph_ps(_mm512_castsi512_si256(x));
    b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
    return;
  }
  a = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16));
  b = _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16));
}

// round-half-even(x / scale), clamped, as bytes.
inline __m128i codes_of(__m512 x, float scale, float limit) {
  const __m512 quotient = _mm512_div_ps(x, _mm512_set1_ps(scale));
  const __m512 clamped =
      _mm512_max_ps(_mm512_min_ps(quotient, _mm512_set1_ps(limit)), _mm512_set1_ps(-limit));
  return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(clamped));
}

// Quantises the kept values of a row. Returns false where x is not finite.
bool quantise_row(const SlotLayout& layout, DType tail, const __m512i* x, const __m512i* keys,
                  const uint32_t* mask, uint16_t infinity, uint8_t* values, uint8_t* scale_out) {
  const int32_t n_chunks = layout.head_dim / 32;
  __m512i top = _mm512_setzero_si512();
  for (int32_t c = 0; c < n_chunks; c++) {
    if (_mm512_cmpge_epu16_mask(keys[c], _mm512_set1_epi16(static_cast<int16_t>(infinity)))) {
      return false;
    }
    top = _mm512_max_epu16(top, _mm512_maskz_mov_epi16(mask[c], keys[c]));
  }
  alignas(64) uint16_t tops[32];
  _mm512_store_si512(tops, top);
  uint16_t absmax_bits = 0;
  for (const uint16_t bits : tops) absmax_bits = bits > absmax_bits ? bits : absmax_bits;
  const float absmax = tail == DType::kF16 ? f16_to_f32(absmax_bits) : bf16_to_f32(absmax_bits);

  const float limit = layout.dtype == DType::kInt8 ? 127.0f : 7.0f;
  const uint32_t exact = bits_of(absmax / limit);
  const uint16_t scale_bits =
      static_cast<uint16_t>((exact >> 16) + ((exact & 0xffffu) != 0 ? 1 : 0));
  __builtin_memcpy(scale_out, &scale_bits, 2);
  const float scale = bf16_to_f32(scale_bits);
  if (scale == 0.0f) return true;  // the values are zero already

  alignas(64) uint8_t codes[kMaxChunks * 32 + 64];
  int32_t n = 0;
  for (int32_t c = 0; c < n_chunks; c++) {
    const __m512i kept = _mm512_maskz_compress_epi16(mask[c], x[c]);
    __m512 a, b;
    to_floats(kept, tail, a, b);
    const __m128i low = codes_of(a, scale, limit), high = codes_of(b, scale, limit);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + n), low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + n + 16), high);
    n += __builtin_popcount(mask[c]);
  }
  if (layout.dtype == DType::kInt8) {
    __builtin_memcpy(values, codes, n);
    return true;
  }
  if (n % 2 != 0) codes[n] = 0;
  for (int32_t i = 0; i < n; i += 2) {
    values[i / 2] = static_cast<uint8_t>((codes[i] & 0xf) | codes[i + 1] << 4);
  }
  return true;
}

}  // namespace

int32_t pack_rows_avx512(const SlotLayout& layout, DType tail, const uint8_t* const* rows,
                         uint8_t* slot) {
  const int32_t n_chunks = layout.head_dim / 32;
  const uint16_t infinity = tail == DType::kF16 ? 0x7c00 : 0x7f80;
  __builtin_memset(slot, 0, layout.slot_bytes);
  for (int32_t t = 0; t < kBlockTokens; t++) {
    __m512i x[kMaxChunks], keys[kMaxChunks];
    uint32_t mask[kMaxChunks];
    for (int32_t c = 0; c < n_chunks; c++) {
      x[c] = _mm512_loadu_si512(rows[t] + c * 64);
      keys[c] = magnitude_keys(x[c], infinity);
      mask[c] = layout.dense ? 0xffffffffu : select(keys[c], layout);
    }
    uint8_t* values = slot + layout.values_offset + t * layout.row_bytes;
    if (!layout.dense) __builtin_memcpy(slot + t * n_chunks * 4, mask, n_chunks * 4);
    if (has_scales(layout.dtype)) {
      if (!quantise_row(layout, tail, x, keys, mask, infinity, values,
                        slot + layout.scales_offset + 2 * t)) {
        return t;
      }
      continue;
    }
    for (int32_t c = 0; c < n_chunks; c++) {
      const int32_t n = __builtin_popcount(mask[c]);
      const __mmask32 lanes = n < 32 ? (uint32_t{1} << n) - 1 : 0xffffffffu;
      _mm512_mask_storeu_epi16(values, lanes, _mm512_maskz_compress_epi16(mask[c], x[c]));
      values += n * 2;
    }
  }
  return -1;
}

}  // namespace mustafar
