// Decode attention, AVX2: tiles of integer rows of few bits, by products of bytes, for up to four
// query heads at a time in registers. Included by the AVX2 path alone.
//
// vpmaddubsw multiplies unsigned bytes by signed ones and adds up pairs in 16 bits, which saturate.
// Of keys and queries the keys are unsigned, of weights and values the weights. Codes have few
// bits, so that several products fit 16 bits before they are widened: how many is known from the
// codes' widths, and of keys from the query too. All of it is exact.
//
// K: two rows at a time, sums of pairs of dims. V: a tile is arranged beforehand so that the bytes
// of four tokens make a dword of every dim; then all heads go over that.
#pragma once

#include <algorithm>

#include "backend/cpu/attention/decode_avx2_rows.h"

namespace mustafar {
namespace {

// What a tile's rows are.
enum class ByteSource {
  kNibbles,  // int4, every value is stored: of 64 dims even ones lie in 32 lower halves
  kCodes,    // coded: a byte each, keys without sign, values less half their levels
  kSigned,   // int4 that has been expanded: bytes from -8 to 7
};

// A run's integer rows and its queries as bytes.
struct ByteRun {
  bool used;  // else the run has none, or they want two bytes
  ByteSource source;
  bool wide;           // sums of a key's products don't fit 16 bits
  int8_t* q;           // [n_queries][head_dim], in the order of the keys' bytes
  int32_t* bias;       // [n_queries]: what the codes' biases add to a sum
  uint8_t* k_bias;     // [head_dim]: what is added to keys so that they have no sign
  uint8_t* k_top;      // [head_dim]: the largest that they can be then
  uint8_t* per_widen;  // [head_dim / 32]: quads of tokens whose products fit 16 bits
};

constexpr float kTopByte = 127.0f;  // the largest code of a query

// Whether rows are integers of so few bits that products of bytes serve them (is_coarse).
inline bool has_few_bits(const SlotLayout& layout) {
  return (layout.dtype == DType::kInt4 || layout.dtype == DType::kCoded) && is_coarse(layout);
}

inline __m256i load_256(const void* x) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(x));
}
inline void store_256(void* out, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(out), x); }

// 64 codes of a row without sign, as two sets of 32.
template <ByteSource kSource>
inline void load_codes(const uint8_t* row, int32_t dim, __m256i* x) {
  if constexpr (kSource == ByteSource::kNibbles) {
    const __m256i low = _mm256_set1_epi8(0x0f), eight = _mm256_set1_epi8(8);
    const __m256i both = load_256(row + dim / 2);
    x[0] = _mm256_xor_si256(_mm256_and_si256(both, low), eight);
    x[1] = _mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(both, 4), low), eight);
  } else {
    for (int i = 0; i < 2; i++) {
      x[i] = load_256(row + dim + 32 * i);
      if (kSource == ByteSource::kSigned) x[i] = _mm256_add_epi8(x[i], _mm256_set1_epi8(8));
    }
  }
}

inline __m256i sums_of_pairs(__m256i words) {
  return _mm256_madd_epi16(words, _mm256_set1_epi16(1));
}

// Lane i of the result is the sum of v[i]'s lanes; of four vectors twice, half a sum each.
template <int N>
inline __m256i sums_of_lanes(const __m256i* v) {
  const auto pair = [](__m256i a, __m256i b) {
    return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  };
  const auto quad = [&](const __m256i* x) {
    const __m256i a = pair(x[0], x[1]), b = pair(x[2], x[3]);
    return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  };
  const __m256i a = quad(v), b = N == 8 ? quad(v + N - 4) : a;
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                          _mm256_permute2x128_si256(a, b, 0x31));
}

constexpr int rows_at_once(int n_heads) { return n_heads == 1 ? 4 : 2; }
constexpr int quads_at_once(int n_heads) { return n_heads == 4 ? 2 : 4; }

// scores [NH][64]. q, bias: of the heads. kWide: see ByteRun.
template <ByteSource kSource, int NH, bool kWide>
void byte_scores(const Rows& k, int32_t head_dim, const int8_t* q, const int32_t* bias,
                 float* scores, Prefetch& prefetch_inout) {
  constexpr int R = rows_at_once(NH);
  Prefetch prefetch = prefetch_inout;
  alignas(32) int32_t off[8];
  for (int i = 0; i < 8; i++) off[i] = bias[i / R % NH];
  for (int32_t r = 0; r < kTileTokens; r += R) {
    prefetch.step();
    const uint8_t* row = k.values + r * k.row_bytes;
    __m256i acc[NH * R];
#pragma GCC unroll 8
    for (int i = 0; i < NH * R; i++) acc[i] = _mm256_setzero_si256();
    for (int32_t d = 0; d < head_dim; d += 64) {
      __m256i x[R][2];
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) load_codes<kSource>(row + i * k.row_bytes, d, x[i]);
#pragma GCC unroll 4
      for (int h = 0; h < NH; h++) {
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
          const __m256i y = load_256(q + h * head_dim + d + 32 * p);
#pragma GCC unroll 4
          for (int i = 0; i < R; i++) {
            const __m256i product = _mm256_maddubs_epi16(x[i][p], y);
            if constexpr (kWide) {
              add_dwords(acc[h * R + i], sums_of_pairs(product));
            } else {
              add_words(acc[h * R + i], product);
            }
          }
        }
      }
    }
    if constexpr (!kWide) {
#pragma GCC unroll 8
      for (int i = 0; i < NH * R; i++) acc[i] = sums_of_pairs(acc[i]);
    }
    const __m256i sums = _mm256_sub_epi32(sums_of_lanes<NH * R>(acc), load_256(off));
    const __m256 s = _mm256_cvtepi32_ps(sums);
    const __m128 first = _mm256_castps256_ps128(s);
    if constexpr (NH == 1) {
      _mm_storeu_ps(scores + r, first);
    } else {
      const __m128 second = _mm256_extractf128_ps(s, 1);
#pragma GCC unroll 4
      for (int h = 0; h < NH; h += 2) {
        const __m128 two = h == 0 ? first : second;
        _mm_storel_pi(reinterpret_cast<__m64*>(scores + h * kTileTokens + r), two);
        _mm_storeh_pi(reinterpret_cast<__m64*>(scores + (h + 1) * kTileTokens + r), two);
      }
    }
  }
  prefetch_inout = prefetch;
}

// Four tokens' bytes of 32 dims to dwords of a dim's four bytes. Of quads[i] the dims are 4 i to
// 4 i + 3 and, in the upper lane, 16 more.
inline void quads_of(const __m256i* rows, __m256i* quads) {
  const __m256i low01 = _mm256_unpacklo_epi8(rows[0], rows[1]);
  const __m256i high01 = _mm256_unpackhi_epi8(rows[0], rows[1]);
  const __m256i low23 = _mm256_unpacklo_epi8(rows[2], rows[3]);
  const __m256i high23 = _mm256_unpackhi_epi8(rows[2], rows[3]);
  quads[0] = _mm256_unpacklo_epi16(low01, low23);
  quads[1] = _mm256_unpackhi_epi16(low01, low23);
  quads[2] = _mm256_unpacklo_epi16(high01, high23);
  quads[3] = _mm256_unpackhi_epi16(high01, high23);
}

constexpr int64_t kQuadBytes = kTileTokens * 32;  // a tile of 32 dims

// A tile's values in signed bytes: out [head_dim / 32][16][4] of quads_of.
template <ByteSource kSource>
void arrange_values(const Rows& v, int32_t head_dim, uint8_t* out, Prefetch& prefetch_inout) {
  Prefetch prefetch = prefetch_inout;
  for (int32_t d = 0; d < head_dim; d += 64) {
    for (int32_t t = 0; t < kTileTokens; t += 4) {
      prefetch.step();
      const uint8_t* row = v.values + t * v.row_bytes;
      uint8_t* at = out + d / 32 * kQuadBytes + t * 32;
      __m256i rows[4], quads[4];
      if constexpr (kSource == ByteSource::kNibbles) {
        const __m256i low = _mm256_set1_epi8(0x0f);
        const __m256i value = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) rows[i] = load_256(row + i * v.row_bytes + d / 2);
        quads_of(rows, quads);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const __m256i even = _mm256_and_si256(quads[i], low);
          const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(quads[i], 4), low);
          store_256(at + 32 * i, _mm256_shuffle_epi8(value, even));
          store_256(at + kQuadBytes + 32 * i, _mm256_shuffle_epi8(value, odd));
        }
      } else {
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) {
            rows[i] = load_256(row + i * v.row_bytes + d + 32 * p);
          }
          quads_of(rows, quads);
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) store_256(at + p * kQuadBytes + 32 * i, quads[i]);
        }
      }
    }
  }
  prefetch_inout = prefetch;
}

// o [NH][head_dim] = o * rescale + weights V * unit, dims in the order of the values' bytes. quads:
// of arrange_values; weights: [NH][64], without sign; per_widen: see ByteRun.
template <int NH>
void byte_values(const uint8_t* quads, int32_t head_dim, const uint8_t* weights,
                 const uint8_t* per_widen, const float* rescale, const float* unit, float* o,
                 Prefetch prefetch) {
  constexpr int kQuads = quads_at_once(NH);
  constexpr int32_t kAll = kTileTokens / 4;
  for (int32_t d = 0; d < head_dim; d += 32) {
    const int32_t n = per_widen[d / 32];
    for (int first = 0; first < 4; first += kQuads) {
      const uint8_t* at = quads + d / 32 * kQuadBytes + 32 * first;
      __m256i total[NH][kQuads];
#pragma GCC unroll 4
      for (int h = 0; h < NH; h++) {
#pragma GCC unroll 4
        for (int i = 0; i < kQuads; i++) total[h][i] = _mm256_setzero_si256();
      }
      for (int32_t begin = 0; begin < kAll; begin += n) {
        __m256i acc[NH][kQuads];
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
#pragma GCC unroll 4
          for (int i = 0; i < kQuads; i++) acc[h][i] = _mm256_setzero_si256();
        }
        for (int32_t t = begin; t < begin + n; t++) {
          if (t % 2 == 0) prefetch.step();
#pragma GCC unroll 4
          for (int h = 0; h < NH; h++) {
            int32_t four;
            __builtin_memcpy(&four, weights + h * kTileTokens + 4 * t, 4);
            const __m256i w = _mm256_set1_epi32(four);
#pragma GCC unroll 4
            for (int i = 0; i < kQuads; i++) {
              add_words(acc[h][i], _mm256_maddubs_epi16(w, load_256(at + 128 * t + 32 * i)));
            }
          }
        }
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
#pragma GCC unroll 4
          for (int i = 0; i < kQuads; i++) {
            add_dwords(total[h][i], sums_of_pairs(acc[h][i]));
          }
        }
      }
#pragma GCC unroll 4
      for (int h = 0; h < NH; h++) {
#pragma GCC unroll 2
        for (int i = 0; i < kQuads; i += 2) {
          const __m256i halves[2] = {_mm256_permute2x128_si256(total[h][i], total[h][i + 1], 0x20),
                                     _mm256_permute2x128_si256(total[h][i], total[h][i + 1], 0x31)};
#pragma GCC unroll 2
          for (int j = 0; j < 2; j++) {
            float* out = o + h * head_dim + d + 4 * (first + i) + 16 * j;
            const __m256 old = _mm256_mul_ps(_mm256_load_ps(out), _mm256_set1_ps(rescale[h]));
            _mm256_store_ps(
                out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(halves[j]), _mm256_set1_ps(unit[h]), old));
          }
        }
      }
    }
  }
}

// Steps of Prefetch that arrange_values takes and, of the first query heads, byte_scores and
// byte_values.
inline int32_t byte_steps(int32_t n_queries, int32_t head_dim) {
  const int n_heads = n_queries >= 4 ? 4 : n_queries >= 2 ? 2 : 1;
  return head_dim / 64 * kTileTokens / 4 + kTileTokens / rows_at_once(n_heads) +
         head_dim / 32 * (4 / quads_at_once(n_heads)) * kTileTokens / 8;
}

// 64 floats or bytes whose even dims come before the odd ones, to their own order and back.
inline void merge_even_odd(float* x) {
  float y[64];
  for (int i = 0; i < 32; i++) {
    y[2 * i] = x[i];
    y[2 * i + 1] = x[32 + i];
  }
  __builtin_memcpy(x, y, sizeof y);
}
inline void split_even_odd(int8_t* x) {
  int8_t y[64];
  for (int i = 0; i < 32; i++) {
    y[i] = x[2 * i];
    y[32 + i] = x[2 * i + 1];
  }
  __builtin_memcpy(x, y, sizeof y);
}

// Eight floats times `inverse`, rounded.
inline __m256i scaled_ints(const float* x, float inverse) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(inverse)));
}

// The bytes of query head h, and what they say of its products with keys.
inline void byte_query(const float* q, float inverse, int32_t head_dim, int32_t h, ByteRun& run) {
  int8_t* out = run.q + int64_t{h} * head_dim;
  const __m256i zero = _mm256_setzero_si256();
  __m256i bias = zero, most = zero, least = zero;  // the largest and smallest sums there can be
  for (int32_t d = 0; d < head_dim; d += 32) {
    const __m256i words =
        _mm256_packs_epi32(scaled_ints(q + d, inverse), scaled_ints(q + d + 8, inverse));
    const __m256i more =
        _mm256_packs_epi32(scaled_ints(q + d + 16, inverse), scaled_ints(q + d + 24, inverse));
    store_256(out + d, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, more),
                                                   _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  }
  for (int32_t d = 0; d < head_dim && run.source == ByteSource::kNibbles; d += 64) {
    split_even_odd(out + d);
  }
  for (int32_t d = 0; d < head_dim; d += 32) {
    const __m256i codes = load_256(out + d), top = load_256(run.k_top + d);
    const __m256i above = _mm256_max_epi8(codes, zero), below = _mm256_min_epi8(codes, zero);
    bias = _mm256_add_epi32(bias,
                            sums_of_pairs(_mm256_maddubs_epi16(load_256(run.k_bias + d), codes)));
    most = _mm256_adds_epi16(most, _mm256_maddubs_epi16(top, above));
    least = _mm256_adds_epi16(least, _mm256_maddubs_epi16(top, below));
  }
  const __m256i sums[4] = {bias, zero, zero, zero};
  run.bias[h] = _mm256_cvtsi256_si32(sums_of_lanes<4>(sums));
  const __m256i full = _mm256_or_si256(_mm256_cmpeq_epi16(most, _mm256_set1_epi16(32767)),
                                       _mm256_cmpeq_epi16(least, _mm256_set1_epi16(-32768)));
  run.wide = run.wide || _mm256_testz_si256(full, full) == 0;
}

// Room for a run's bytes, and what its slots say of them.
inline ByteRun byte_run(const DecodeRun& run, uint8_t*& at) {
  ByteRun bytes = {};
  bytes.used = !run.fine && run.sequence->n_blocks > 0 && has_few_bits(*run.k_slot) &&
               has_few_bits(*run.v_slot);
  if (!bytes.used) return bytes;
  const int32_t n = run.head_dim;
  bytes.q = take<int8_t>(at, int64_t{run.n_queries} * n);
  bytes.bias = take<int32_t>(at, run.n_queries);
  bytes.k_bias = take<uint8_t>(at, n);
  bytes.k_top = take<uint8_t>(at, n);
  bytes.per_widen = take<uint8_t>(at, n / 32);
  const bool coded = is_coded(run);
  bytes.source = coded                                    ? ByteSource::kCodes
                 : run.k_slot->dense && run.v_slot->dense ? ByteSource::kNibbles
                                                          : ByteSource::kSigned;
  for (int32_t d = 0; d < n; d += 32) {
    int32_t v_levels = coded ? 8 : 16;
    for (int32_t i = d; i < d + 32; i++) {
      const int32_t k_levels = coded ? 1 << run.k_codes.widths[i] : 16;
      bytes.k_bias[i] = static_cast<uint8_t>(k_levels / 2);
      bytes.k_top[i] = static_cast<uint8_t>(k_levels - 1);
      if (coded) v_levels = std::max(v_levels, 1 << run.v_codes.widths[i]);
    }
    // Two tokens of a quad add up to 255 * 2 * (levels / 2) at most.
    static_assert(1 << kMaxWidth <= 128);
    bytes.per_widen[d / 32] = static_cast<uint8_t>(128 / v_levels);
  }
  return bytes;
}

}  // namespace
}  // namespace mustafar
