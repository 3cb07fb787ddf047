// Decode attention, AMX: the two products of a tile of 64 tokens on tile registers, for up to
// kHeads (4 or 8) query heads of a KV head. Included by the AMX path alone.
//
// A tile product takes 16 rows of 64 bytes by as many columns of dwords, so that the heads of a
// group cost what one costs, and a query in two terms what it costs in one.
//
//   scores  keys [16 tokens][64 bytes of dims] x queries [dims][columns: every head's high term,
//           then every head's low term]. bf16: the terms are bf16 and add up; ints: the bytes of 16
//           bits, high * 256 + low.
//   values  weights [rows: heads][64 bytes of tokens] x values [tokens][16 dims], where a dword of
//           values holds one dim of two (bf16) or four (ints) tokens. ints: weights are two bytes
//           too, all high ones in the rows before all low ones.
//
// Sparse rows are expanded into scratch that stays in the first-level cache.
#pragma once

#include <algorithm>

#include "backend/cpu/attention/decode_avx512_run.h"
#include "backend/cpu/simd/amx.h"

namespace mustafar {
namespace {

// Values of a 64-byte row.
constexpr int32_t row_dims(Kind kind) { return kind == Kind::kInt ? 64 : 32; }

// What the tile registers hold.
enum : int { kOut0, kOut1, kWeights, kScores, kRows0, kRows1, kQueries };

template <Kind kKind, int kHeads>
struct AmxShapes : AmxConfig {
  constexpr AmxShapes() {
    for (const int tile : {kOut0, kOut1, kWeights}) {
      rows[tile] = kKind == Kind::kInt ? 2 * kHeads : kHeads;
    }
    for (const int tile : {kScores, kQueries}) row_bytes[tile] = 8 * kHeads;
  }
};

template <Kind kKind, int kHeads>
inline void configure_shapes() {
  static constexpr AmxShapes<kKind, kHeads> kShapes;
  _tile_loadconfig(&kShapes);
}

// Bytes of a prepared block of queries: a tile of 16 rows of 8 * kHeads bytes for each 64 bytes of
// a dense row.
template <int kHeads>
constexpr int64_t amx_query_bytes(Kind kind, int32_t head_dim) {
  return int64_t{head_dim / row_dims(kind)} * 16 * 8 * kHeads;
}

// scores [kHeads][64], 16 of each, from terms [16 tokens][2 kHeads].
template <Kind kKind, int kHeads>
inline void scores_of_16(const uint8_t* terms, float* scores) {
  const __m512i token = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512 sums[kHeads];  // of the terms: [4 tokens][4 heads], or [2 tokens][8 heads]
#pragma GCC unroll 8
  for (int i = 0; i < kHeads; i++) {
    const __m512i a = _mm512_load_si512(terms + 128 * i),
                  b = _mm512_load_si512(terms + 128 * i + 64);
    __m512i high, low;
    if constexpr (kHeads == 4) {
      high = _mm512_shuffle_i32x4(a, b, 0x88);
      low = _mm512_shuffle_i32x4(a, b, 0xdd);
    } else {
      high = _mm512_shuffle_i32x4(a, b, 0x44);
      low = _mm512_shuffle_i32x4(a, b, 0xee);
    }
    if constexpr (kKind == Kind::kInt) {
      sums[i] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
    } else {
      sums[i] = _mm512_add_ps(_mm512_castsi512_ps(high), _mm512_castsi512_ps(low));
    }
  }
#pragma GCC unroll 2
  for (int part = 0; part < kHeads / 4; part++) {
    __m512 s[4];  // [4 tokens][4 heads]
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      if constexpr (kHeads == 4) {
        s[i] = sums[i];
      } else {
        s[i] = part == 0 ? _mm512_shuffle_f32x4(sums[2 * i], sums[2 * i + 1], 0x88)
                         : _mm512_shuffle_f32x4(sums[2 * i], sums[2 * i + 1], 0xdd);
      }
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(s[0], s[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(s[0], s[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(s[2], s[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(s[2], s[3]));
    const __m512d heads[4] = {_mm512_unpacklo_pd(a, c), _mm512_unpackhi_pd(a, c),
                              _mm512_unpacklo_pd(b, d), _mm512_unpackhi_pd(b, d)};
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++) {
      _mm512_store_ps(scores + (4 * part + h) * kTileTokens,
                      _mm512_permutexvar_ps(token, _mm512_castpd_ps(heads[h])));
    }
  }
}

// 16 rows of 64 * n_chunks bytes.
template <Kind kKind, Source kSource>
inline void expand_rows(const Rows& rows, int32_t row0, int32_t n_chunks, __m512i zero,
                        uint8_t* out, Prefetch& prefetch) {
  for (int32_t r = row0; r < row0 + 16; r++) {
    prefetch.step();
    for (int32_t c = 0; c < n_chunks; c++, out += 64) {
      if constexpr (kKind == Kind::kInt) {
        _mm512_store_si512(out, load_bytes<kSource>(rows, r, 2 * c, zero));
      } else {
        _mm512_store_si512(out, load_words<kSource>(rows, r, c, zero));
      }
    }
  }
}

// Scratch of the functions below: two pieces of expanded rows, of 16 keys or of 64 bytes of every
// value, in turns, so that products run while the next piece is expanded; and 4 KiB for their
// results. Small, so that it stays in the first-level cache while rows stream through.
constexpr int64_t kPieceBytes = 4096;
constexpr int64_t amx_piece_bytes(int32_t head_dim) {
  return std::max(kPieceBytes, int64_t{32} * head_dim);
}

// scores [kHeads][64] of all 64 rows. q: a prepared block.
template <Kind kKind, Source kSource, int kHeads>
__attribute__((noinline)) void amx_scores(const Rows& rows_in, int32_t head_dim, const uint8_t* q,
                                          uint8_t* scratch, float* scores,
                                          Prefetch& prefetch_inout) {
  const Rows rows = rows_in;
  Prefetch prefetch = prefetch_inout;
  const __m512i zero = opaque_zero();
  const int32_t n_chunks = head_dim / row_dims(kKind);
  const int64_t piece = amx_piece_bytes(head_dim);
  uint8_t* const terms = scratch + 2 * piece;
  constexpr int64_t kQueryRow = 8 * kHeads;
  const int64_t stride = kSource == Source::kDense ? rows.row_bytes : 64 * n_chunks;
  const auto multiply = [&](int32_t block) {
    const uint8_t* a =
        kSource == Source::kDense ? rows.values + block * 16 * stride : scratch + block % 2 * piece;
    amx_zero<kScores>();
    for (int32_t c = 0; c < n_chunks; c++) {
      amx_load<kQueries>(q + c * 16 * kQueryRow, kQueryRow);
      amx_load<kRows0>(a + c * 64, stride);
      if constexpr (kKind == Kind::kInt) {
        amx_dot_int8<kScores, kRows0, kQueries>();
      } else {
        amx_dot_bf16<kScores, kRows0, kQueries>();
      }
    }
    amx_store<kScores>(terms + block * 16 * kQueryRow, kQueryRow);
  };
  for (int32_t block = 0; block < 4; block++) {
    if constexpr (kSource != Source::kDense) {
      expand_rows<kKind, kSource>(rows, block * 16, n_chunks, zero, scratch + block % 2 * piece,
                                  prefetch);
    }
    if (block > 0) multiply(block - 1);
  }
  multiply(3);
  for (int32_t t = 0; t < kTileTokens; t += 16) {
    scores_of_16<kKind, kHeads>(terms + t * kQueryRow, scores + t);
  }
  prefetch_inout = prefetch;
}

// 64 bytes of every row as tiles take them, 4 KiB. bf16, 32 dims: even dims [32 pairs of
// tokens][16], then odd dims. Ints, 64 dims: of the even dims of every 16 the first four, then the
// others, likewise of the odd ones; each [16 quads of tokens][16]. Shifts and blends as far as may
// be: unpacking would wait for the port that expands.
template <Kind kKind, Source kSource>
inline void lay_out_values(const Rows& rows, int32_t chunk, __m512i zero, uint8_t* out,
                           Prefetch& prefetch) {
  if constexpr (kKind == Kind::kInt) {
    const __m512i first = _mm512_set1_epi16(0xff);
    const auto even = [&](__m512i x, __m512i y) {
      return _mm512_ternarylogic_epi32(first, x, _mm512_slli_epi16(y, 8), 0xca);
    };
    const auto odd = [&](__m512i x, __m512i y) {
      return _mm512_ternarylogic_epi32(first, _mm512_srli_epi16(x, 8), y, 0xca);
    };
    for (int32_t t = 0; t < kTileTokens; t += 4, out += 64) {
      prefetch.step();
      prefetch.step();
      __m512i x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) x[i] = load_bytes<kSource>(rows, t + i, 2 * chunk, zero);
      const __m512i even01 = even(x[0], x[1]), even23 = even(x[2], x[3]);
      const __m512i odd01 = odd(x[0], x[1]), odd23 = odd(x[2], x[3]);
      _mm512_store_si512(out, _mm512_unpacklo_epi16(even01, even23));
      _mm512_store_si512(out + kAmxTileBytes, _mm512_unpackhi_epi16(even01, even23));
      _mm512_store_si512(out + 2 * kAmxTileBytes, _mm512_unpacklo_epi16(odd01, odd23));
      _mm512_store_si512(out + 3 * kAmxTileBytes, _mm512_unpackhi_epi16(odd01, odd23));
    }
  } else {
    constexpr __mmask32 kSecond = 0xaaaaaaaa;
    for (int32_t t = 0; t < kTileTokens; t += 2, out += 64) {
      prefetch.step();
      const __m512i x = load_words<kSource>(rows, t, chunk, zero);
      const __m512i y = load_words<kSource>(rows, t + 1, chunk, zero);
      _mm512_store_si512(out, _mm512_mask_blend_epi16(kSecond, x, _mm512_slli_epi32(y, 16)));
      _mm512_store_si512(out + 2 * kAmxTileBytes,
                         _mm512_mask_blend_epi16(kSecond, _mm512_srli_epi32(x, 16), y));
    }
  }
}

// 32 dims: o [kHeads] += weights V. weights: bf16 [kHeads][64]. values: laid out.
template <int kHeads>
inline void add_values_bf16(const uint8_t* values, const uint8_t* weights, float* o,
                            int64_t o_stride) {
  constexpr int64_t kWeightRow = 2 * kTileTokens;
  amx_load<kOut0>(o, o_stride);
  amx_load<kOut1>(o + 16, o_stride);
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    amx_load<kWeights>(weights + half * 64, kWeightRow);
    amx_load<kRows0>(values + half * kAmxTileBytes, 64);
    amx_load<kRows1>(values + (2 + half) * kAmxTileBytes, 64);
    amx_dot_bf16<kOut0, kWeights, kRows0>();
    amx_dot_bf16<kOut1, kWeights, kRows1>();
  }
  amx_store<kOut0>(o, o_stride);
  amx_store<kOut1>(o + 16, o_stride);
}

// 64 dims: o [n_heads] = o * rescale + weights V * unit. weights: int8 [2 kHeads][64]. values: laid
// out. sums: 4 KiB.
template <int kHeads>
inline void add_values_int(const uint8_t* values, const uint8_t* weights, int32_t n_heads,
                           const float* rescale, const float* unit, uint8_t* sums, float* o,
                           int32_t head_dim) {
  constexpr int64_t kSums = 2 * kHeads * 64;  // of a product, [2 kHeads][16]
  amx_load<kWeights>(weights, kTileTokens);
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    amx_zero<kOut0>();
    amx_zero<kOut1>();
    amx_load<kRows0>(values + i * kAmxTileBytes, 64);
    amx_load<kRows1>(values + (i + 1) * kAmxTileBytes, 64);
    amx_dot_int8<kOut0, kWeights, kRows0>();
    amx_dot_int8<kOut1, kWeights, kRows1>();
    amx_store<kOut0>(sums + i * kSums, 64);
    amx_store<kOut1>(sums + i * kSums + kSums, 64);
  }
  for (int32_t h = 0; h < n_heads; h++) {
    float* out = o + int64_t{h} * head_dim;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const uint8_t* high = sums + i * kSums + h * 64;
      const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(high), 8),
                                           _mm512_load_si512(high + kHeads * 64));
      const __m512 old = _mm512_mul_ps(_mm512_load_ps(out + i * 16), _mm512_set1_ps(rescale[h]));
      _mm512_store_ps(out + i * 16,
                      _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(unit[h]), old));
    }
  }
}

// o [n_heads] = o * rescale + weights V over all 64 rows. weights: bf16 [kHeads][64], with
// o already rescaled; or int8 [2 kHeads][64], in units of `unit`.
template <Kind kKind, Source kSource, int kHeads>
__attribute__((noinline)) void amx_values(const Rows& rows_in, int32_t head_dim,
                                          const uint8_t* weights, int32_t n_heads,
                                          const float* rescale, const float* unit, uint8_t* scratch,
                                          float* o, Prefetch& prefetch_inout) {
  const Rows rows = rows_in;
  Prefetch prefetch = prefetch_inout;
  const __m512i zero = opaque_zero();
  const int32_t n_chunks = head_dim / row_dims(kKind);
  const int64_t piece = amx_piece_bytes(head_dim);
  for (int32_t c = 0; c <= n_chunks; c++) {
    if (c < n_chunks) {
      lay_out_values<kKind, kSource>(rows, c, zero, scratch + c % 2 * piece, prefetch);
    }
    if (c == 0) continue;
    const uint8_t* values = scratch + (c - 1) % 2 * piece;
    float* out = o + (c - 1) * row_dims(kKind);
    if constexpr (kKind == Kind::kInt) {
      add_values_int<kHeads>(values, weights, n_heads, rescale, unit, scratch + 2 * piece, out,
                             head_dim);
    } else {
      add_values_bf16<kHeads>(values, weights, out, int64_t{head_dim} * 4);
    }
  }
  prefetch_inout = prefetch;
}

}  // namespace
}  // namespace mustafar
