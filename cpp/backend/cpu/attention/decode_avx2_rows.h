// Decode attention, AVX2: rows of a tile as dense rows of their own type, and eight or sixteen of
// their values in registers. Included by the AVX2 path alone; everything is internal to it.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "backend/cpu/attention/decode_common.h"
#include "backend/cpu/attention/expand_table.h"

namespace mustafar {
namespace {

// Dense rows of a tile.
struct Rows {
  Kind kind;
  const uint8_t* values;   // [64][row_bytes]
  const uint16_t* scales;  // bf16 [64], kInt only
  int64_t row_bytes;
};

// Bytes of the next slots on their way while a tile is worked on: evenly, since a core has few
// buffers for lines in flight, and loads wait for them too. A step has no branch, as it is taken in
// the innermost loops; a line may be asked for several times.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const uint8_t* at, int64_t bytes) : at_(at), bytes_(bytes) {}

  // Spreads the bytes over a number of steps, a line in each at most.
  void spread(int32_t steps) { stride_ = std::min<int64_t>((bytes_ + steps - 1) / steps, 64); }

  inline void step() {
    _mm_prefetch(reinterpret_cast<const char*>(at_), _MM_HINT_T0);
    at_ += stride_;
  }

 private:
  const uint8_t* at_ = nullptr;  // fetching what is nowhere does nothing
  int64_t bytes_ = 0, stride_ = 0;
};

// Expands 64 rows of bytes to dense rows, sixteen dims at a time.
void expand_bytes(const uint8_t* masks, const uint8_t* values, int32_t row_bytes, int32_t head_dim,
                  uint8_t* out) {
  const int32_t mask_bytes = head_dim / 8;
  for (int32_t t = 0; t < kTileTokens; t++) {
    const uint8_t* x = values + int64_t{t} * row_bytes;
    for (int32_t i = 0; i < mask_bytes; i += 2, masks += 2, out += 16) {
      const __m128i upper = _mm_castpd_si128(_mm_loadh_pd(
          _mm_setzero_pd(), reinterpret_cast<const double*>(kExpandTable.bytes[masks[1]])));
      const __m128i ranks = _mm_add_epi8(
          upper, _mm_load_si128(reinterpret_cast<const __m128i*>(kExpandTable.pairs[masks[0]])));
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(out),
          _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), ranks));
      uint16_t mask;
      __builtin_memcpy(&mask, masks, 2);
      x += __builtin_popcount(mask);
    }
  }
}

// Expands 64 rows of values of kBytes each to dense rows.
template <int kBytes>
void expand(const uint8_t* masks, const uint8_t* values, int32_t row_bytes, int32_t head_dim,
            uint8_t* out) {
  const int32_t mask_bytes = head_dim / 8;
  for (int32_t t = 0; t < kTileTokens; t++) {
    const uint8_t* x = values + int64_t{t} * row_bytes;
    for (int32_t i = 0; i < mask_bytes; i++) {
      const uint32_t mask = masks[t * mask_bytes + i];
      if constexpr (kBytes == 4) {
        const __m256i ranks = _mm256_cvtepi8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandTable.bytes[mask])));
        const __m256i v = _mm256_permutevar8x32_epi32(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), ranks);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                            _mm256_andnot_si256(_mm256_srai_epi32(ranks, 31), v));
      } else {
        const __m128i v = _mm_shuffle_epi8(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)),
            _mm_load_si128(reinterpret_cast<const __m128i*>(kExpandTable.words[mask])));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), v);
      }
      x += __builtin_popcount(mask) * kBytes;
      out += 8 * kBytes;
    }
  }
}

// int4 codes, two to a byte, to int8. n_bytes is rounded up to 16.
void widen_int4(const uint8_t* codes, int32_t n_bytes, uint8_t* out) {
  const __m256i low = _mm256_set1_epi8(0x0f);
  const __m256i value = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
  for (int32_t i = 0; i < n_bytes; i += 16) {
    const __m256i bytes =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    const __m256i nibbles =
        _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * i),
                        _mm256_shuffle_epi8(value, nibbles));
  }
}

// Where the codes of 32 dims are in a row: of each half the bytes from `start` on that hold a dim's
// code, two to a word, and what moves it to the word's beginning if the upper half of the product
// is taken.
struct CodeChunk {
  alignas(32) uint8_t bytes[2][32];
  alignas(32) uint16_t factors[2][16];
  alignas(32) uint16_t masks[2][16];  // of a code's bits
  alignas(32) int8_t halves[32];      // of its levels
  int32_t start[2];
};

// widths: [head_dim]; out: [head_dim / 32].
inline void make_chunks(const uint8_t* widths, int32_t head_dim, CodeChunk* out) {
  int32_t bit = 0;
  for (int32_t d = 0; d < head_dim; d++) {
    CodeChunk& chunk = out[d / 32];
    const int32_t part = d / 16 % 2, i = d % 16, width = widths[d];
    if (i == 0) chunk.start[part] = bit / 8;
    // A word's second byte where the code begins with the byte, as no factor moves by nothing.
    const int32_t byte = bit / 8 - chunk.start[part], shift = bit % 8 == 0 ? 8 : bit % 8;
    chunk.bytes[part][2 * i] = static_cast<uint8_t>(shift == 8 ? 0x80 : byte);
    chunk.bytes[part][2 * i + 1] = static_cast<uint8_t>(shift == 8 ? byte : byte + 1);
    chunk.factors[part][i] = static_cast<uint16_t>(1 << (16 - shift));
    chunk.masks[part][i] = static_cast<uint16_t>((1 << width) - 1);
    chunk.halves[d % 32] = static_cast<int8_t>((1 << width) / 2);
    bit += width;
  }
}

// 64 coded rows to bytes: the codes or, if kSigned, these less their halves. Reads up to 16 bytes
// past the last row.
template <bool kSigned>
void widen_codes(const CodeChunk* chunks, const uint8_t* values, int32_t row_bytes,
                 int32_t head_dim, uint8_t* out) {
  for (int32_t d = 0; d < head_dim; d += 32) {
    const CodeChunk& chunk = chunks[d / 32];
    __m256i bytes[2], factors[2], masks[2];
    const uint8_t* from[2];
    for (int i = 0; i < 2; i++) {
      bytes[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(chunk.bytes[i]));
      factors[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(chunk.factors[i]));
      masks[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(chunk.masks[i]));
      from[i] = values + chunk.start[i];
    }
    const __m256i halves = _mm256_load_si256(reinterpret_cast<const __m256i*>(chunk.halves));
    uint8_t* to = out + d;
#pragma GCC unroll 2
    for (int32_t t = 0; t < kTileTokens; t++, to += head_dim) {
      __m256i codes[2];
      for (int i = 0; i < 2; i++) {
        const __m256i row =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i])));
        codes[i] = _mm256_mulhi_epu16(_mm256_shuffle_epi8(row, bytes[i]), factors[i]);
        codes[i] = _mm256_and_si256(codes[i], masks[i]);
        from[i] += row_bytes;
      }
      __m256i all = _mm256_permute4x64_epi64(_mm256_packus_epi16(codes[0], codes[1]), 0xd8);
      if (kSigned) all = _mm256_sub_epi8(all, halves);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), all);
    }
  }
}

inline __m256 load_bf16(const void* x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(x))), 16));
}

// Eight values of a row.
template <Kind kKind>
inline __m256 load_floats(const uint8_t* row, int32_t dim) {
  if constexpr (kKind == Kind::kF32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(row) + dim);
  } else if constexpr (kKind == Kind::kF16) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * dim)));
  } else {
    return load_bf16(row + 2 * dim);
  }
}

// Sums in the register that they are in. As assembly: from the intrinsics GCC 12 copies every
// accumulator once a step. The floats are integers' bits.
inline void add_dwords(__m256& acc, __m256i x) { asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(x)); }
inline void add_dwords(__m256i& acc, __m256i x) { asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(x)); }
inline void add_words(__m256i& acc, __m256i x) { asm("vpaddw %1, %0, %0" : "+x"(acc) : "x"(x)); }

inline __m128i load_bytes(const uint8_t* row, int32_t dim) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + dim));
}

// Rows of a slot as they are stored.
inline Rows stored_rows(const SlotLayout& layout, const uint8_t* slot) {
  return {kind_of(layout.dtype), slot + layout.values_offset,
          reinterpret_cast<const uint16_t*>(slot + layout.scales_offset), layout.row_bytes};
}

// Rows of a slot, expanded where it is sparse.
Rows slot_rows(const SlotLayout& layout, const uint8_t* slot, int32_t head_dim, uint8_t* widened,
               uint8_t* tile) {
  Rows rows = stored_rows(layout, slot);
  if (layout.dtype == DType::kInt4) {
    uint8_t* out = layout.dense ? tile : widened;
    widen_int4(rows.values, kTileTokens * layout.row_bytes, out);
    rows.values = out;
    rows.row_bytes *= 2;
  }
  if (layout.dense) return rows;
  const int32_t row_bytes = static_cast<int32_t>(rows.row_bytes);
  if (rows.kind == Kind::kF32) {
    expand<4>(slot, rows.values, row_bytes, head_dim, tile);
    rows.row_bytes = head_dim * 4;
  } else if (rows.kind == Kind::kInt) {
    expand_bytes(slot, rows.values, row_bytes, head_dim, tile);
    rows.row_bytes = head_dim;
  } else {
    expand<2>(slot, rows.values, row_bytes, head_dim, tile);
    rows.row_bytes = head_dim * 2;
  }
  rows.values = tile;
  return rows;
}

// The rows of a coded slot, as widen_codes has them.
template <bool kSigned>
Rows coded_rows(const SlotLayout& layout, const CodeChunk* chunks, const uint8_t* slot,
                uint8_t* tile) {
  widen_codes<kSigned>(chunks, slot + layout.values_offset, layout.row_bytes, layout.head_dim,
                       tile);
  return {Kind::kInt, tile, reinterpret_cast<const uint16_t*>(slot + layout.scales_offset),
          layout.head_dim};
}

Rows dense_rows(const DecodeRun& run, const uint8_t* values, int32_t n, uint8_t* padded) {
  Rows rows;
  rows.kind = kind_of(run.tail_dtype);
  rows.values = values;
  rows.scales = nullptr;
  rows.row_bytes = dtype_bytes(run.tail_dtype, run.head_dim);
  if (n < kTileTokens) {
    const int32_t n_rows = (n + 7) / 8 * 8;
    __builtin_memcpy(padded, values, n * rows.row_bytes);
    __builtin_memset(padded + n * rows.row_bytes, 0, (n_rows - n) * rows.row_bytes);
    rows.values = padded;
  }
  return rows;
}

// K and V of one of the store's tiles in memory, to be fetched ahead.
Prefetch lines_of(const DecodeRun& run, int32_t tile) {
  if (tile >= run.first_tile + run.n_tiles || tile >= run.sequence->n_blocks) return {};
  return {run.sequence->pages[tile] + run.k_offset,
          int64_t{run.k_slot->slot_bytes} + run.v_slot->slot_bytes};
}

}  // namespace
}  // namespace mustafar
