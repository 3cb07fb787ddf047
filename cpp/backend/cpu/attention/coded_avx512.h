// Coded rows for AVX-512 (VBMI): 64 dims of a row to bytes in three steps whatever their widths, by
// a byte shuffle, a shift of every byte out of the eight around it, and a mask. Included by files
// of AVX-512 paths alone.
#pragma once

#include <immintrin.h>

#include "format/coded.h"

namespace mustafar {
namespace {

// Where the codes of 64 dims are in a row.
struct CodeChunk {
  alignas(64) uint8_t bytes[64];   // for eight dims the eight bytes that hold them, from `start` on
  alignas(64) uint8_t shifts[64];  // bits before a dim's code in its eight bytes
  alignas(64) uint8_t masks[64];   // of a code's bits
  alignas(64) uint8_t halves[64];  // 2^(w-1), 0 where the width is
  int32_t start;                   // byte of the row
  bool narrow;                     // all codes lie in 32 bytes
};

// Dims [64 * chunk, 64 * chunk + 64). widths: [head_dim].
inline void make_chunk(const uint8_t* widths, int32_t chunk, CodeChunk& out) {
  // Eight dims at a time as the bytes of a word: a product with kOnes has the sum of all of them,
  // at most 56, in its highest byte, and that of those before in every byte if shifted by one.
  constexpr uint64_t kOnes = 0x0101010101010101, kUpTo7 = 0x0706050403020100;
  const auto octet_at = [&](int32_t dim) {
    uint64_t octet;
    __builtin_memcpy(&octet, widths + dim, 8);
    return octet;
  };
  uint64_t bit = 0;
  for (int32_t d = 0; d < 64 * chunk; d += 8) bit += octet_at(d) * kOnes >> 56;
  const uint64_t start = bit / 8;
  for (int32_t i = 0; i < 64; i += 8) {
    const uint64_t octet = octet_at(64 * chunk + i);
    const uint64_t first = bit / 8;  // seven bits before and 56 of the octet fit eight bytes
    const uint64_t bytes = (first - start) * kOnes + kUpTo7;
    const uint64_t shifts = (bit - 8 * first) * kOnes + (octet * kOnes << 8);
    __builtin_memcpy(out.bytes + i, &bytes, 8);
    __builtin_memcpy(out.shifts + i, &shifts, 8);
    bit += octet * kOnes >> 56;
  }
  out.start = static_cast<int32_t>(start);
  out.narrow = bit <= 8 * (start + 32);
  const __m512i width = _mm512_loadu_si512(widths + 64 * chunk);
  const auto of_width = [&](__m128i table) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), width);
  };
  _mm512_store_si512(out.masks,
                     of_width(_mm_setr_epi8(0, 1, 3, 7, 15, 31, 63, 127, 0, 0, 0, 0, 0, 0, 0, 0)));
  _mm512_store_si512(out.halves,
                     of_width(_mm_setr_epi8(0, 1, 2, 4, 8, 16, 32, 64, 0, 0, 0, 0, 0, 0, 0, 0)));
}

// 64 codes of a row. Reads 64 bytes from the chunk's start on; kNarrow: 32 bytes, which lie across
// two lines of cache half as often.
template <bool kNarrow>
inline __m512i raw_codes(const CodeChunk& chunk, const uint8_t* row) {
  const uint8_t* at = row + chunk.start;
  const __m512i codes =
      kNarrow ? _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))
              : _mm512_loadu_si512(at);
  const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(chunk.bytes), codes);
  const __m512i shifted = _mm512_multishift_epi64_epi8(_mm512_load_si512(chunk.shifts), bytes);
  return _mm512_and_si512(shifted, _mm512_load_si512(chunk.masks));
}

// The same, each less half its levels.
template <bool kNarrow>
inline __m512i unpack_codes(const CodeChunk& chunk, const uint8_t* row) {
  return _mm512_sub_epi8(raw_codes<kNarrow>(chunk, row), _mm512_load_si512(chunk.halves));
}

}  // namespace
}  // namespace mustafar
