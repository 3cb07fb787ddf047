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
  int32_t bit = 0;
  for (int32_t d = 0; d < 64 * chunk; d++) bit += widths[d];
  out.start = bit / 8;
  int32_t last = bit;
  for (int32_t i = 0; i < 64; i++) last += widths[64 * chunk + i];
  out.narrow = last <= 8 * (out.start + 32);
  for (int32_t octet = 0; octet < 64; octet += 8) {
    const int32_t first = bit / 8;  // seven bits before and 56 of the octet fit eight bytes
    for (int32_t i = octet; i < octet + 8; i++) {
      const int32_t width = widths[64 * chunk + i];
      out.bytes[i] = static_cast<uint8_t>(first - out.start + i - octet);
      out.shifts[i] = static_cast<uint8_t>(bit - 8 * first);
      out.masks[i] = static_cast<uint8_t>((1 << width) - 1);
      out.halves[i] = static_cast<uint8_t>((1 << width) / 2);
      bit += width;
    }
  }
}

// 64 codes of a row, each less half its levels. Reads 64 bytes from the chunk's start on; kNarrow:
// 32 bytes, which lie across two lines of cache half as often.
template <bool kNarrow>
inline __m512i unpack_codes(const CodeChunk& chunk, const uint8_t* row) {
  const uint8_t* at = row + chunk.start;
  const __m512i codes =
      kNarrow ? _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))
              : _mm512_loadu_si512(at);
  const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(chunk.bytes), codes);
  const __m512i shifted = _mm512_multishift_epi64_epi8(_mm512_load_si512(chunk.shifts), bytes);
  return _mm512_sub_epi8(_mm512_and_si512(shifted, _mm512_load_si512(chunk.masks)),
                         _mm512_load_si512(chunk.halves));
}

}  // namespace
}  // namespace mustafar
