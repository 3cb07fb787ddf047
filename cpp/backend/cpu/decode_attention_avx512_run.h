// Decode attention, AVX-512: a run of tiles. Queries are prepared once, then each tile goes through
// scores, softmax and values, with the next tile on its way from memory. Included by the files of
// the AVX-512 paths alone.
#pragma once

#include "backend/cpu/decode_attention_avx512_tiles.h"

namespace mustafar {
namespace {

// 2^x; 0 below -150, NaN for NaN. Relative error below 2e-7.
inline __m512 exp2_ps(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // the second operand where one is NaN
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440266574e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357674640e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332471162809e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791363012e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028550421e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// 16 bf16 as floats.
inline __m512 load_bf16(const uint16_t* x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16));
}

// A tile's scores may leave out the second bf16 term of the queries while the mean square error
// that this adds to the output, relative, stays below this.
constexpr float kOneTermError = 5e-6f;
constexpr int32_t kMaxBlocks = 64;  // beyond 256 queries per KV head, always two terms

// A partial softmax over the tiles of one kind, all queries.
struct State {
  bool used;
  float* max;  // [n_queries]
  float* sum;
  float* o;          // [n_queries][head_dim], in the kind's order
  uint8_t* queries;  // prepared, [n_queries][n_chunks]
  float* q_unit;     // [n_queries] what a score of prepared queries is to be multiplied by
  float* q_error;    // [n_queries] |second bf16 term|^2 / |q|^2
  bool two_terms[kMaxBlocks];  // of every four query heads: what the last tile needed
};

struct Work {
  State states[kKinds];
  float* scores;      // [4][64]
  uint8_t* weights;   // [4][64] of 2 or 4 bytes
  uint8_t* tiles[2];  // K and V: int4 widened, or partial tiles padded with zeros
};

uint8_t* take(uint8_t*& at, int64_t bytes) {
  uint8_t* p = at;
  at += (bytes + 63) / 64 * 64;
  return p;
}

// Round to nearest even bf16, as floats.
inline __m512 rounded_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_add_epi32(bits, half), _mm512_set1_epi32(-65536)));
}

inline void store_bf16(uint8_t* out, __m512 x) {  // already rounded
  _mm256_store_si256(reinterpret_cast<__m256i*>(out),
                     _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16)));
}

void prepare_queries(const DecodeRun& run, Kind kind, State& state) {
  const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(4));
  for (int32_t h = 0; h < run.n_queries; h++) {
    const float* q = run.q + int64_t{h} * run.head_dim;
    uint8_t* out = state.queries + int64_t{h} * (run.head_dim / 32) * query_bytes(kind);
    __m512 scale = _mm512_set1_ps(run.q_scale);
    state.q_unit[h] = 1.0f;
    __m512 power = _mm512_setzero_ps(), low_power = power;
    if (kind == Kind::kInt) {
      __m512 absmax = _mm512_setzero_ps(), probe = absmax;  // a NaN or Inf makes probe NaN
      for (int32_t d = 0; d < run.head_dim; d += 16) {
        const __m512 x = _mm512_loadu_ps(q + d);
        absmax = _mm512_max_ps(absmax, _mm512_abs_ps(x));
        probe = _mm512_fmadd_ps(x, _mm512_setzero_ps(), probe);
      }
      const float top = _mm512_reduce_max_ps(absmax);
      state.q_unit[h] = top * run.q_scale / 32767.0f + _mm512_reduce_add_ps(probe);
      scale = _mm512_set1_ps(top > 0 ? 32767.0f / top : 0.0f);
    }
    for (int32_t d = 0; d < run.head_dim; d += 32) {
      const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(q + d), scale);
      const __m512 b = _mm512_mul_ps(_mm512_loadu_ps(q + d + 16), scale);
      if (kind == Kind::kInt) {
        __m256i* codes = reinterpret_cast<__m256i*>(out + d * 2);
        _mm256_store_si256(codes, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a)));
        _mm256_store_si256(codes + 1, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(b)));
      } else if (takes_pairs(kind)) {
        const __m512 a0 = rounded_bf16(a), b0 = rounded_bf16(b);
        store_bf16(out + d * 4, a0);
        store_bf16(out + d * 4 + 32, b0);
        const __m512 a1 = _mm512_sub_ps(a, a0), b1 = _mm512_sub_ps(b, b0);
        store_bf16(out + d * 4 + 64, rounded_bf16(a1));
        store_bf16(out + d * 4 + 96, rounded_bf16(b1));
        power = _mm512_fmadd_ps(a, a, _mm512_fmadd_ps(b, b, power));
        low_power = _mm512_fmadd_ps(a1, a1, _mm512_fmadd_ps(b1, b1, low_power));
      } else if (kind == Kind::kBF16) {
        _mm512_store_ps(out + d * 4, _mm512_permutex2var_ps(a, even, b));
        _mm512_store_ps(out + d * 4 + 64, _mm512_permutex2var_ps(a, odd, b));
      } else {
        _mm512_store_ps(out + d * 4, a);
        _mm512_store_ps(out + d * 4 + 64, b);
      }
    }
    if (takes_pairs(kind) && kind != Kind::kInt) {
      const float all = _mm512_reduce_add_ps(power);
      state.q_error[h] = all > 0 ? _mm512_reduce_add_ps(low_power) / all : 0.0f;
    }
  }
  for (bool& two_terms : state.two_terms) two_terms = false;
}

State& state_of(const DecodeRun& run, Work& work, Kind kind) {
  State& state = work.states[static_cast<int>(kind)];
  if (!state.used) {
    state.used = true;
    prepare_queries(run, kind, state);
    for (int32_t h = 0; h < run.n_queries; h++) {
      state.max[h] = -__builtin_inff();
      state.sum[h] = 0.0f;
    }
    __builtin_memset(state.o, 0, sizeof(float) * run.n_queries * run.head_dim);
  }
  return state;
}

// Softmax of one head over a tile: scores [64] (n of them valid) become weights, the state's
// maximum and sum are brought up to date. Returns the factor of the output so far; unit: of int
// weights.
template <Kind kKind>
float tile_softmax(const Rows& k, const Rows& v, int32_t n, float q_unit, const float* scores,
                   uint8_t* weights, float& running_max, float& running_sum, float& unit) {
  __m512 s[4];
  __m512 tile_max = _mm512_set1_ps(-__builtin_inff());
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const int32_t left = n - 16 * i;
    const __mmask16 valid = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
    s[i] = _mm512_load_ps(scores + 16 * i);
    if constexpr (kKind == Kind::kInt) {
      s[i] =
          _mm512_mul_ps(s[i], _mm512_mul_ps(load_bf16(k.scales + 16 * i), _mm512_set1_ps(q_unit)));
    }
    s[i] = _mm512_mask_blend_ps(valid, _mm512_set1_ps(-__builtin_inff()), s[i]);
    tile_max = _mm512_max_ps(tile_max, s[i]);
  }
  const float tile = _mm512_reduce_max_ps(tile_max);
  const float max = tile > running_max ? tile : running_max;
  const float shift = max == -__builtin_inff() ? 0.0f : max;
  const float rescale =
      running_max == max ? 1.0f : _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(running_max - shift)));
  running_max = max;

  __m512 sum = _mm512_setzero_ps();
  __m512 largest = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    s[i] = exp2_ps(_mm512_sub_ps(s[i], _mm512_set1_ps(shift)));
    if constexpr (kKind == Kind::kInt) {
      sum = _mm512_add_ps(sum, s[i]);
      s[i] = _mm512_mul_ps(s[i], load_bf16(v.scales + 16 * i));
      largest = _mm512_max_ps(largest, s[i]);
#if defined(__AVX512BF16__)
    } else if constexpr (kKind == Kind::kBF16) {
      // The sum of what is multiplied, so that its rounding is no bias.
      const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(s[i]));
      _mm256_store_si256(reinterpret_cast<__m256i*>(weights + 32 * i), bits);
      sum = _mm512_add_ps(sum,
                          _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
#endif
    } else {
      sum = _mm512_add_ps(sum, s[i]);
      _mm512_store_ps(weights + 64 * i, s[i]);
    }
  }
  running_sum = running_sum * rescale + _mm512_reduce_add_ps(sum);
  if constexpr (kKind == Kind::kInt) {
    const float top = _mm512_reduce_max_ps(largest);
    unit = top / 32767.0f;
    const __m512 inverse = _mm512_set1_ps(top > 0 ? 32767.0f / top : 0.0f);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(s[i], inverse));
      _mm256_store_si256(reinterpret_cast<__m256i*>(weights + 32 * i),
                         _mm512_cvtepi32_epi16(codes));
    }
  }
  return rescale;
}

// Whether the second bf16 term of a head's query matters to a tile, by its scores from the first:
// the error of a score is about |second| / |q| of the scores' root mean square, and it weighs as
// the tile's weights do against the largest so far.
bool needs_second_term(int32_t n, const float* scores, float q_error, float running_max) {
  __m512 squares = _mm512_setzero_ps(), top = _mm512_set1_ps(-__builtin_inff());
  for (int32_t i = 0; i < n; i += 16) {
    const __mmask16 valid = n - i >= 16 ? 0xffff : (1u << (n - i)) - 1;
    const __m512 s = _mm512_maskz_loadu_ps(valid, scores + i);
    squares = _mm512_fmadd_ps(s, s, squares);
    top = _mm512_mask_max_ps(top, valid, top, s);
  }
  constexpr float kLn2 = 0.693147181f;
  const float error = q_error * kLn2 * kLn2 * _mm512_reduce_add_ps(squares) / static_cast<float>(n);
  if (error <= kOneTermError) return false;
  const float below = _mm512_reduce_max_ps(top) - running_max;  // +inf at first
  if (!(below < -3.0f)) return true;
  const float share = kTileTokens * _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(2.0f * below)));
  return !(error * share <= kOneTermError);
}

template <Kind kKind, int NH, bool kLow>
void scores_of(const Rows& k, int32_t n_rows, int32_t n_chunks, const uint8_t* q, float* scores,
               Prefetch prefetch) {
  // f32 rows have no constant runs: 16 dims at a time.
  constexpr Source kRuns = kKind == Kind::kF32 ? Source::kChain : Source::kRuns;
  if (k.source == Source::kDense) {
    tile_scores<kKind, Source::kDense, NH, kLow>(k, n_rows, n_chunks, q, scores, prefetch);
  } else if (k.source == kRuns) {
    tile_scores<kKind, kRuns, NH, kLow>(k, n_rows, n_chunks, q, scores, prefetch);
  } else {
    tile_scores<kKind, Source::kChain, NH, kLow>(k, n_rows, n_chunks, q, scores, prefetch);
  }
}

// One tile for NH query heads from `head` on.
template <Kind kKind, int NH>
void tile_heads(const DecodeRun& run, const Rows& k, const Rows& v, int32_t n, int32_t head,
                State& state, Work& work, Prefetch next_k, Prefetch next_v) {
  const int32_t n_chunks = run.head_dim / 32;
  const int32_t n_rows = (n + 15) / 16 * 16;
  const uint8_t* q = state.queries + int64_t{head} * n_chunks * query_bytes(kKind);
  // f32 rows have no constant runs: 16 dims at a time.
  constexpr Source kRuns = kKind == Kind::kF32 ? Source::kChain : Source::kRuns;
  next_k.spread(kTileTokens / (16 / NH) * n_chunks);
  if constexpr (kKind == Kind::kBF16 && takes_pairs(kKind)) {
    const int32_t block = head / 4 + (head % 4 != 0);  // a remainder has at most two
    const bool remembers = block + 1 < kMaxBlocks;
    const bool two_terms = !remembers || state.two_terms[block];
    if (two_terms) {
      scores_of<kKind, NH, true>(k, n_rows, n_chunks, q, work.scores, next_k);
    } else {
      scores_of<kKind, NH, false>(k, n_rows, n_chunks, q, work.scores, next_k);
    }
    bool needed = false;
    for (int h = 0; h < NH && remembers; h++) {
      needed |= needs_second_term(n, work.scores + h * kTileTokens, state.q_error[head + h],
                                  state.max[head + h]);
    }
    if (needed && !two_terms) {
      scores_of<kKind, NH, true>(k, n_rows, n_chunks, q, work.scores, kNoPrefetch);
    }
    if (remembers) state.two_terms[block] = needed;
  } else {
    scores_of<kKind, NH, true>(k, n_rows, n_chunks, q, work.scores, next_k);
  }
  constexpr int64_t kWeightBytes = kTileTokens * (takes_pairs(kKind) ? 2 : 4);
  float rescale[NH], unit[NH];
  for (int h = 0; h < NH; h++) {
    rescale[h] = tile_softmax<kKind>(k, v, n, state.q_unit[head + h], work.scores + h * kTileTokens,
                                     work.weights + h * kWeightBytes, state.max[head + h],
                                     state.sum[head + h], unit[h]);
  }
  float* o = state.o + int64_t{head} * run.head_dim;
  next_v.spread(kTileTokens / 2 * value_passes<NH>(n_chunks));
  if (v.source == Source::kDense) {
    tile_values<kKind, Source::kDense, NH>(v, n_rows, n_chunks, work.weights, rescale, unit, o,
                                           run.head_dim, next_v);
  } else if (v.source == kRuns) {
    tile_values<kKind, kRuns, NH>(v, n_rows, n_chunks, work.weights, rescale, unit, o, run.head_dim,
                                  next_v);
  } else {
    tile_values<kKind, Source::kChain, NH>(v, n_rows, n_chunks, work.weights, rescale, unit, o,
                                           run.head_dim, next_v);
  }
}

template <Kind kKind>
void tile_queries(const DecodeRun& run, const Rows& k, const Rows& v, int32_t n, State& state,
                  Work& work, Prefetch next_k, Prefetch next_v) {
  int32_t head = 0;
  while (head < run.n_queries) {
    const int32_t left = run.n_queries - head;
    const Prefetch pk = head == 0 ? next_k : kNoPrefetch, pv = head == 0 ? next_v : kNoPrefetch;
    if (left >= 4) {
      tile_heads<kKind, 4>(run, k, v, n, head, state, work, pk, pv);
      head += 4;
    } else if (left >= 2) {
      tile_heads<kKind, 2>(run, k, v, n, head, state, work, pk, pv);
      head += 2;
    } else {
      tile_heads<kKind, 1>(run, k, v, n, head, state, work, pk, pv);
      head += 1;
    }
  }
}

Kind kind_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return Kind::kF32;
    case DType::kF16:
      return Kind::kF16;
    case DType::kBF16:
      return Kind::kBF16;
    default:
      return Kind::kInt;
  }
}

Rows slot_rows(const SlotLayout& layout, const uint8_t* slot, uint8_t* widened) {
  Rows rows;
  rows.kind = kind_of(layout.dtype);
  rows.masks = layout.dense ? nullptr : slot;
  rows.values = slot + layout.values_offset;
  rows.scales = reinterpret_cast<const uint16_t*>(slot + layout.scales_offset);
  rows.mask_bytes = layout.mask_words * 4;
  rows.row_bytes = layout.row_bytes;
  if (layout.dtype == DType::kInt4) {
    widen_int4(rows.values, kTileTokens * layout.row_bytes, widened);
    rows.values = widened;
    rows.row_bytes *= 2;
  }
  const int32_t value_bytes = layout.dtype == DType::kF32 ? 4 : rows.kind == Kind::kInt ? 1 : 2;
  rows.chunk_bytes = 32 / layout.group * layout.keep * value_bytes;
  rows.source = layout.dense                                   ? Source::kDense
                : layout.group <= 32 && 32 % layout.group == 0 ? Source::kRuns
                                                               : Source::kChain;
  return rows;
}

Rows dense_rows(const DecodeRun& run, const uint8_t* values, int32_t n, uint8_t* padded) {
  Rows rows;
  rows.kind = kind_of(run.tail_dtype);
  rows.source = Source::kDense;
  rows.masks = nullptr;
  rows.scales = nullptr;
  rows.values = values;
  rows.mask_bytes = rows.chunk_bytes = 0;
  rows.row_bytes = static_cast<int32_t>(dtype_bytes(run.tail_dtype, run.head_dim));
  if (n < kTileTokens) {
    const int32_t n_rows = (n + 15) / 16 * 16;
    __builtin_memcpy(padded, values, int64_t{n} * rows.row_bytes);
    __builtin_memset(padded + int64_t{n} * rows.row_bytes, 0, int64_t{n_rows - n} * rows.row_bytes);
    rows.values = padded;
  }
  return rows;
}

// K and V of a tile in memory, to be fetched ahead.
void next_lines(const DecodeRun& run, int32_t tile, Prefetch& k, Prefetch& v) {
  k = v = kNoPrefetch;
  if (tile >= run.first_tile + run.n_tiles) return;
  if (tile < run.sequence->n_blocks) {
    const uint8_t* page = run.sequence->pages[tile];
    k = {page + run.k_offset, run.sequence->layout->k.slot_bytes / 64, 0};
    v = {page + run.v_offset, run.sequence->layout->v.slot_bytes / 64, 0};
    return;
  }
  const DenseTile dense = dense_tile(run, tile);
  const int32_t lines =
      static_cast<int32_t>(dense.n * dtype_bytes(run.tail_dtype, run.head_dim) / 64);
  k = {dense.k, lines, 0};
  v = {dense.v, lines, 0};
}

// Adds a kind's partial softmax to the result, its dims back in their own order.
void merge_state(const DecodeRun& run, Kind kind, const State& state) {
  alignas(64) int32_t lane_of_dim[32];
  for (int32_t i = 0; i < 32; i++) lane_of_dim[dim_of_lane(kind, i)] = i;
  const __m512i first = _mm512_load_si512(lane_of_dim);
  const __m512i second = _mm512_load_si512(lane_of_dim + 16);
  for (int32_t h = 0; h < run.n_queries; h++) {
    const float max = state.max[h] > run.max[h] ? state.max[h] : run.max[h];
    const __m512 shift = _mm512_set1_ps(max == -__builtin_inff() ? 0.0f : max);
    const __m512 mine = exp2_ps(_mm512_sub_ps(_mm512_set1_ps(run.max[h]), shift));
    const __m512 other = exp2_ps(_mm512_sub_ps(_mm512_set1_ps(state.max[h]), shift));
    run.max[h] = max;
    run.sum[h] = run.sum[h] * _mm512_cvtss_f32(mine) + state.sum[h] * _mm512_cvtss_f32(other);
    float* o = run.o + int64_t{h} * run.head_dim;
    const float* part = state.o + int64_t{h} * run.head_dim;
    for (int32_t d = 0; d < run.head_dim; d += 32) {
      const __m512 a = _mm512_load_ps(part + d), b = _mm512_load_ps(part + d + 16);
      for (int i = 0; i < 2; i++) {
        const __m512 x = _mm512_permutex2var_ps(a, i == 0 ? first : second, b);
        float* out = o + d + 16 * i;
        _mm512_storeu_ps(out, _mm512_fmadd_ps(x, other, _mm512_mul_ps(_mm512_loadu_ps(out), mine)));
      }
    }
  }
}

void run_tiles(const DecodeRun& run) {
  const int32_t n_queries = run.n_queries, head_dim = run.head_dim;
  Work work;
  uint8_t* at = run.scratch;
  work.scores = reinterpret_cast<float*>(take(at, 4 * kTileTokens * 4));
  work.weights = take(at, 4 * kTileTokens * 4);
  for (uint8_t*& tile : work.tiles) tile = take(at, int64_t{kTileTokens} * head_dim * 4 + 64);
  for (State& state : work.states) {
    state.used = false;
    state.max = reinterpret_cast<float*>(take(at, n_queries * 4));
    state.sum = reinterpret_cast<float*>(take(at, n_queries * 4));
    state.q_unit = reinterpret_cast<float*>(take(at, n_queries * 4));
    state.q_error = reinterpret_cast<float*>(take(at, n_queries * 4));
    state.o = reinterpret_cast<float*>(take(at, int64_t{n_queries} * head_dim * 4));
    state.queries = take(at, int64_t{n_queries} * head_dim * 4);
  }

  for (int32_t tile = run.first_tile; tile < run.first_tile + run.n_tiles; tile++) {
    Rows k, v;
    int32_t n = kTileTokens;
    if (tile < run.sequence->n_blocks) {
      const uint8_t* page = run.sequence->pages[tile];
      k = slot_rows(run.sequence->layout->k, page + run.k_offset, work.tiles[0]);
      v = slot_rows(run.sequence->layout->v, page + run.v_offset, work.tiles[1]);
    } else {
      const DenseTile dense = dense_tile(run, tile);
      n = dense.n;
      k = dense_rows(run, dense.k, n, work.tiles[0]);
      v = dense_rows(run, dense.v, n, work.tiles[1]);
    }
    Prefetch next_k, next_v;
    next_lines(run, tile + 1, next_k, next_v);
    State& state = state_of(run, work, k.kind);
    switch (k.kind) {
      case Kind::kF32:
        tile_queries<Kind::kF32>(run, k, v, n, state, work, next_k, next_v);
        break;
      case Kind::kF16:
        tile_queries<Kind::kF16>(run, k, v, n, state, work, next_k, next_v);
        break;
      case Kind::kBF16:
        tile_queries<Kind::kBF16>(run, k, v, n, state, work, next_k, next_v);
        break;
      case Kind::kInt:
        tile_queries<Kind::kInt>(run, k, v, n, state, work, next_k, next_v);
        break;
    }
  }

  for (int32_t h = 0; h < n_queries; h++) {
    run.max[h] = -__builtin_inff();
    run.sum[h] = 0.0f;
  }
  __builtin_memset(run.o, 0, sizeof(float) * n_queries * head_dim);
  for (int kind = 0; kind < kKinds; kind++) {
    if (work.states[kind].used) merge_state(run, static_cast<Kind>(kind), work.states[kind]);
  }
}

}  // namespace
}  // namespace mustafar
