// Decode attention, AVX-512: the two products of a tile of float rows, scores = K q and o += p V,
// for up to four query heads at a time in registers. Included by the files of the AVX-512 paths
// alone.
//
// K: 16 accumulators, 16 / NH rows by NH heads; their horizontal sums come out of one tree. Queries
// are one or two bf16 terms (BF16) or f32.
// V: dims in columns of 64 or 128, accumulators stay in registers for all 64 tokens. Two tokens a
// step where there is a two-term dot product (BF16), with weights of 16 bits.
#pragma once

#include "backend/cpu/attention/decode_avx512_sums.h"

namespace mustafar {
namespace {

// Two-term dot products into accumulators of 32 bits. As assembly: from the intrinsics GCC 12
// copies every accumulator twice a step, and spills.
inline __m512 dot_bf16(__m512 acc, __m512i x, __m512i y) {
#if defined(__AVX512BF16__)
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y));
#else
  static_cast<void>(x), static_cast<void>(y);
#endif
  return acc;
}

// scores [NH][64] of n_rows rows (a multiple of 16). q: prepared queries, [NH][n_chunks]. kLow:
// with the second bf16 term of the queries.
template <Kind kKind, Source kSource, int NH, bool kLow>
__attribute__((noinline)) void tile_scores(const Rows& rows_in, int32_t n_rows, int32_t n_chunks,
                                           const uint8_t* q, float* scores,
                                           Prefetch& prefetch_inout) {
  constexpr int R = 16 / NH;
  Prefetch prefetch = prefetch_inout;
  const Rows rows = rows_in;
  const __m512i zero = opaque_zero();
  const int64_t q_head = int64_t{n_chunks} * query_bytes(kKind);
  for (int32_t r = 0; r < n_rows; r += R) {
    __m512 acc[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
    for (int32_t chunk = 0; chunk < n_chunks; chunk++) {
      if constexpr (kSource != Source::kDense) prefetch.step();
      const uint8_t* qc = q + int64_t{chunk} * 128;
      __m512 q0[NH], q1[NH];
#pragma GCC unroll 4
      for (int h = 0; h < NH; h++) {
        q0[h] = _mm512_load_ps(qc + h * q_head);
        q1[h] = _mm512_load_ps(qc + h * q_head + 64);  // unused without kLow
      }
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) {
        if constexpr (kSource == Source::kDense) prefetch.step();
        if constexpr (takes_pairs(kKind)) {
          const __m512i k = load_words<kSource>(rows, r + i, chunk, zero);
#pragma GCC unroll 4
          for (int h = 0; h < NH; h++) {
            __m512& a = acc[h * R + i];
            a = dot_bf16(a, k, _mm512_castps_si512(q0[h]));
            if constexpr (kLow) a = dot_bf16(a, k, _mm512_castps_si512(q1[h]));
          }
        } else {
          const Pair k = load_floats<kKind, kSource>(rows, r + i, chunk, zero);
#pragma GCC unroll 4
          for (int h = 0; h < NH; h++) {
            __m512& a = acc[h * R + i];
            a = _mm512_fmadd_ps(k.a, q0[h], a);
            a = _mm512_fmadd_ps(k.b, q1[h], a);
          }
        }
      }
    }
    store_sums<NH>(sums_of_16(acc), scores + r);
  }
  prefetch_inout = prefetch;
}

// Columns [chunk0, chunk0 + NC) of o = o * rescale + weights V. weights: [NH][64] f32, or 16-bit
// (bf16). o: [NH] rows, o_stride floats apart, in the kind's order.
template <Kind kKind, Source kSource, int NH, int NC>
__attribute__((noinline)) void tile_columns(const Rows& rows_in, int32_t n_rows, int32_t chunk0,
                                            const uint8_t* weights, const float* rescale, float* o,
                                            int64_t o_stride, Prefetch& prefetch_inout) {
  Prefetch prefetch = prefetch_inout;
  constexpr int kStep = takes_pairs(kKind) ? 2 : 1;
  constexpr int64_t kWeightBytes = kTileTokens * (takes_pairs(kKind) ? 2 : 4);
  const Rows rows = rows_in;
  const __m512i zero = opaque_zero();
  __m512 acc[NH][2 * NC];
#pragma GCC unroll 4
  for (int h = 0; h < NH; h++) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * NC; c++) {
      acc[h][c] = _mm512_mul_ps(_mm512_load_ps(o + h * o_stride + chunk0 * 32 + c * 16),
                                _mm512_set1_ps(rescale[h]));
    }
  }
  for (int32_t t = 0; t < n_rows; t += kStep) {
    if (kSource != Source::kDense && t % 2 == 0) prefetch.step();
    __m512 w[NH];
#pragma GCC unroll 4
    for (int h = 0; h < NH; h++) {
      float pair;  // four bytes: one f32 weight, or two of 16 bits
      __builtin_memcpy(&pair, weights + h * kWeightBytes + t * (4 / kStep), 4);
      w[h] = _mm512_set1_ps(pair);
    }
#pragma GCC unroll 4
    for (int c = 0; c < NC; c++) {
      if (kSource == Source::kDense) {
#pragma GCC unroll 2
        for (int i = 0; i < kStep; i++) prefetch.step();
      }
      if constexpr (takes_pairs(kKind)) {
        const __m512i x = load_words<kSource>(rows, t, chunk0 + c, zero);
        const __m512i y = load_words<kSource>(rows, t + 1, chunk0 + c, zero);
        const __m512i a = _mm512_unpacklo_epi16(x, y), b = _mm512_unpackhi_epi16(x, y);
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
          acc[h][2 * c] = dot_bf16(acc[h][2 * c], a, _mm512_castps_si512(w[h]));
          acc[h][2 * c + 1] = dot_bf16(acc[h][2 * c + 1], b, _mm512_castps_si512(w[h]));
        }
      } else {
        const Pair v = load_floats<kKind, kSource>(rows, t, chunk0 + c, zero);
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
          acc[h][2 * c] = _mm512_fmadd_ps(v.a, w[h], acc[h][2 * c]);
          acc[h][2 * c + 1] = _mm512_fmadd_ps(v.b, w[h], acc[h][2 * c + 1]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < NH; h++) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * NC; c++) {
      _mm512_store_ps(o + h * o_stride + chunk0 * 32 + c * 16, acc[h][c]);
    }
  }
  prefetch_inout = prefetch;
}

// Columns of 32 dims of a pass of tile_values.
template <int NH>
constexpr int32_t kPassChunks = NH == 4 ? 2 : 4;

// Prefetch steps of scores and of values: one for every dense row and the columns that are loaded
// at a time; of sparse rows, which are fewer lines, one for a few rows.
template <int NH>
constexpr int32_t score_steps(Source source, int32_t n_rows, int32_t n_chunks) {
  return source == Source::kDense ? n_rows * n_chunks : n_rows / (16 / NH) * n_chunks;
}
template <int NH>
constexpr int32_t value_steps(Source source, int32_t n_rows, int32_t n_chunks) {
  if (source == Source::kDense) return n_rows * n_chunks;
  return n_rows / 2 * std::max(1, n_chunks / kPassChunks<NH>);
}

// tile_columns for all columns of o.
template <Kind kKind, Source kSource, int NH>
void tile_values(const Rows& rows, int32_t n_rows, int32_t n_chunks, const uint8_t* weights,
                 const float* rescale, float* o, int64_t o_stride, Prefetch& prefetch) {
  constexpr int NC = kPassChunks<NH>;
  int32_t chunk = 0;
  for (; chunk + NC <= n_chunks; chunk += NC) {
    tile_columns<kKind, kSource, NH, NC>(rows, n_rows, chunk, weights, rescale, o, o_stride,
                                         prefetch);
  }
  for (; chunk < n_chunks; chunk++) {
    tile_columns<kKind, kSource, NH, 1>(rows, n_rows, chunk, weights, rescale, o, o_stride,
                                        prefetch);
  }
}

}  // namespace
}  // namespace mustafar
