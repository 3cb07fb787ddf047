// Decode attention for AVX2. A sparse tile is first expanded to dense rows of its own type in
// scratch that stays in the first-level cache (a table of byte shuffles, eight dims at a time),
// then one kernel per type goes over dense rows: up to four query heads at a time, f32 arithmetic
// for floats, 16-bit multiplies with 32-bit sums for integers.
#include <immintrin.h>

#include "backend/cpu/attention/decode_avx2_rows.h"

namespace mustafar {
namespace {

inline float sum_of(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float max_of(__m256 x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

constexpr float kTopCode = 32767.0f;  // the largest 16-bit code of queries and weights

// Lane i of the result is the sum of v[i]'s lanes.
inline __m256 sums_of_8(const __m256* v) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// scores of a tile's rows. q: prepared queries, f32 [n_queries][head_dim]; of ints int16 in the
// same places.
template <Kind kKind, int NH>
void tile_scores(const Rows& rows, int32_t n_rows, int32_t head_dim, const float* q, float* scores,
                 Prefetch prefetch) {
  constexpr int R = 8 / NH;
  for (int32_t r = 0; r < n_rows; r += R) {
    for (int i = 0; i < R; i++) prefetch.step();
    const uint8_t* row = rows.values + r * rows.row_bytes;
    __m256 acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) acc[i] = _mm256_setzero_ps();
    if constexpr (kKind == Kind::kInt) {
      for (int32_t d = 0; d < head_dim; d += 16) {
        __m256i k[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
          k[i] = _mm256_cvtepi8_epi16(load_bytes(row + i * rows.row_bytes, d));
        }
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
          const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(
              reinterpret_cast<const int16_t*>(q + h * head_dim) + d));
#pragma GCC unroll 8
          for (int i = 0; i < R; i++) {
            __m256& a = acc[h * R + i];
            a = _mm256_castsi256_ps(
                _mm256_add_epi32(_mm256_castps_si256(a), _mm256_madd_epi16(k[i], x)));
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) acc[i] = _mm256_cvtepi32_ps(_mm256_castps_si256(acc[i]));
    } else {
      for (int32_t d = 0; d < head_dim; d += 8) {
        __m256 k[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) k[i] = load_floats<kKind>(row + i * rows.row_bytes, d);
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
          const __m256 x = _mm256_load_ps(q + h * head_dim + d);
#pragma GCC unroll 8
          for (int i = 0; i < R; i++) acc[h * R + i] = _mm256_fmadd_ps(k[i], x, acc[h * R + i]);
        }
      }
    }
    alignas(32) float sums[8];
    _mm256_store_ps(sums, sums_of_8(acc));
#pragma GCC unroll 4
    for (int h = 0; h < NH; h++) {
      for (int i = 0; i < R; i++) scores[h * kTileTokens + r + i] = sums[h * R + i];
    }
  }
}

// o [NH][head_dim] = o * rescale + weights V. weights: f32 [NH][64]; ints: int16 [NH][64], times
// unit.
template <Kind kKind, int NH>
void tile_values(const Rows& rows, int32_t n_rows, int32_t head_dim, const uint8_t* weights,
                 const float* rescale, const float* unit, float* o, Prefetch prefetch) {
  for (int32_t d = 0; d < head_dim; d += 16) {
    __m256 acc[NH][2];
    for (int h = 0; h < NH; h++) {
      for (int i = 0; i < 2; i++) {
        acc[h][i] = kKind == Kind::kInt
                        ? _mm256_setzero_ps()
                        : _mm256_mul_ps(_mm256_load_ps(o + h * head_dim + d + 8 * i),
                                        _mm256_set1_ps(rescale[h]));
      }
    }
    if constexpr (kKind == Kind::kInt) {
      for (int32_t t = 0; t < n_rows; t += 2) {
        if (d == 0) prefetch.step(), prefetch.step();
        const __m128i x = load_bytes(rows.values + t * rows.row_bytes, d);
        const __m128i y = load_bytes(rows.values + (t + 1) * rows.row_bytes, d);
        const __m256i v[2] = {_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, y)),
                              _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x, y))};
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
          int32_t pair;
          __builtin_memcpy(&pair, weights + h * kTileTokens * 2 + t * 2, 4);
          const __m256i w = _mm256_set1_epi32(pair);
#pragma GCC unroll 2
          for (int i = 0; i < 2; i++) {
            acc[h][i] = _mm256_castsi256_ps(
                _mm256_add_epi32(_mm256_castps_si256(acc[h][i]), _mm256_madd_epi16(v[i], w)));
          }
        }
      }
    } else {
      for (int32_t t = 0; t < n_rows; t++) {
        if (d == 0) prefetch.step();
        const uint8_t* row = rows.values + t * rows.row_bytes;
        const __m256 v0 = load_floats<kKind>(row, d), v1 = load_floats<kKind>(row, d + 8);
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
          const __m256 w =
              _mm256_broadcast_ss(reinterpret_cast<const float*>(weights) + h * kTileTokens + t);
          acc[h][0] = _mm256_fmadd_ps(v0, w, acc[h][0]);
          acc[h][1] = _mm256_fmadd_ps(v1, w, acc[h][1]);
        }
      }
    }
    for (int h = 0; h < NH; h++) {
      for (int i = 0; i < 2; i++) {
        float* out = o + h * head_dim + d + 8 * i;
        if constexpr (kKind == Kind::kInt) {
          const __m256 sum = _mm256_cvtepi32_ps(_mm256_castps_si256(acc[h][i]));
          acc[h][i] =
              _mm256_fmadd_ps(sum, _mm256_set1_ps(unit[h]),
                              _mm256_mul_ps(_mm256_load_ps(out), _mm256_set1_ps(rescale[h])));
        }
        _mm256_store_ps(out, acc[h][i]);
      }
    }
  }
}

// 2^x; 0 below -126, NaN for NaN.
inline __m256 exp2_ps(__m256 x) {
  const __m256 floor_at = _mm256_set1_ps(-126.0f);
  const __m256 tiny = _mm256_cmp_ps(x, floor_at, _CMP_LT_OQ);
  x = _mm256_max_ps(floor_at, x);  // the second operand where one is NaN
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(x, n);
  __m256 p = _mm256_set1_ps(kExp2Terms[0]);
#pragma GCC unroll 6
  for (int i = 1; i < 7; i++) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2Terms[i]));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
  return _mm256_andnot_ps(tiny, p);
}

// Softmax of one head over a tile: scores [64] of the rows that are seen become weights. Returns
// the factor of the output so far. Of ints: scores are multiplied by q_unit, q_offset is added and
// the keys' scales come last; unit: of int weights; weight_sum: running, of weights times the
// values' scales.
template <Kind kKind>
float tile_softmax(const Rows& k, const Rows& v, uint64_t seen, float q_unit, const float* scores,
                   uint8_t* weights, float& running_max, float& running_sum, float& unit,
                   float q_offset, float& weight_sum) {
  const __m256 minus_infinity = _mm256_set1_ps(-__builtin_inff());
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256 s[8];
  __m256 top = minus_infinity;
  for (int i = 0; i < 8; i++) {
    s[i] = _mm256_load_ps(scores + 8 * i);
    if constexpr (kKind == Kind::kInt) {
      s[i] = _mm256_fmadd_ps(s[i], _mm256_set1_ps(q_unit), _mm256_set1_ps(q_offset));
      s[i] = _mm256_mul_ps(s[i], load_bf16(k.scales + 8 * i));
    }
    const __m256i bits = _mm256_set1_epi32(static_cast<int32_t>(seen >> (8 * i) & 0xff));
    const __m256i valid = _mm256_cmpeq_epi32(_mm256_and_si256(bits, lane_bit), lane_bit);
    s[i] = _mm256_blendv_ps(minus_infinity, s[i], _mm256_castsi256_ps(valid));
    top = _mm256_max_ps(top, s[i]);
  }
  const float tile = max_of(top);
  const float max = tile > running_max ? tile : running_max;
  const float shift = max == -__builtin_inff() ? 0.0f : max;
  const float rescale =
      running_max == max ? 1.0f : _mm256_cvtss_f32(exp2_ps(_mm256_set1_ps(running_max - shift)));
  running_max = max;

  __m256 sum = _mm256_setzero_ps(), largest = sum, scaled = sum;
  for (int i = 0; i < 8; i++) {
    s[i] = exp2_ps(_mm256_sub_ps(s[i], _mm256_set1_ps(shift)));
    sum = _mm256_add_ps(sum, s[i]);
    if constexpr (kKind == Kind::kInt) {
      s[i] = _mm256_mul_ps(s[i], load_bf16(v.scales + 8 * i));
      largest = _mm256_max_ps(largest, s[i]);
      scaled = _mm256_add_ps(scaled, s[i]);
    } else {
      _mm256_store_ps(reinterpret_cast<float*>(weights) + 8 * i, s[i]);
    }
  }
  running_sum = running_sum * rescale + sum_of(sum);
  if constexpr (kKind == Kind::kInt) {
    weight_sum = weight_sum * rescale + sum_of(scaled);
    const float largest_weight = max_of(largest);
    unit = largest_weight / kTopCode;
    const __m256 inverse = _mm256_set1_ps(largest_weight > 0 ? kTopCode / largest_weight : 0.0f);
    for (int i = 0; i < 8; i += 2) {
      const __m256i codes =
          _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(s[i], inverse)),
                             _mm256_cvtps_epi32(_mm256_mul_ps(s[i + 1], inverse)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(weights + 16 * i),
                         _mm256_permute4x64_epi64(codes, 0xd8));
    }
  }
  return rescale;
}

struct Work {
  float* scores;       // [4][64]
  uint8_t* weights;    // [4][64] of 2 or 4 bytes
  uint8_t* tiles[2];   // expanded K and V
  uint8_t* widened;    // int4 as int8
  float* queries;      // [n_queries][head_dim], scaled
  float* int_queries;  // int16 in place of floats
  float* q_unit;       // [n_queries] of int_queries
  float* q_offset;     // [n_queries] of scores with coded keys
  float* weight_sum;   // [n_queries] of the values' weights times their scales
  // A coded value is (code + 1/2) * step * scale: the steps of keys go into the queries, and those
  // of values into the output once the store is done with.
  CodeOctet* octets[2];  // K and V, [head_dim / 8]
  float* steps[2];       // [head_dim]
};

template <Kind kKind, int NH>
void tile_heads(const DecodeRun& run, const Rows& k, const Rows& v, int32_t n, uint64_t seen,
                int32_t head, const Work& work, Prefetch next_k, Prefetch next_v) {
  const int32_t n_rows = (n + 7) / 8 * 8;
  const float* q = (kKind == Kind::kInt ? work.int_queries : work.queries) + head * run.head_dim;
  tile_scores<kKind, NH>(k, n_rows, run.head_dim, q, work.scores, next_k);
  float rescale[NH], unit[NH];
  for (int h = 0; h < NH; h++) {
    rescale[h] = tile_softmax<kKind>(
        k, v, seen, work.q_unit[head + h], work.scores + h * kTileTokens,
        work.weights + h * kTileTokens * (kKind == Kind::kInt ? 2 : 4), run.max[head + h],
        run.sum[head + h], unit[h], work.q_offset[head + h], work.weight_sum[head + h]);
  }
  // Accumulated in scratch, which is aligned as run.o is not.
  tile_values<kKind, NH>(v, n_rows, run.head_dim, work.weights, rescale, unit,
                         work.queries + (run.n_queries * 2 + head) * run.head_dim, next_v);
}

template <Kind kKind>
void tile_queries(const DecodeRun& run, const Rows& k, const Rows& v, int32_t n, uint64_t seen,
                  const Work& work, Prefetch next_k, Prefetch next_v) {
  for_query_groups(run.n_queries, [&]<int NH>(int32_t head) {
    tile_heads<kKind, NH>(run, k, v, n, seen, head, work, next_k, next_v);
    next_k.lines = next_v.lines = 0;
  });
}

void prepare_queries(const DecodeRun& run, const Work& work) {
  for (int32_t h = 0; h < run.n_queries; h++) {
    const float* q = run.q + int64_t{h} * run.head_dim;
    float* out = work.queries + int64_t{h} * run.head_dim;
    float* in_ints = work.int_queries + int64_t{h} * run.head_dim;
    int16_t* codes = reinterpret_cast<int16_t*>(in_ints);
    work.q_offset[h] = work.weight_sum[h] = 0.0f;
    __m256 absmax = _mm256_setzero_ps(), probe = absmax;  // a NaN or Inf makes probe NaN
    for (int32_t d = 0; d < run.head_dim; d += 8) {
      const __m256 x = _mm256_loadu_ps(q + d);
      absmax = _mm256_max_ps(absmax, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x));
      probe = _mm256_fmadd_ps(x, _mm256_setzero_ps(), probe);
      _mm256_store_ps(out + d, _mm256_mul_ps(x, _mm256_set1_ps(run.q_scale)));
    }
    if (is_coded(run)) {
      absmax = probe = _mm256_setzero_ps();
      __m256 sum = absmax;
      for (int32_t d = 0; d < run.head_dim; d += 8) {
        const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(q + d), _mm256_load_ps(work.steps[0] + d));
        _mm256_store_ps(in_ints + d, x);
        absmax = _mm256_max_ps(absmax, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x));
        probe = _mm256_fmadd_ps(x, _mm256_setzero_ps(), probe);
        sum = _mm256_add_ps(sum, x);
      }
      work.q_offset[h] = 0.5f * run.q_scale * sum_of(sum);
      q = in_ints;  // its codes, which are narrower, go over what has been read of it
    }
    const float top = max_of(absmax);
    work.q_unit[h] = top * run.q_scale / kTopCode + sum_of(probe);
    const __m256 inverse = _mm256_set1_ps(top > 0 ? kTopCode / top : 0.0f);
    for (int32_t d = 0; d < run.head_dim; d += 16) {
      const __m256i packed = _mm256_packs_epi32(
          _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(q + d), inverse)),
          _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(q + d + 8), inverse)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes + d),
                         _mm256_permute4x64_epi64(packed, 0xd8));
    }
  }
}

}  // namespace

void decode_run_avx2(const DecodeRun& run) {
  const int64_t query_floats = int64_t{run.n_queries} * run.head_dim;
  Work work;
  uint8_t* at = run.scratch;
  work.scores = take<float>(at, 4 * kTileTokens);
  work.weights = take<uint8_t>(at, 4 * kTileTokens * 4);
  for (uint8_t*& tile : work.tiles)
    tile = take<uint8_t>(at, int64_t{kTileTokens} * run.head_dim * 4);
  work.widened = take<uint8_t>(at, int64_t{kTileTokens} * run.head_dim + 64);
  work.queries = take<float>(at, 3 * query_floats);
  work.int_queries = work.queries + query_floats;
  float* o = work.queries + 2 * query_floats;
  work.q_unit = take<float>(at, run.n_queries);
  work.q_offset = take<float>(at, run.n_queries);
  work.weight_sum = take<float>(at, run.n_queries);
  const bool coded = is_coded(run);
  for (int i = 0; i < 2 && coded; i++) {
    const CodeTable& table = i == 0 ? run.k_codes : run.v_codes;
    work.octets[i] = take<CodeOctet>(at, run.head_dim / 8);
    work.steps[i] = take<float>(at, run.head_dim);
    make_octets(table.widths, run.head_dim, work.octets[i]);
    code_steps(table, run.head_dim, work.steps[i]);
  }
  prepare_queries(run, work);
  clear_softmax(run.n_queries, run.max, run.sum);
  __builtin_memset(o, 0, query_floats * 4);

  bool in_codes = coded;  // the output is in units of the steps
  const auto apply_steps = [&] {
    in_codes = false;
    for (int32_t h = 0; h < run.n_queries; h++) {
      const float half = 0.5f * work.weight_sum[h];
      for (int32_t d = 0; d < run.head_dim; d++) {
        float& x = o[h * run.head_dim + d];
        x = (x + half) * work.steps[1][d];
      }
    }
  };
  for (int32_t tile = run.first_tile; tile < run.first_tile + run.n_tiles; tile++) {
    if (in_codes && tile >= run.sequence->n_blocks) apply_steps();
    Prefetch next_k, next_v;
    next_lines(run, tile + 1, next_k, next_v);
    Rows k, v;
    int32_t n = kTileTokens;
    if (tile < run.sequence->n_blocks) {
      const uint8_t* page = run.sequence->pages[tile];
      if (coded) {
        k = coded_rows(*run.k_slot, work.octets[0], page + run.k_offset, work.tiles[0]);
        v = coded_rows(*run.v_slot, work.octets[1], page + run.v_offset, work.tiles[1]);
      } else {
        k = slot_rows(*run.k_slot, page + run.k_offset, run.head_dim, work.widened, work.tiles[0],
                      next_k);
        v = slot_rows(*run.v_slot, page + run.v_offset, run.head_dim, work.widened, work.tiles[1],
                      next_v);
      }
    } else {
      const DenseTile dense = dense_tile(run, tile);
      n = dense.n;
      k = dense_rows(run, dense.k, n, work.tiles[0]);
      v = dense_rows(run, dense.v, n, work.tiles[1]);
    }
    const uint64_t seen = seen_rows(run, tile, n);
    with_kind(k.kind,
              [&]<Kind kKind>() { tile_queries<kKind>(run, k, v, n, seen, work, next_k, next_v); });
  }
  if (in_codes) apply_steps();
  __builtin_memcpy(run.o, o, query_floats * 4);
}

}  // namespace mustafar
