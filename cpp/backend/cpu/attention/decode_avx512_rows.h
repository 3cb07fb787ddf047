// Decode attention, AVX-512: rows of a tile in storage, 32 dims at a time in registers. Included by
// the files of the AVX-512 paths alone; everything is internal to them.
//
// Sparse rows are expanded by vpexpandw/b merged into a zero that the compiler can't see: the
// zero-masking form has a false dependency on its destination on AMD processors.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <utility>

// GCC 12's own headers hand uninitialised vectors to builtins that ignore them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "backend/cpu/attention/coded_avx512.h"
#include "backend/cpu/attention/decode_common.h"

namespace mustafar {
namespace {

enum class Source {
  kDense,    // every value is stored
  kRuns,     // the values of 32 dims start at a constant offset: groups of 16 or 32
  kRuns16,   // the same, and what is expanded at once fits 16 bytes, or 32: loads as narrow as that
  kRuns32,   // seldom lie across two lines of cache
  kChain,    // they start after as many values as the mask words before have bits
  kNibbles,  // int4, every value is stored
  kNibbles2,  // the same, where there are 128 dims at a time
  kCodes,     // coded rows
};

// A kind of rows has a partial softmax of its own here: the order of a row's dims in the
// accumulated output differs between kinds (dim_of_lane).

// Where there is AMX, AVX512_BF16's dot product is four times slower than an FMA.
#if defined(__AVX512BF16__) && !defined(__AMX_TILE__)
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

// Whether a step takes two tokens with weights of 16 bits.
constexpr bool takes_pairs(Kind kind) { return kind == Kind::kBF16 && kHasBf16; }

// Prepared queries: bytes for 32 dims of one head.
constexpr int32_t query_bytes(Kind kind) { return kind == Kind::kInt ? 64 : 128; }

// K or V rows of one tile.
struct Rows {
  Kind kind;
  Source source;
  const uint8_t* masks;    // [64][mask_bytes], null when dense
  const uint8_t* values;   // [64][row_bytes]; int4 has been widened to int8, if it is sparse
  const uint16_t* scales;  // bf16 [64], kInt only
  int32_t mask_bytes;
  int32_t row_bytes;
  int32_t chunk_bytes;      // of the values of 32 dims (kRuns)
  const CodeChunk* chunks;  // [head_dim / 64], kCodes only
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
  if constexpr (kSource != Source::kChain) return values + chunk * rows.chunk_bytes;
  return values + values_before(rows.masks + row * rows.mask_bytes, chunk) * kBytes;
}

inline __mmask32 chunk_mask(const Rows& rows, int32_t row, int32_t chunk) {
  return _load_mask32(reinterpret_cast<__mmask32*>(
      const_cast<uint8_t*>(rows.masks + row * rows.mask_bytes + chunk * 4)));
}

// As many bytes as an expansion may want; what is above is undefined.
template <Source kSource>
inline __m512i load_values(const uint8_t* values) {
  if constexpr (kSource == Source::kRuns16) {
    return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }
  if constexpr (kSource == Source::kRuns32) {
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  }
  return _mm512_loadu_si512(values);
}

// 32 values of two bytes.
template <Source kSource>
inline __m512i load_words(const Rows& rows, int32_t row, int32_t chunk, __m512i zero) {
  const __m512i values = load_values<kSource>(chunk_values<kSource, 2>(rows, row, chunk));
  if constexpr (kSource == Source::kDense) return values;
  return _mm512_mask_expand_epi16(zero, chunk_mask(rows, row, chunk), values);
}

// 64 values of one byte: chunks `chunk` (even) and the next.
template <Source kSource>
inline __m512i load_bytes(const Rows& rows, int32_t row, int32_t chunk, __m512i zero) {
  const __m512i values = load_values<kSource>(chunk_values<kSource, 1>(rows, row, chunk));
  if constexpr (kSource == Source::kDense) return values;
  const __mmask64 mask = _load_mask64(reinterpret_cast<__mmask64*>(
      const_cast<uint8_t*>(rows.masks + row * rows.mask_bytes + chunk * 4)));
  return _mm512_mask_expand_epi8(zero, mask, values);
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
    // bf16 in the high half of a float is the float: even dims, then odd ones.
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)))};
  }
}

// Dim of accumulated lane i of a chunk of floats. bf16: even dims before odd ones, in pairs of
// tokens what unpacklo and unpackhi of 16-bit words leave.
inline int32_t dim_of_lane(Kind kind, int32_t i) {
  if (kind == Kind::kBF16 && kHasBf16) return (i % 16 / 4) * 8 + (i / 16) * 4 + i % 4;
  if (kind == Kind::kBF16) return i % 16 * 2 + i / 16;
  return i;
}

// A row of such lanes in the order of its dims. out: aligned to 64.
inline void permute_chunks(Kind kind, const float* lanes, int32_t head_dim, float* out) {
  alignas(64) int32_t lane_of_dim[32];
  for (int32_t i = 0; i < 32; i++) lane_of_dim[dim_of_lane(kind, i)] = i;
  const __m512i first = _mm512_load_si512(lane_of_dim);
  const __m512i second = _mm512_load_si512(lane_of_dim + 16);
  for (int32_t d = 0; d < head_dim; d += 32) {
    const __m512 a = _mm512_load_ps(lanes + d), b = _mm512_load_ps(lanes + d + 16);
    _mm512_store_ps(out + d, _mm512_permutex2var_ps(a, first, b));
    _mm512_store_ps(out + d + 16, _mm512_permutex2var_ps(a, second, b));
  }
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

// Lines of the next slots on their way while these are worked on: a few at a time and evenly, since
// a core has few buffers for lines in flight, and loads wait for them too; from keys and values in
// turns, so that the processor's own prefetching is ahead in both.
class Prefetch {
 public:
  Prefetch(const uint8_t* k, int32_t k_lines, const uint8_t* v, int32_t v_lines)
      : at_(k),
        left_(k_lines),
        other_at_(v),
        other_left_(v_lines),
        near_(k_lines + v_lines <= 256) {}

  // Spreads what is left over a number of steps, as evenly as whole lines go.
  void spread(int32_t steps) { lines_ = std::max(1, (left_ + other_left_ + steps / 2) / steps); }

  // No nearer than the second-level cache.
  void keep_off_first_level() { near_ = false; }

  inline void step() {
    for (int32_t i = 0; i < lines_; i++) line();
  }

  void rest() {
    while (left_ > 0) line();
  }

 private:
  inline void line() {
    if (left_ == 0) return;
    const char* p = reinterpret_cast<const char*>(at_);
    if (kToFirstLevel && near_) {
      _mm_prefetch(p, _MM_HINT_T0);
    } else {
      _mm_prefetch(p, _MM_HINT_T1);
    }
    at_ += 64;
    left_--;
    if (other_left_ > 0) {
      std::swap(at_, other_at_);
      std::swap(left_, other_left_);
    }
  }

  // As measured: a Zen 4, which takes the path with BF16, is fastest with fetches to the
  // first-level cache; a Xeon, which does not take it, was a tenth slower with them. Integer rows
  // leave that cache to what they compute with: a tenth faster on the Zen 4.
  static constexpr bool kToFirstLevel = kHasBf16;

  const uint8_t* at_;
  int32_t left_;  // lines
  const uint8_t* other_at_;
  int32_t other_left_;
  int32_t lines_ = 0;  // a step
  bool near_;          // they fit the first-level cache beside those that are worked on
};
const Prefetch kNoPrefetch(nullptr, 0, nullptr, 0);

}  // namespace
}  // namespace mustafar
