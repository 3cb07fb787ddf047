// Decode attention for AMX: rows of bf16 and of integers go through tile registers, others through
// FMA.
#include <algorithm>

#include "backend/cpu/attention/decode_amx_tiles.h"
#include "backend/cpu/attention/decode_avx512_heads.h"

namespace mustafar {
namespace {

// The products of run_tiles (decode_avx512_run.h). kHeads: query heads of a block.
template <int kHeads>
class AmxProducts {
 public:
  static constexpr int32_t kRowMultiple = kTileTokens;
  static constexpr bool kWiden = true;

  AmxProducts(const DecodeRun& run, Work& work) : work_(work), fma_(run, work) {}
  ~AmxProducts() {
    if (configured_ >= 0) release_amx();
  }
  AmxProducts(const AmxProducts&) = delete;
  AmxProducts& operator=(const AmxProducts&) = delete;

  void prepare(const DecodeRun& run, const Rows& k, const Rows& v, State& state) {
    const Kind kind = k.kind;
    if (!takes(kind)) return fma_.prepare(run, k, v, state);
    for (int32_t block = 0; block * kHeads < run.n_queries; block++) {
      prepare_block(run, kind, block * kHeads, state);
    }
  }

  template <Kind kKind>
  void tile(const DecodeRun& run, const Rows& k, const Rows& v, int32_t n, uint64_t seen,
            State& state, Prefetch& next) {
    if constexpr (!takes(kKind)) {
      fma_.tile<kKind>(run, k, v, n, seen, state, next);
    } else {
      if (configured_ != static_cast<int>(kKind)) {
        configure_shapes<kKind, kHeads>();
        configured_ = static_cast<int>(kKind);
      }
      Prefetch none = kNoPrefetch;
      for (int32_t head = 0; head < run.n_queries; head += kHeads) {
        block<kKind>(run, k, v, seen, head, state, head == 0 ? next : none);
      }
    }
  }

  static void in_order(const DecodeRun& run, Kind kind, const float* o, float* out) {
    if (kind == Kind::kBF16) {
      pairs_in_order(o, run.head_dim, out);
    } else if (kind == Kind::kInt) {
      quads_in_order(o, run.head_dim, out);
    } else {
      FmaProducts::in_order(run, kind, o, out);
    }
  }

 private:
  static constexpr bool takes(Kind kind) { return kind == Kind::kBF16 || kind == Kind::kInt; }

  // Queries [first, first + kHeads), fewer at the end, as columns of tiles.
  static void prepare_block(const DecodeRun& run, Kind kind, int32_t first, State& state) {
    const int64_t block_bytes = amx_query_bytes<kHeads>(kind, run.head_dim);
    uint8_t* out = state.queries + first / kHeads * block_bytes;
    __builtin_memset(out, 0, block_bytes);
    for (int32_t h = 0; h < kHeads && first + h < run.n_queries; h++) {
      const float* q = run.q + int64_t{first + h} * run.head_dim;
      if (kind == Kind::kBF16) {
        state.q_unit[first + h] = 1.0f;
        prepare_bf16(q, run.head_dim, run.q_scale, h, out);
      } else {
        state.q_unit[first + h] = prepare_int(q, run.head_dim, h, out) * run.q_scale;
      }
    }
  }

  // 16 dwords into the rows of a tile, at columns h (high) or kHeads + h (low).
  static void store_column(__m512i dwords, int32_t column, uint8_t* tile) {
    const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_i32scatter_epi32(tile + 4 * column, _mm512_mullo_epi32(row, _mm512_set1_epi32(kHeads)),
                            dwords, 8);
  }

  static void prepare_bf16(const float* q, int32_t head_dim, float q_scale, int32_t h,
                           uint8_t* out) {
    alignas(64) uint8_t words[64];
    const __m512 scale = _mm512_set1_ps(q_scale);
    for (int32_t d = 0; d < head_dim; d += 32, out += 16 * 8 * kHeads) {
      const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(q + d), scale);
      const __m512 b = _mm512_mul_ps(_mm512_loadu_ps(q + d + 16), scale);
      const __m512 high_a = rounded_bf16(a), high_b = rounded_bf16(b);
      store_bf16(words, high_a);
      store_bf16(words + 32, high_b);
      store_column(_mm512_load_si512(words), h, out);
      store_bf16(words, rounded_bf16(_mm512_sub_ps(a, high_a)));
      store_bf16(words + 32, rounded_bf16(_mm512_sub_ps(b, high_b)));
      store_column(_mm512_load_si512(words), kHeads + h, out);
    }
  }

  // Query h as 16-bit codes, two bytes each. Returns their unit, NaN where the query is not finite.
  static float prepare_int(const float* q, int32_t head_dim, int32_t h, uint8_t* out) {
    const IntScale scale = int_scale(q, head_dim);
    alignas(64) uint8_t high[64], low[64];
    for (int32_t d = 0; d < head_dim; d += 64, out += 16 * 8 * kHeads) {
      query_codes(q + d, scale.inverse, high, low);
      store_column(_mm512_load_si512(high), h, out);
      store_column(_mm512_load_si512(low), kHeads + h, out);
    }
    return scale.unit;
  }

  // A block of queries of one tile.
  template <Kind kKind>
  void block(const DecodeRun& run, const Rows& k, const Rows& v, uint64_t seen, int32_t head,
             State& state, Prefetch& next) {
    constexpr bool kInts = kKind == Kind::kInt;
    const int32_t head_dim = run.head_dim;
    const int32_t n_heads = std::min(run.n_queries - head, kHeads);
    const int32_t steps = kTileTokens / 2 * head_dim / row_dims(kKind);
    next.spread(k.source == Source::kDense ? steps : kTileTokens + steps);

    const uint8_t* q = state.queries + head / kHeads * amx_query_bytes<kHeads>(kKind, head_dim);
    of_source<kKind>(k, [&]<Source kSource>() {
      amx_scores<kKind, kSource, kHeads>(k, head_dim, q, work_.expanded, work_.scores, next);
    });
    float rescale[kHeads], unit[kHeads];
    int32_t code_sum;
    float* o = state.o + int64_t{head} * head_dim;
    for (int32_t h = 0; h < n_heads; h++) {
      rescale[h] = tile_softmax<kKind, kInts ? Codes::kBytes : Codes::kBf16>(
          k, v, seen, state.q_unit[head + h], work_.scores + h * kTileTokens,
          work_.weights + h * kTileTokens * (kInts ? 1 : 2), state.max[head + h],
          state.sum[head + h], unit[h], state.q_offset[head + h], code_sum,
          state.weight_sum[head + h], kHeads * kTileTokens);
      if (!kInts && rescale[h] != 1.0f) {
        float* row = o + int64_t{h} * head_dim;
        for (int32_t d = 0; d < head_dim; d += 16) {
          _mm512_store_ps(row + d,
                          _mm512_mul_ps(_mm512_load_ps(row + d), _mm512_set1_ps(rescale[h])));
        }
      }
    }
    of_source<kKind>(v, [&]<Source kSource>() {
      amx_values<kKind, kSource, kHeads>(v, head_dim, work_.weights, n_heads, rescale, unit,
                                         work_.expanded, o, next);
    });
    next.rest();
  }

  // Calls a template for where the rows' values are, by how many bytes are expanded at a time.
  template <Kind kKind, class Call>
  static void of_source(const Rows& rows, Call call) {
    const int32_t bytes = rows.chunk_bytes * row_dims(kKind) / 32;
    if (rows.source == Source::kDense) {
      call.template operator()<Source::kDense>();
    } else if (rows.source == Source::kChain) {
      call.template operator()<Source::kChain>();
    } else if (bytes <= 16) {
      call.template operator()<Source::kRuns16>();
    } else if (bytes <= 32) {
      call.template operator()<Source::kRuns32>();
    } else {
      call.template operator()<Source::kRuns>();
    }
  }

  static void pairs_in_order(const float* o, int32_t head_dim, float* out) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int32_t d = 0; d < head_dim; d += 32) {
      const __m512 even = _mm512_load_ps(o + d), odd = _mm512_load_ps(o + d + 16);
      _mm512_store_ps(out + d, _mm512_permutex2var_ps(even, first, odd));
      _mm512_store_ps(out + d + 16, _mm512_permutex2var_ps(even, second, odd));
    }
  }

  static void quads_in_order(const float* o, int32_t head_dim, float* out) {
    for (int32_t d = 0; d < head_dim; d += 64) {
      const __m512 even0 = _mm512_load_ps(o + d), even1 = _mm512_load_ps(o + d + 16);
      const __m512 odd0 = _mm512_load_ps(o + d + 32), odd1 = _mm512_load_ps(o + d + 48);
      // Lane i of 128 bits: dims 16 * i on, four each.
      const __m512 a = _mm512_unpacklo_ps(even0, odd0), b = _mm512_unpackhi_ps(even0, odd0);
      const __m512 c = _mm512_unpacklo_ps(even1, odd1), e = _mm512_unpackhi_ps(even1, odd1);
      const __m512 ab0 = _mm512_shuffle_f32x4(a, b, 0x44), ab1 = _mm512_shuffle_f32x4(a, b, 0xee);
      const __m512 ce0 = _mm512_shuffle_f32x4(c, e, 0x44), ce1 = _mm512_shuffle_f32x4(c, e, 0xee);
      _mm512_store_ps(out + d, _mm512_shuffle_f32x4(ab0, ce0, 0x88));
      _mm512_store_ps(out + d + 16, _mm512_shuffle_f32x4(ab0, ce0, 0xdd));
      _mm512_store_ps(out + d + 32, _mm512_shuffle_f32x4(ab1, ce1, 0x88));
      _mm512_store_ps(out + d + 48, _mm512_shuffle_f32x4(ab1, ce1, 0xdd));
    }
  }

  Work& work_;
  FmaProducts fma_;
  int configured_ = -1;  // the Kind that the tile registers are shaped for
};

}  // namespace

void decode_runs_amx(DecodeRuns runs) {
  const DecodeRun& run = runs[0];
  const bool dense = run.sequence->n_blocks == 0 ||
                     (run.sequence->layout->k.dense && run.sequence->layout->v.dense);
  // For few queries dense rows are bound by memory, which FMAs read more evenly than tile products
  // do. Coded rows of 64 dims are bound by arithmetic; at 128 dims FMAs were measured to be a sixth
  // faster for four queries.
  const bool by_fma = dense && run.n_queries <= 4 && (!is_coded(run) || run.head_dim >= 128);
  // Beyond 512 dims sums of ints, up to 127 * 32512 a dim, could reach 2^31.
  if (by_fma || run.head_dim > 512) {
    run_tiles<FmaProducts>(runs);
  } else if (run.n_queries <= 4) {
    run_tiles<AmxProducts<4>>(runs);
  } else {
    run_tiles<AmxProducts<8>>(runs);
  }
}

}  // namespace mustafar
