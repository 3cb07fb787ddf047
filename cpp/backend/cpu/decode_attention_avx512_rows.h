// Decode attention, AVX-512: rows of a tile in storage, 32 dims at a time in registers. Included by
// the files of the AVX-512 paths alone; everything is internal to them.
//
// Sparse rows are expanded by vpexpandw/b merged into a zero that the compiler can't see: the
// zero-masking form has a false dependency on its destination on AMD processors.
#pragma once

#include <immintrin.h>

// GCC 12's own headers hand uninitialised vectors to builtins that ignore them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "backend/cpu/decode_attention_kernels.h"

namespace mustafar {
namespace {

enum class Source {
  kDense,  // every value is stored
  kRuns,   // the values of 32 dims start at a constant offset: groups of 16 or 32
  kChain,  // they start after as many values as the mask words before have bits
};

// How a tile's rows are computed with, and which partial softmax they go to. The order of a row's
// dims in the accumulated output differs between kinds (kOrder).
enum class Kind { kF32, kF16, kBF16, kInt };
constexpr int kKinds = 4;

// K or V rows of one tile.
struct Rows {
  Kind kind;
  Source source;
  const uint8_t* masks;    // [64][mask_bytes], null when dense
  const uint8_t* values;   // [64][row_bytes]; int4 has been widened to int8
  const uint16_t* scales;  // bf16 [64], kInt only
  int32_t mask_bytes;
  int32_t row_bytes;
  int32_t chunk_bytes;  // of the values of 32 dims (kRuns)
};

inline __m512i opaque_zero() {
  __m512i zero = _mm512_setzero_si512();
  asm volatile("" : "+v"(zero));
  return zero;
}

// Values of a row before its chunk (kChain).
inline int32_t values_before(const uint8_t* masks, int32_t chunk) {
  int32_t n = 0;
  for (int32_t w = 0; w < chunk; w++) {
    uint32_t word;
    __builtin_memcpy(&word, masks + 4 * w, 4);
    n += __builtin_popcount(word);
  }
  return n;
}

// Address of the values of 32 dims of a row, and their mask.
template <Source kSource, int kBytes>
inline const uint8_t* chunk_values(const Rows& rows, int32_t row, int32_t chunk) {
  const uint8_t* values = rows.values + int64_t{row} * rows.row_bytes;
  if constexpr (kSource == Source::kDense) return values + chunk * 32 * kBytes;
  if constexpr (kSource == Source::kRuns) return values + chunk * rows.chunk_bytes;
  return values + values_before(rows.masks + row * rows.mask_bytes, chunk) * kBytes;
}

inline __mmask32 chunk_mask(const Rows& rows, int32_t row, int32_t chunk) {
  return _load_mask32(reinterpret_cast<__mmask32*>(
      const_cast<uint8_t*>(rows.masks + row * rows.mask_bytes + chunk * 4)));
}

// 32 values of two bytes.
template <Source kSource>
inline __m512i load_words(const Rows& rows, int32_t row, int32_t chunk, __m512i zero) {
  const __m512i values = _mm512_loadu_si512(chunk_values<kSource, 2>(rows, row, chunk));
  if constexpr (kSource == Source::kDense) return values;
  return _mm512_mask_expand_epi16(zero, chunk_mask(rows, row, chunk), values);
}

// 64 values of one byte: chunks `chunk` (even) and the next.
template <Source kSource>
inline __m512i load_bytes(const Rows& rows, int32_t row, int32_t chunk, __m512i zero) {
  const __m512i values = _mm512_loadu_si512(chunk_values<kSource, 1>(rows, row, chunk));
  if constexpr (kSource == Source::kDense) return values;
  const __mmask64 mask = _load_mask64(reinterpret_cast<__mmask64*>(
      const_cast<uint8_t*>(rows.masks + row * rows.mask_bytes + chunk * 4)));
  return _mm512_mask_expand_epi8(zero, mask, values);
}

// Their halves as 16-bit integers.
inline __m512i low_half(__m512i bytes) {
  return _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes));
}
inline __m512i high_half(__m512i bytes) {
  return _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1));
}

struct Pair {
  __m512 a, b;
};

// 32 values as floats, in the kind's order.
template <Kind kKind, Source kSource>
inline Pair load_floats(const Rows& rows, int32_t row, int32_t chunk, __m512i zero) {
  if constexpr (kKind == Kind::kF32) {
    const uint8_t* values = chunk_values<kSource, 4>(rows, row, chunk);
    const __m512i a = _mm512_loadu_si512(values);
    if constexpr (kSource == Source::kDense) {
      return {_mm512_castsi512_ps(a), _mm512_loadu_ps(values + 64)};
    }
    uint32_t mask;
    __builtin_memcpy(&mask, rows.masks + row * rows.mask_bytes + chunk * 4, 4);
    const __m512i b = _mm512_loadu_si512(values + 4 * __builtin_popcount(mask & 0xffff));
    return {
        _mm512_castsi512_ps(_mm512_mask_expand_epi32(zero, static_cast<__mmask16>(mask), a)),
        _mm512_castsi512_ps(_mm512_mask_expand_epi32(zero, static_cast<__mmask16>(mask >> 16), b))};
  } else {
    const __m512i words = load_words<kSource>(rows, row, chunk, zero);
    if constexpr (kKind == Kind::kF16) {
      return {_mm512_cvtph_ps(_mm512_castsi512_si256(words)),
              _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1))};
    }
    // bf16 in the high half of a float is the float.
    return {_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, words)),
            _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, words))};
  }
}

// Dim of accumulated lane i of a chunk. bf16: what unpacklo and unpackhi of 16-bit words leave;
// ints: of bytes in 256 bits, widened.
inline int32_t dim_of_lane(Kind kind, int32_t i) {
  if (kind == Kind::kBF16) return (i % 16 / 4) * 8 + (i / 16) * 4 + i % 4;
  if (kind == Kind::kInt) return (i % 16 / 8) * 16 + (i / 16) * 8 + i % 8;
  return i;
}

// int4 codes, two to a byte, to int8. n_bytes: of codes, rounded up to 32 (reads and writes so).
inline void widen_int4(const uint8_t* codes, int32_t n_bytes, uint8_t* out) {
  const __m512i low = _mm512_set1_epi8(0x0f);
  const __m512i value =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
  for (int32_t i = 0; i < n_bytes; i += 32) {
    const __m512i bytes =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
    const __m512i nibbles =
        _mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4)), low);
    _mm512_storeu_si512(out + 2 * i, _mm512_shuffle_epi8(value, nibbles));
  }
}

// Lines of the next tile on their way while this one is worked on: a few at a time, since a core
// has few buffers for lines in flight, and loads wait for them too.
struct Prefetch {
  const uint8_t* at;
  int32_t left;   // lines
  int32_t lines;  // a step

  // Spreads what is left over a number of steps.
  void spread(int32_t steps) { lines = (left + steps - 1) / steps; }

  inline void step() {
    for (int32_t i = 0; i < lines && left > 0; i++, left--, at += 64) {
      const char* line = reinterpret_cast<const char*>(at);
      if (kToFirstLevel && near) {
        _mm_prefetch(line, _MM_HINT_T0);
      } else {
        _mm_prefetch(line, _MM_HINT_T1);
      }
    }
  }

  // Chosen on a Zen 4: the first-level cache, where two tiles fit there. On a Xeon, which takes the
  // path without BF16, that cost a tenth.
#if defined(__AVX512BF16__)
  static constexpr bool kToFirstLevel = true;
#else
  static constexpr bool kToFirstLevel = false;
#endif
  bool near = left <= 128;
};
constexpr Prefetch kNoPrefetch = {nullptr, 0, 0};

}  // namespace
}  // namespace mustafar
