// Decode attention, AVX2: rows of a tile as dense rows of their own type, and eight or sixteen of
// their values in registers. Included by the AVX2 path alone; everything is internal to it.
#pragma once

#include <immintrin.h>

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

struct Prefetch {
  const uint8_t* at;
  int32_t lines;  // a row

  inline void step() {
    for (int32_t i = 0; i < lines; i++, at += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
    }
  }
};

// Expands 64 rows of values of kBytes each to dense rows.
template <int kBytes>
void expand(const uint8_t* masks, const uint8_t* values, int32_t row_bytes, int32_t head_dim,
            uint8_t* out, Prefetch& prefetch) {
  const int32_t mask_bytes = head_dim / 8;
  for (int32_t t = 0; t < kTileTokens; t++) {
    prefetch.step();
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
      } else if constexpr (kBytes == 2) {
        const __m128i v = _mm_shuffle_epi8(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)),
            _mm_load_si128(reinterpret_cast<const __m128i*>(kExpandTable.words[mask])));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), v);
      } else {
        const __m128i v = _mm_shuffle_epi8(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)),
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandTable.bytes[mask])));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out), v);
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

// Eight dims of coded rows.
struct CodeOctet {
  int32_t byte, shift;  // of the first code in a row
  uint64_t mask;        // bits of every code, a byte each
  uint64_t lift;        // 128 less half the codes, in every byte
};

// widths: [head_dim]; out: [head_dim / 8].
inline void make_octets(const uint8_t* widths, int32_t head_dim, CodeOctet* out) {
  int32_t bit = 0;
  for (int32_t d = 0; d < head_dim; d += 8, out++) {
    *out = {bit / 8, bit % 8, 0, 0};
    for (int32_t i = 0; i < 8; i++) {
      const int32_t width = widths[d + i];
      out->mask |= ((uint64_t{1} << width) - 1) << 8 * i;
      out->lift |= uint64_t{128u - (1u << width) / 2} << 8 * i;
      bit += width;
    }
  }
}

// 64 coded rows to int8: codes less their halves. Reads up to eight bytes past the last row.
inline void widen_codes(const CodeOctet* octets, const uint8_t* values, int32_t row_bytes,
                        int32_t head_dim, uint8_t* out) {
  for (int32_t t = 0; t < kTileTokens; t++, values += row_bytes) {
    for (int32_t o = 0; o < head_dim / 8; o++, out += 8) {
      uint64_t bits;
      __builtin_memcpy(&bits, values + octets[o].byte, 8);
      const uint64_t codes = _pdep_u64(bits >> octets[o].shift, octets[o].mask);
      const uint64_t signed_codes = (codes + octets[o].lift) ^ 0x8080808080808080u;
      __builtin_memcpy(out, &signed_codes, 8);
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

inline __m128i load_bytes(const uint8_t* row, int32_t dim) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + dim));
}

// Rows of a slot, expanded where it is sparse, while the lines of `next` are fetched.
Rows slot_rows(const SlotLayout& layout, const uint8_t* slot, int32_t head_dim, uint8_t* widened,
               uint8_t* tile, Prefetch& next) {
  Rows rows;
  rows.kind = kind_of(layout.dtype);
  rows.values = slot + layout.values_offset;
  rows.scales = reinterpret_cast<const uint16_t*>(slot + layout.scales_offset);
  rows.row_bytes = layout.row_bytes;
  if (layout.dtype == DType::kInt4) {
    uint8_t* out = layout.dense ? tile : widened;
    widen_int4(rows.values, kTileTokens * layout.row_bytes, out);
    rows.values = out;
    rows.row_bytes *= 2;
  }
  if (layout.dense) return rows;
  const int32_t row_bytes = static_cast<int32_t>(rows.row_bytes);
  if (rows.kind == Kind::kF32) {
    expand<4>(slot, rows.values, row_bytes, head_dim, tile, next);
    rows.row_bytes = head_dim * 4;
  } else if (rows.kind == Kind::kInt) {
    expand<1>(slot, rows.values, row_bytes, head_dim, tile, next);
    rows.row_bytes = head_dim;
  } else {
    expand<2>(slot, rows.values, row_bytes, head_dim, tile, next);
    rows.row_bytes = head_dim * 2;
  }
  next.lines = 0;
  rows.values = tile;
  return rows;
}

// The rows of a coded slot, as int8 codes.
Rows coded_rows(const SlotLayout& layout, const CodeOctet* octets, const uint8_t* slot,
                uint8_t* tile) {
  widen_codes(octets, slot + layout.values_offset, layout.row_bytes, layout.head_dim, tile);
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

// K and V of a tile in memory, to be fetched ahead: lines for each of 64 rows.
void next_lines(const DecodeRun& run, int32_t tile, Prefetch& k, Prefetch& v) {
  k = v = {nullptr, 0};
  if (tile >= run.first_tile + run.n_tiles || tile >= run.sequence->n_blocks) return;
  const uint8_t* page = run.sequence->pages[tile];
  k = {page + run.k_offset, (run.k_slot->slot_bytes / 64 + 63) / 64};
  v = {page + run.v_offset, (run.v_slot->slot_bytes / 64 + 63) / 64};
}

}  // namespace
}  // namespace mustafar
