// Decode attention, AVX-512: a tile of one KV head by FMA and dot products, query heads in fours.
// Included by the files of the AVX-512 paths alone.
#pragma once

#include "backend/cpu/attention/decode_avx512_ints.h"
#include "backend/cpu/attention/decode_avx512_run.h"
#include "backend/cpu/attention/decode_avx512_tiles.h"

namespace mustafar {
namespace {

// A tile's scores may leave out the second bf16 term of the queries while the mean square error
// that this adds to the output, relative, stays below this.
constexpr float kOneTermError = 5e-6f;

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

// The unit of a query's codes, up to top_code, and its inverse. unit is NaN where the query is not
// finite.
struct IntScale {
  float unit, inverse;
};
inline IntScale int_scale(const float* q, int32_t head_dim, float top_code = kTopCode) {
  __m512 absmax = _mm512_setzero_ps(), probe = absmax;  // a NaN or Inf makes probe NaN
  for (int32_t d = 0; d < head_dim; d += 16) {
    const __m512 x = _mm512_loadu_ps(q + d);
    absmax = _mm512_max_ps(absmax, _mm512_abs_ps(x));
    probe = _mm512_fmadd_ps(x, _mm512_setzero_ps(), probe);
  }
  const float top = _mm512_reduce_max_ps(absmax);
  return {top / top_code + _mm512_reduce_add_ps(probe), top > 0 ? top_code / top : 0.0f};
}

// Codes of 64 dims of a query, two bytes each, of which the low one is all of codes up to 127.
inline void query_codes(const float* q, float inverse, uint8_t* high, uint8_t* low) {
  for (int32_t i = 0; i < 64; i += 16) {
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(q + i), _mm512_set1_ps(inverse));
    store_bytes(_mm512_cvtps_epi32(x), high + i, low + i);
  }
}

// For int_scores and int_values: queries in the order of the keys' bytes, and what biases add.
// codes: scratch for two queries' bytes.
void prepare_ints(const DecodeRun& run, const Rows& k, const Rows& v, State& state,
                  uint8_t* codes) {
  const int32_t n_chunks = run.head_dim / 64;
  state.coarse_keys = !run.fine && is_coarse(*run.k_slot);
  state.coarse_values = !run.fine && is_coarse(*run.v_slot);
  uint8_t* const low = codes + run.head_dim;
  for (int32_t h = 0; h < run.n_queries; h++) {
    const float* q = run.q + int64_t{h} * run.head_dim;
    const IntScale scale = int_scale(q, run.head_dim, state.coarse_keys ? 127.0f : kTopCode);
    state.q_unit[h] = scale.unit * run.q_scale;
    __m512i bias_high = _mm512_setzero_si512(), bias_low = bias_high;
    for (int32_t c = 0; c < n_chunks; c++) {
      query_codes(q + 64 * c, scale.inverse, codes + 64 * c, low + 64 * c);
      const __m512i bias = code_bias<true>(k, c);
      bias_high = dot_bytes(bias_high, bias, _mm512_load_si512(codes + 64 * c));
      bias_low = dot_bytes(bias_low, bias, _mm512_load_si512(low + 64 * c));
    }
    order_query(k.source, n_chunks, codes);
    order_query(k.source, n_chunks, low);
    for (int32_t c = 0; c < n_chunks; c++) {
      uint8_t* out = state.queries + (int64_t{h} * n_chunks + c) * 512;
      // By one byte that is the low one.
      const uint8_t* first = state.coarse_keys ? low : codes;
      store_lanes(_mm512_load_si512(first + 64 * c), out);
      store_lanes(_mm512_load_si512(low + 64 * c), out + 256);
    }
    if (!state.coarse_keys) {
      bias_low = _mm512_add_epi32(_mm512_slli_epi32(bias_high, 8), bias_low);
    }
    state.k_bias[h] = _mm512_reduce_add_epi32(bias_low);
  }
  store_value_bias(v, n_chunks, state.v_bias);
}

void prepare_queries(const DecodeRun& run, Kind kind, State& state) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int32_t h = 0; h < run.n_queries; h++) {
    const float* q = run.q + int64_t{h} * run.head_dim;
    uint8_t* out = state.queries + int64_t{h} * (run.head_dim / 32) * query_bytes(kind);
    const __m512 scale = _mm512_set1_ps(run.q_scale);
    state.q_unit[h] = 1.0f;
    __m512 power = _mm512_setzero_ps(), low_power = power;
    for (int32_t d = 0; d < run.head_dim; d += 32) {
      const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(q + d), scale);
      const __m512 b = _mm512_mul_ps(_mm512_loadu_ps(q + d + 16), scale);
      if (takes_pairs(kind)) {
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
    if (takes_pairs(kind)) {
      const float all = _mm512_reduce_add_ps(power);
      state.q_error[h] = all > 0 ? _mm512_reduce_add_ps(low_power) / all : 0.0f;
    }
  }
  for (bool& two_terms : state.two_terms) two_terms = false;
}

// Whether the second bf16 term of a head's query matters to a tile, by its scores from the first:
// the error of a score is about |second| / |q| of the scores' root mean square, and it weighs as
// the tile's weights do against the largest so far.
bool needs_second_term(uint64_t seen, const float* scores, float q_error, float running_max) {
  __m512 squares = _mm512_setzero_ps(), top = _mm512_set1_ps(-__builtin_inff());
  const int32_t n = __builtin_popcountll(seen);
  for (int32_t i = 0; i < kTileTokens; i += 16) {
    const __mmask16 valid = static_cast<__mmask16>(seen >> i);
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
               Prefetch& prefetch) {
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

// One tile of integer rows for NH query heads from `head` on.
template <int NH>
void int_heads(const DecodeRun& run, const Rows& k, const Rows& v, uint64_t seen, int32_t head,
               State& state, Work& work, Prefetch& next) {
  const int32_t n_chunks = run.head_dim / 64;
  const uint8_t* q = state.queries + int64_t{head} * n_chunks * 512;
  const int32_t* bias = state.k_bias + head;
  float* o = state.o + int64_t{head} * run.head_dim;
  IntWeights<NH> weights;
  const auto values = [&]<int kTerms>() {
    int_softmax<NH, kTerms>(k, v, seen, state.q_unit + head, state.q_offset + head, work.scores,
                            work.weights, state.max + head, state.sum + head,
                            state.weight_sum + head, weights);
    with_int_source(v.source, [&]<Source kSource>() {
      int_values<kSource, NH, kTerms>(v, n_chunks, work.weights, weights, state.v_bias, o,
                                      run.head_dim, next);
    });
  };
  with_int_source(k.source, [&]<Source kSource>() {
    if (state.coarse_keys) {
      int_scores<kSource, NH, 1>(k, n_chunks, q, bias, work.scores, next);
    } else {
      int_scores<kSource, NH, 2>(k, n_chunks, q, bias, work.scores, next);
    }
  });
  if (state.coarse_values) {
    values.template operator()<1>();
  } else {
    values.template operator()<2>();
  }
}

// One tile of float rows for NH query heads from `head` on.
template <Kind kKind, int NH>
void tile_heads(const DecodeRun& run, const Rows& k, const Rows& v, int32_t n, uint64_t seen,
                int32_t head, State& state, Work& work, Prefetch& next) {
  const int32_t n_chunks = run.head_dim / 32;
  const int32_t n_rows = (n + 15) / 16 * 16;
  const uint8_t* q = state.queries + int64_t{head} * n_chunks * query_bytes(kKind);
  // f32 rows have no constant runs: 16 dims at a time.
  constexpr Source kRuns = kKind == Kind::kF32 ? Source::kChain : Source::kRuns;
  next.spread(score_steps<NH>(k.source, n_rows, n_chunks) +
              value_steps<NH>(v.source, n_rows, n_chunks));
  if constexpr (kKind == Kind::kBF16 && takes_pairs(kKind)) {
    // Numbers the groups of heads: fours, then at most a two and a one.
    const int32_t block = head / 4 + (head % 4 != 0);
    const bool remembers = block + 1 < kMaxBlocks;
    const bool two_terms = !remembers || state.two_terms[block];
    if (two_terms) {
      scores_of<kKind, NH, true>(k, n_rows, n_chunks, q, work.scores, next);
    } else {
      scores_of<kKind, NH, false>(k, n_rows, n_chunks, q, work.scores, next);
    }
    bool needed = false;
    for (int h = 0; h < NH && remembers; h++) {
      needed |= needs_second_term(seen, work.scores + h * kTileTokens, state.q_error[head + h],
                                  state.max[head + h]);
    }
    if (needed && !two_terms) {
      Prefetch none = kNoPrefetch;
      scores_of<kKind, NH, true>(k, n_rows, n_chunks, q, work.scores, none);
    }
    if (remembers) state.two_terms[block] = needed;
  } else {
    scores_of<kKind, NH, true>(k, n_rows, n_chunks, q, work.scores, next);
  }
  constexpr int64_t kWeightBytes = kTileTokens * (takes_pairs(kKind) ? 2 : 4);
  constexpr Codes kCodes = takes_pairs(kKind) ? Codes::kBf16 : Codes::kFloats;
  float rescale[NH], unit;
  int32_t code_sum;
  for (int h = 0; h < NH; h++) {
    rescale[h] = tile_softmax<kKind, kCodes>(
        k, v, seen, state.q_unit[head + h], work.scores + h * kTileTokens,
        work.weights + h * kWeightBytes, state.max[head + h], state.sum[head + h], unit,
        state.q_offset[head + h], code_sum, state.weight_sum[head + h]);
  }
  float* o = state.o + int64_t{head} * run.head_dim;
  if (v.source == Source::kDense) {
    tile_values<kKind, Source::kDense, NH>(v, n_rows, n_chunks, work.weights, rescale, o,
                                           run.head_dim, next);
  } else if (v.source == kRuns) {
    tile_values<kKind, kRuns, NH>(v, n_rows, n_chunks, work.weights, rescale, o, run.head_dim,
                                  next);
  } else {
    tile_values<kKind, Source::kChain, NH>(v, n_rows, n_chunks, work.weights, rescale, o,
                                           run.head_dim, next);
  }
  next.rest();
}

// The products of run_tiles (decode_avx512_run.h).
class FmaProducts {
 public:
  static constexpr int32_t kRowMultiple = 16;
  static constexpr bool kWiden = false;

  FmaProducts(const DecodeRun&, Work& work) : work_(work) {}

  void prepare(const DecodeRun& run, const Rows& k, const Rows& v, State& state) {
    if (k.kind == Kind::kInt) {
      prepare_ints(run, k, v, state, work_.expanded);
    } else {
      prepare_queries(run, k.kind, state);
    }
  }

  template <Kind kKind>
  void tile(const DecodeRun& run, const Rows& k, const Rows& v, int32_t n, uint64_t seen,
            State& state, Prefetch& next) {
    Prefetch none = kNoPrefetch;
    if constexpr (kKind == Kind::kInt) {
      const int32_t n_chunks = run.head_dim / 64;
      next.keep_off_first_level();
      next.spread(int_steps(k.source, state.coarse_values ? 1 : 2, n_chunks));
      for_query_groups(run.n_queries, [&]<int NH>(int32_t head) {
        int_heads<NH>(run, k, v, seen, head, state, work_, head == 0 ? next : none);
      });
      next.rest();
    } else {
      for_query_groups(run.n_queries, [&]<int NH>(int32_t head) {
        tile_heads<kKind, NH>(run, k, v, n, seen, head, state, work_, head == 0 ? next : none);
      });
    }
  }

  static void in_order(const DecodeRun& run, Kind kind, const float* o, float* out) {
    if (kind != Kind::kInt) return permute_chunks(kind, o, run.head_dim, out);
    sums_in_order(source_of<kWiden>(*run.v_slot), o, run.head_dim, out);
  }

 private:
  Work& work_;
};

}  // namespace
}  // namespace mustafar
