// Decode attention, AVX-512: a tile of integer rows by dot products of bytes, for up to four query
// heads at a time in registers. Included by the files of the AVX-512 paths alone.
//
// vpdpbusd multiplies unsigned bytes by signed ones. Of keys and queries the keys are unsigned, of
// weights and values the weights. Codes that have no sign in storage are taken as they are, and
// so is int8 that must not have one, plus 128: what such a bias adds to a sum is known beforehand
// and taken off again, all in integers.
//
// Queries and weights have one byte or two, high * 256 + low: by two the products are as exact as
// the cache's int8 is, one byte is enough beside the error of rows that are pruned or of few bits
// (is_coarse).
//
// K: four rows side by side in a register, a lane of 128 bits each, so that few horizontal sums are
// left. V: the bytes of four tokens side by side make a dword of every dim; sums stay in registers
// for all 64 tokens.
#pragma once

#include "backend/cpu/attention/decode_avx512_softmax.h"
#include "backend/cpu/attention/decode_avx512_sums.h"

namespace mustafar {
namespace {

// As assembly for the reason of dot_bf16. bytes: not negative; others: signed.
inline __m512i dot_bytes(__m512i acc, __m512i bytes, __m512i others) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(bytes), "v"(others));
  return acc;
}

// Rows are loaded 64 bytes at a time: of kNibbles2 the codes of 128 dims, two to a byte, which come
// apart once they are arranged, even dims before odd ones; of others the codes of 64 dims.
constexpr int32_t parts_of(Source source) { return source == Source::kNibbles2 ? 2 : 1; }

constexpr bool is_nibbles(Source source) {
  return source == Source::kNibbles || source == Source::kNibbles2;
}

// What load_codes adds to the values of 64 dims, in their own order, as unsigned bytes.
template <bool kUnsigned>
inline __m512i code_bias(const Rows& rows, int32_t chunk) {
  if (rows.source == Source::kCodes) return _mm512_load_si512(rows.chunks[chunk].halves);
  if (is_nibbles(rows.source)) return _mm512_set1_epi8(8);
  return _mm512_set1_epi8(kUnsigned ? static_cast<char>(0x80) : 0);
}

// Four rows of 64 dims so that each has a lane of 128 bits of its own: what is summed up in a lane
// is a row's. z[i] has 16 dims of every row; which, is the lane's number with bits flipped by i.
inline void lanes_of_rows(const __m512i* rows, __m512i* z) {
  const __m512i swapped = _mm512_setr_epi64(2, 3, 8, 9, 6, 7, 12, 13);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    // Halves of rows 0 and 2, and of 1 and 3.
    const __m512i a = i == 0 ? _mm512_mask_blend_epi64(0xf0, rows[0], rows[2])
                             : _mm512_shuffle_i64x2(rows[0], rows[2], 0x4e);
    const __m512i b = i == 0 ? _mm512_mask_blend_epi64(0xf0, rows[1], rows[3])
                             : _mm512_shuffle_i64x2(rows[1], rows[3], 0x4e);
    z[2 * i] = _mm512_mask_blend_epi64(0xcc, a, b);
    z[2 * i + 1] = _mm512_permutex2var_epi64(a, swapped, b);
  }
}

// 64 bytes of a query for lanes_of_rows: [4][64].
inline void store_lanes(__m512i bytes, uint8_t* out) {
  _mm512_store_si512(out, bytes);
  _mm512_store_si512(out + 64, _mm512_shuffle_i64x2(bytes, bytes, 0xb1));
  _mm512_store_si512(out + 128, _mm512_shuffle_i64x2(bytes, bytes, 0x4e));
  _mm512_store_si512(out + 192, _mm512_shuffle_i64x2(bytes, bytes, 0x1b));
}

// The bytes of 64 or 128 dims, all even ones before all odd ones.
inline __m512i even_before_odd(__m512i bytes) {
  const __m512i sorted = _mm512_shuffle_epi8(
      bytes,
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), sorted);
}
inline void even_before_odd(__m512i& first, __m512i& second) {
  const __m512i a = even_before_odd(first), b = even_before_odd(second);
  first = _mm512_shuffle_i64x2(a, b, 0x44);
  second = _mm512_shuffle_i64x2(a, b, 0xee);
}

// Bytes of a query, dims in their own order, to the order of the keys' bytes.
inline void order_query(Source source, int32_t n_chunks, uint8_t* bytes) {
  for (int32_t c = 0; c < n_chunks; c += parts_of(source)) {
    uint8_t* at = bytes + 64 * c;
    __m512i first = _mm512_load_si512(at);
    if (source == Source::kNibbles) _mm512_store_si512(at, even_before_odd(first));
    if (source != Source::kNibbles2) continue;
    __m512i second = _mm512_load_si512(at + 64);
    even_before_odd(first, second);
    _mm512_store_si512(at, first);
    _mm512_store_si512(at + 64, second);
  }
}

// The biases of values in the order of the sums of int_values. out: [64 n_chunks].
inline void store_value_bias(const Rows& v, int32_t n_chunks, int32_t* out) {
  for (int32_t c = 0; c < n_chunks; c++) {
    // Four bytes of every lane make a vector.
    const __m512i bytes = code_bias<false>(v, c);
    alignas(64) uint8_t at[64];
    _mm512_store_si512(
        at, _mm512_permutexvar_epi32(
                _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes));
    for (int i = 0; i < 64; i += 16) {
      const __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(at + i));
      _mm512_store_si512(out + 64 * c + i, _mm512_cvtepu8_epi32(part));
    }
  }
}

// 64 sums of int_values in the order of the bytes that they are of.
inline void sums_by_byte(const float* sums, __m512* x) {
  // Lane i of sum j becomes lane j of vector i.
  const __m512 a = _mm512_load_ps(sums), b = _mm512_load_ps(sums + 16);
  const __m512 c = _mm512_load_ps(sums + 32), d = _mm512_load_ps(sums + 48);
  const __m512 ab0 = _mm512_shuffle_f32x4(a, b, 0x44), ab1 = _mm512_shuffle_f32x4(a, b, 0xee);
  const __m512 cd0 = _mm512_shuffle_f32x4(c, d, 0x44), cd1 = _mm512_shuffle_f32x4(c, d, 0xee);
  x[0] = _mm512_shuffle_f32x4(ab0, cd0, 0x88);
  x[1] = _mm512_shuffle_f32x4(ab0, cd0, 0xdd);
  x[2] = _mm512_shuffle_f32x4(ab1, cd1, 0x88);
  x[3] = _mm512_shuffle_f32x4(ab1, cd1, 0xdd);
}

// A row of the sums of int_values in the order of its dims. out: aligned to 64.
inline void sums_in_order(Source source, const float* sums, int32_t head_dim, float* out) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const int32_t n = parts_of(source);
  for (int32_t d = 0; d < head_dim; d += 64 * n) {
    __m512 x[8];
    for (int32_t i = 0; i < n; i++) sums_by_byte(sums + d + 64 * i, x + 4 * i);
    for (int32_t i = 0; i < 4 * n; i++) {
      __m512 y = x[i];
      // Sixteen dims out of eight even and eight odd ones.
      if (is_nibbles(source)) {
        y = _mm512_permutex2var_ps(x[i / 2], i % 2 == 0 ? low : high, x[i / 2 + 2 * n]);
      }
      _mm512_store_ps(out + d + 16 * i, y);
    }
  }
}

// The lower half of every byte, two's complement, plus 8.
inline __m512i low_nibbles(__m512i bytes) {
  // (x & 0x0f) ^ 0x08
  return _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8(0x0f), _mm512_set1_epi8(0x08), 0x6a);
}

// What `part` takes the codes of 64 dims from: each plus its bias (code_bias), from 0 to 255 if
// kUnsigned, else from -128 to 127. chunk: of 64 bytes.
template <Source kSource, bool kUnsigned>
inline __m512i load_codes(const Rows& rows, int32_t row, int32_t chunk, __m512i zero) {
  if constexpr (kSource == Source::kNibbles2) {
    return _mm512_loadu_si512(rows.values + int64_t{row} * rows.row_bytes + 64 * chunk);
  } else if constexpr (kSource == Source::kCodes) {
    return raw_codes<false>(rows.chunks[chunk], rows.values + int64_t{row} * rows.row_bytes);
  } else if constexpr (kSource == Source::kNibbles) {
    // Even dims in the lower half, odd ones in the upper.
    const uint8_t* at = rows.values + int64_t{row} * rows.row_bytes + 32 * chunk;
    const __m512i twice =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    const __m512i count = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    return low_nibbles(_mm512_srlv_epi16(twice, count));
  } else {
    const __m512i bytes = load_bytes<kSource>(rows, row, 2 * chunk, zero);
    if constexpr (!kUnsigned) return bytes;
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
}

// The codes of one of parts_of(kSource) sets of 64 dims.
template <Source kSource>
inline __m512i part(__m512i bytes, int32_t index) {
  if constexpr (kSource != Source::kNibbles2) return bytes;
  return low_nibbles(index == 0 ? bytes : _mm512_srli_epi16(bytes, 4));
}

// Calls body.operator()<source>() for integer rows.
template <class Body>
inline void with_int_source(Source source, Body&& body) {
  switch (source) {
    case Source::kDense:
      return body.template operator()<Source::kDense>();
    case Source::kNibbles:
      return body.template operator()<Source::kNibbles>();
    case Source::kNibbles2:
      return body.template operator()<Source::kNibbles2>();
    case Source::kCodes:
      return body.template operator()<Source::kCodes>();
    case Source::kRuns:
      return body.template operator()<Source::kRuns>();
    default:
      return body.template operator()<Source::kChain>();
  }
}

// Dword 4 i + j of the result is the sum of lane i of v[j].
inline __m512i sums_of_lanes(const __m512i* v) {
  const auto pair = [](__m512i x, __m512i y) {
    const __m512 swapped = _mm512_shuffle_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), 0x4e);
    return _mm512_add_epi32(_mm512_mask_blend_epi32(0xcccc, x, y), _mm512_castps_si512(swapped));
  };
  // Dwords x0 + x2, x1 + x3, y0 + y2, y1 + y3 of every lane.
  const __m512i a = pair(v[0], v[2]), b = pair(v[1], v[3]);
  const __m512i neighbours =
      _mm512_setr_epi32(1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
  return _mm512_add_epi32(_mm512_mask_blend_epi32(0xaaaa, a, b),
                          _mm512_permutex2var_epi32(a, neighbours, b));
}

// scores [NH][64]. q: prepared queries, [NH][n_chunks] of 64 high bytes and 64 low ones, four times
// each (store_lanes); bias: [NH] what the keys' biases add to a sum. kTerms: bytes of queries that
// count, the high one alone or both.
template <Source kSource, int NH, int kTerms>
__attribute__((noinline)) void int_scores(const Rows& rows_in, int32_t n_chunks, const uint8_t* q,
                                          const int32_t* bias, float* scores,
                                          Prefetch& prefetch_inout) {
  constexpr int kQuads = NH == 1 ? 4 : 2;  // of rows at a time: as many as the registers hold
  constexpr int kRows = 4 * kQuads;
  constexpr int kParts = parts_of(kSource);
  Prefetch prefetch = prefetch_inout;
  const Rows rows = rows_in;
  const __m512i zero = opaque_zero();
  const int64_t q_head = int64_t{n_chunks} * 512;
  const __m512i by_head = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  for (int32_t r = 0; r < kTileTokens; r += kRows) {
    __m512i acc[kTerms][NH][kQuads];  // high, low
#pragma GCC unroll 16
    for (int i = 0; i < kTerms * NH * kQuads; i++) (&acc[0][0][0])[i] = _mm512_setzero_si512();
    for (int32_t c = 0; c < n_chunks / kParts; c++) {
      __m512i z[kQuads][4];
#pragma GCC unroll 4
      for (int i = 0; i < kQuads; i++) {
        __m512i row[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          prefetch.step();
          row[j] = load_codes<kSource, true>(rows, r + j * kQuads + i, c, zero);
        }
        lanes_of_rows(row, z[i]);
      }
#pragma GCC unroll 2
      for (int p = 0; p < kParts; p++) {
        const uint8_t* const qc = q + (int64_t{c} * kParts + p) * 512;
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
          __m512i x[kQuads];
#pragma GCC unroll 4
          for (int i = 0; i < kQuads; i++) x[i] = part<kSource>(z[i][k], p);
#pragma GCC unroll 2
          for (int term = 0; term < kTerms; term++) {
#pragma GCC unroll 4
            for (int h = 0; h < NH; h++) {
              const __m512i y = _mm512_load_si512(qc + h * q_head + term * 256 + k * 64);
#pragma GCC unroll 4
              for (int i = 0; i < kQuads; i++) {
                acc[term][h][i] = dot_bytes(acc[term][h][i], x[i], y);
              }
            }
          }
        }
      }
    }
    constexpr int kHeads = NH == 1 ? 1 : 2;  // whose sums make a vector
#pragma GCC unroll 2
    for (int h = 0; h < NH; h += kHeads) {
      __m512i parts[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const int head = h + i / kQuads, quad = i % kQuads;
        parts[i] = acc[0][head][quad];
        if constexpr (kTerms == 2) {
          parts[i] = _mm512_add_epi32(_mm512_slli_epi32(parts[i], 8), acc[1][head][quad]);
        }
      }
      __m512i sums = sums_of_lanes(parts);  // rows r + 4 i + j of a head, or r + 2 i + j of two
      __m512i off = _mm512_set1_epi32(bias[h]);
      if constexpr (kHeads == 2) {
        sums = _mm512_permutexvar_epi32(by_head, sums);
        off = _mm512_mask_set1_epi32(off, 0xff00, bias[h + 1]);
      }
      store_sums<kHeads>(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, off)),
                         scores + h * kTileTokens + r);
    }
  }
  prefetch_inout = prefetch;
}

// Four tokens' bytes of 64 dims to dwords of a dim's four bytes, in lanes of four.
inline void quads_of(const __m512i* rows, __m512i* quads) {
  const __m512i low01 = _mm512_unpacklo_epi8(rows[0], rows[1]);
  const __m512i high01 = _mm512_unpackhi_epi8(rows[0], rows[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(rows[2], rows[3]);
  const __m512i high23 = _mm512_unpackhi_epi8(rows[2], rows[3]);
  quads[0] = _mm512_unpacklo_epi16(low01, low23);
  quads[1] = _mm512_unpackhi_epi16(low01, low23);
  quads[2] = _mm512_unpacklo_epi16(high01, high23);
  quads[3] = _mm512_unpackhi_epi16(high01, high23);
}

template <Source kSource>
inline void load_quads(const Rows& rows, int32_t token, int32_t chunk, __m512i zero,
                       __m512i* quads) {
  __m512i row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    row[i] = load_codes<kSource, false>(rows, token + i, chunk, zero);
  }
  quads_of(row, quads);
}

// o = o * rescale + weights V. weights: [kTerms][NH][64], all high bytes, then all low ones; bias:
// [64 n_chunks], of the values, in the order of o: [NH] rows, o_stride floats apart.
template <Source kSource, int NH, int kTerms>
__attribute__((noinline)) void int_values(const Rows& rows_in, int32_t n_chunks,
                                          const uint8_t* weights, const IntWeights<NH>& sums,
                                          const int32_t* bias, float* o, int64_t o_stride,
                                          Prefetch& prefetch_inout) {
  Prefetch prefetch = prefetch_inout;
  const Rows rows = rows_in;
  const __m512i zero = opaque_zero();
  constexpr int kParts = parts_of(kSource);
  for (int32_t c = 0; c < n_chunks; c++) {
    __m512i acc[NH][4];
#pragma GCC unroll 4
    for (int h = 0; h < NH; h++) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) acc[h][i] = _mm512_setzero_si512();
    }
#pragma GCC unroll 2
    for (int term = 0; term < kTerms; term++) {
      for (int32_t t = 0; t < kTileTokens; t += 4) {
        for (int i = 0; i < kTerms; i++) prefetch.step();
        __m512i quads[4];
        load_quads<kSource>(rows, t, c / kParts, zero, quads);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) quads[i] = part<kSource>(quads[i], c % kParts);
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
          int32_t four;
          __builtin_memcpy(&four, weights + (term * NH + h) * kTileTokens + t, 4);
          const __m512i w = _mm512_set1_epi32(four);
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) acc[h][i] = dot_bytes(acc[h][i], w, quads[i]);
        }
      }
      if (term + 1 == kTerms) break;
#pragma GCC unroll 4
      for (int h = 0; h < NH; h++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) acc[h][i] = _mm512_slli_epi32(acc[h][i], 8);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512i b = _mm512_load_si512(bias + 64 * c + 16 * i);
#pragma GCC unroll 4
      for (int h = 0; h < NH; h++) {
        float* out = o + h * o_stride + 64 * c + 16 * i;
        const __m512i off = _mm512_mullo_epi32(b, _mm512_set1_epi32(sums.code_sum[h]));
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[h][i], off));
        const __m512 old = _mm512_mul_ps(_mm512_load_ps(out), _mm512_set1_ps(sums.rescale[h]));
        _mm512_store_ps(out, _mm512_fmadd_ps(sum, _mm512_set1_ps(sums.unit[h]), old));
      }
    }
  }
  prefetch_inout = prefetch;
}

// Prefetch steps of int_scores and int_values.
constexpr int32_t int_steps(Source keys, int32_t value_terms, int32_t n_chunks) {
  return kTileTokens * n_chunks / parts_of(keys) +
         kTileTokens / 4 * value_terms * value_terms * n_chunks;
}

}  // namespace
}  // namespace mustafar
