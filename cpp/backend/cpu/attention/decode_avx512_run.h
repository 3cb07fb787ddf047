// Decode attention, AVX-512: runs of tiles. Queries are prepared once, then each tile goes through
// scores, softmax and values, with the next KV head's slots on their way from memory. Included by
// the files of the AVX-512 paths alone.
#pragma once

#include "backend/cpu/attention/coded_avx512.h"
#include "backend/cpu/attention/decode_avx512_softmax.h"

namespace mustafar {
namespace {

constexpr int32_t kMaxBlocks = 64;  // beyond 256 queries per KV head, always two terms

// A partial softmax over the tiles of one kind, all queries of a KV head.
struct State {
  bool used;
  float* max;  // [n_queries]
  float* sum;
  float* o;           // [n_queries, to a multiple of 8][head_dim], dims in the kind's order
  uint8_t* queries;   // prepared, as the products want them
  float* q_unit;      // [n_queries] what a score of prepared queries is to be multiplied by
  float* q_error;     // [n_queries] |second bf16 term|^2 / |q|^2
  float* q_offset;    // [n_queries] what is added to a score before it is scaled: of coded keys
  float* weight_sum;  // [n_queries] of the values' weights times their scales: of ints
  // Of ints by dot products of bytes: what the biases of keys add to a score, [n_queries], and
  // those of values in the order of o, [head_dim].
  int32_t* k_bias;
  int32_t* v_bias;
  bool coarse_keys, coarse_values;  // queries, weights of one byte
  bool two_terms[kMaxBlocks];       // of every four query heads: what the last tile needed
};

// Of a KV head's coded rows: a value is (code + 1/2) * step * scale. So the steps of keys go into
// the queries, and those of values into the output.
struct CodedHead {
  CodeChunk* k;  // [head_dim / 64]
  CodeChunk* v;
  float* k_step;  // [head_dim]
  float* v_step;
};

struct Work {
  State states[kMaxSpanHeads][kKinds];
  CodedHead coded[kMaxSpanHeads] = {};
  float* scores;      // [8][64]
  uint8_t* weights;   // [8][64] of 2 or 4 bytes
  uint8_t* tiles[2];  // K and V: codes widened to bytes, or partial tiles padded with zeros
  uint8_t* expanded;  // as large as a tile in f32 and 8 KiB more: rows, for products from memory
};

// Codes of a chunk of 64 dims to columns [64 * c, 64 * c + 64) of out [64][head_dim].
template <bool kNarrow>
void widen_codes(const SlotLayout& layout, const CodeChunk& chunk, const uint8_t* values,
                 uint8_t* out) {
#pragma GCC unroll 4
  for (int32_t t = 0; t < kTileTokens; t++) {
    _mm512_store_si512(out + int64_t{t} * layout.head_dim,
                       unpack_codes<kNarrow>(chunk, values + int64_t{t} * layout.row_bytes));
  }
}

// Where the values of a slot are. kWiden: int4 that stores every value and coded rows become dense
// rows of bytes beforehand.
template <bool kWiden>
Source source_of(const SlotLayout& layout) {
  if (layout.dtype == DType::kCoded) return kWiden ? Source::kDense : Source::kCodes;
  if (layout.dense) {
    if (layout.dtype != DType::kInt4 || kWiden) return Source::kDense;
    return layout.head_dim % 128 == 0 ? Source::kNibbles2 : Source::kNibbles;
  }
  return layout.group <= 32 && 32 % layout.group == 0 ? Source::kRuns : Source::kChain;
}

// A tile of a slot. chunks: of coded rows, [head_dim / 64]; widened: room for a tile of bytes.
template <bool kWiden>
Rows slot_rows(const SlotLayout& layout, const CodeChunk* chunks, const uint8_t* slot,
               uint8_t* widened) {
  Rows rows;
  rows.kind = kind_of(layout.dtype);
  rows.source = source_of<kWiden>(layout);
  rows.masks = layout.dense ? nullptr : slot;
  rows.values = slot + layout.values_offset;
  rows.scales = reinterpret_cast<const uint16_t*>(slot + layout.scales_offset);
  rows.chunks = chunks;
  rows.mask_bytes = layout.mask_words * 4;
  rows.row_bytes = layout.row_bytes;
  if (layout.dtype == DType::kCoded && kWiden) {
    for (int32_t c = 0; c < layout.head_dim / 64; c++) {
      (chunks[c].narrow ? widen_codes<true> : widen_codes<false>)(layout, chunks[c], rows.values,
                                                                  widened + 64 * c);
    }
    rows.values = widened;
    rows.row_bytes = layout.head_dim;
  } else if (layout.dtype == DType::kInt4 && (kWiden || !layout.dense)) {
    widen_int4(rows.values, kTileTokens * layout.row_bytes, widened);
    rows.values = widened;
    rows.row_bytes *= 2;
  }
  const int32_t value_bytes = layout.dtype == DType::kF32 ? 4 : rows.kind == Kind::kInt ? 1 : 2;
  rows.chunk_bytes = layout.dense ? 0 : 32 / layout.group * layout.keep * value_bytes;
  return rows;
}

// n rows, padded with zeros to a multiple of `multiple`.
Rows dense_rows(const DecodeRun& run, const uint8_t* values, int32_t n, int32_t multiple,
                uint8_t* padded) {
  Rows rows;
  rows.kind = kind_of(run.tail_dtype);
  rows.source = Source::kDense;
  rows.masks = nullptr;
  rows.scales = nullptr;
  rows.values = values;
  rows.mask_bytes = rows.chunk_bytes = 0;
  rows.row_bytes = static_cast<int32_t>(dtype_bytes(run.tail_dtype, run.head_dim));
  if (n < kTileTokens) {
    const int32_t n_rows = (n + multiple - 1) / multiple * multiple;
    __builtin_memcpy(padded, values, int64_t{n} * rows.row_bytes);
    __builtin_memset(padded + int64_t{n} * rows.row_bytes, 0, int64_t{n_rows - n} * rows.row_bytes);
    rows.values = padded;
  }
  return rows;
}

// K and V of a tile in memory, to be fetched ahead.
Prefetch lines_of(const DecodeRun& run, int32_t tile) {
  if (tile >= run.first_tile + run.n_tiles) return kNoPrefetch;
  if (tile < run.sequence->n_blocks) {
    const uint8_t* page = run.sequence->pages[tile];
    return Prefetch(page + run.k_offset, run.k_slot->slot_bytes / 64, page + run.v_offset,
                    run.v_slot->slot_bytes / 64);
  }
  const DenseTile dense = dense_tile(run, tile);
  const int32_t lines =
      static_cast<int32_t>(dense.n * dtype_bytes(run.tail_dtype, run.head_dim) / 64);
  return Prefetch(dense.k, lines, dense.v, lines);
}

// Adds a kind's partial softmax to the result, its dims back in their own order. v_step: of coded
// values, else null.
template <class Products>
void merge_state(const DecodeRun& run, Kind kind, const State& state, const float* v_step,
                 float* in_order) {
  for (int32_t h = 0; h < run.n_queries; h++) {
    const float max = state.max[h] > run.max[h] ? state.max[h] : run.max[h];
    const __m512 shift = _mm512_set1_ps(max == -__builtin_inff() ? 0.0f : max);
    const __m512 mine = exp2_ps(_mm512_sub_ps(_mm512_set1_ps(run.max[h]), shift));
    const __m512 other = exp2_ps(_mm512_sub_ps(_mm512_set1_ps(state.max[h]), shift));
    run.max[h] = max;
    run.sum[h] = run.sum[h] * _mm512_cvtss_f32(mine) + state.sum[h] * _mm512_cvtss_f32(other);
    const __m512 half_step = _mm512_set1_ps(0.5f * state.weight_sum[h]);
    float* o = run.o + int64_t{h} * run.head_dim;
    Products::in_order(run, kind, state.o + int64_t{h} * run.head_dim, in_order);
    for (int32_t d = 0; d < run.head_dim; d += 16) {
      __m512 x = _mm512_load_ps(in_order + d);
      if (v_step != nullptr) {
        x = _mm512_mul_ps(_mm512_add_ps(x, half_step), _mm512_load_ps(v_step + d));
      }
      const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(o + d), mine);
      _mm512_storeu_ps(o + d, _mm512_fmadd_ps(x, other, old));
    }
  }
}

// code_steps, sixteen dims at a time.
inline void code_steps_avx512(const CodeTable& table, int32_t head_dim, float* out) {
  alignas(64) float of_width[16] = {};
  for (int32_t width = 0; width <= kMaxWidth; width++) of_width[width] = coded_step(width);
  const __m512 steps = _mm512_load_ps(of_width);
  for (int32_t d = 0; d < head_dim; d += 16) {
    const __m128i widths = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.widths + d));
    const __m512 step = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(widths), steps);
    _mm512_store_ps(out + d, _mm512_mul_ps(step, _mm512_loadu_ps(table.sigmas + d)));
  }
}

CodedHead make_coded(const DecodeRun& run, uint8_t*& at) {
  const int32_t n_chunks = run.head_dim / 64;
  CodedHead head;
  head.k = take<CodeChunk>(at, n_chunks);
  head.v = take<CodeChunk>(at, n_chunks);
  head.k_step = take<float>(at, run.head_dim);
  head.v_step = take<float>(at, run.head_dim);
  for (const bool is_key : {true, false}) {
    const CodeTable& table = is_key ? run.k_codes : run.v_codes;
    for (int32_t c = 0; c < n_chunks; c++) {
      make_chunk(table.widths, c, (is_key ? head.k : head.v)[c]);
    }
    code_steps_avx512(table, run.head_dim, is_key ? head.k_step : head.v_step);
  }
  return head;
}

// The run with its queries times the steps of keys, and the states' offsets of scores. queries:
// scratch [n_queries][head_dim].
DecodeRun with_steps(const DecodeRun& run, const CodedHead& coded, float* queries, State& state) {
  for (int32_t h = 0; h < run.n_queries; h++) {
    const float* q = run.q + int64_t{h} * run.head_dim;
    float* out = queries + int64_t{h} * run.head_dim;
    __m512 sum = _mm512_setzero_ps();
    for (int32_t d = 0; d < run.head_dim; d += 16) {
      const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(q + d), _mm512_load_ps(coded.k_step + d));
      _mm512_store_ps(out + d, x);
      sum = _mm512_add_ps(sum, x);
    }
    state.q_offset[h] = 0.5f * run.q_scale * _mm512_reduce_add_ps(sum);
  }
  DecodeRun scaled = run;
  scaled.q = queries;
  return scaled;
}

// Products are what a tile of one KV head is multiplied by: prepare(run, k, v, state) before its
// first tile, then tile<kind>(run, k, v, n, seen, state, next), where bit t of `seen` says whether
// row t is attended to, and in_order(), which puts the dims of a row of State::o back in their own
// order. kWiden: see slot_rows.
template <class Products>
void run_tiles(DecodeRuns runs) {
  const DecodeRun& first = runs[0];
  const int32_t n_queries = first.n_queries, head_dim = first.head_dim;
  const int32_t n_rows = (n_queries + 7) / 8 * 8;
  Work work;
  uint8_t* at = first.scratch;
  work.scores = take<float>(at, 8 * kTileTokens);
  work.weights = take<uint8_t>(at, 8 * kTileTokens * 4);
  for (uint8_t*& tile : work.tiles)
    tile = take<uint8_t>(at, int64_t{kTileTokens} * head_dim * 4 + 64);
  work.expanded = take<uint8_t>(at, int64_t{kTileTokens} * head_dim * 4 + 8192);
  for (size_t i = 0; i < runs.size(); i++) {
    for (State& state : work.states[i]) {
      state.used = false;
      state.max = take<float>(at, n_queries);
      state.sum = take<float>(at, n_queries);
      state.q_unit = take<float>(at, n_queries);
      state.q_error = take<float>(at, n_queries);
      state.q_offset = take<float>(at, n_queries);
      state.weight_sum = take<float>(at, n_queries);
      state.k_bias = take<int32_t>(at, n_queries);
      state.v_bias = take<int32_t>(at, head_dim);
      state.o = take<float>(at, int64_t{n_rows} * head_dim);
      state.queries = take<uint8_t>(at, int64_t{n_rows} * head_dim * 8);
    }
  }
  const bool coded = is_coded(first);
  if (coded) {
    for (size_t i = 0; i < runs.size(); i++) work.coded[i] = make_coded(runs[i], at);
  }
  Products products(first, work);

  for (int32_t tile = first.first_tile; tile < first.first_tile + first.n_tiles; tile++) {
    for (size_t i = 0; i < runs.size(); i++) {
      const DecodeRun& run = runs[i];
      Rows k, v;
      int32_t n = kTileTokens;
      if (tile < run.sequence->n_blocks) {
        const uint8_t* page = run.sequence->pages[tile];
        const CodedHead& codes = work.coded[i];
        k = slot_rows<Products::kWiden>(*run.k_slot, codes.k, page + run.k_offset, work.tiles[0]);
        v = slot_rows<Products::kWiden>(*run.v_slot, codes.v, page + run.v_offset, work.tiles[1]);
      } else {
        const DenseTile dense = dense_tile(run, tile);
        n = dense.n;
        k = dense_rows(run, dense.k, n, Products::kRowMultiple, work.tiles[0]);
        v = dense_rows(run, dense.v, n, Products::kRowMultiple, work.tiles[1]);
      }
      const uint64_t seen = seen_rows(run, tile, n);
      const bool last = i + 1 == runs.size();
      Prefetch next = last ? lines_of(first, tile + 1) : lines_of(runs[i + 1], tile);
      State& state = work.states[i][static_cast<int>(k.kind)];
      if (!state.used) {
        state.used = true;
        for (int32_t h = 0; h < n_queries; h++) state.q_offset[h] = state.weight_sum[h] = 0.0f;
        if (coded && k.kind == Kind::kInt) {
          // The output's place is free until the first tile.
          products.prepare(with_steps(run, work.coded[i], state.o, state), k, v, state);
        } else {
          products.prepare(run, k, v, state);
        }
        clear_softmax(n_queries, state.max, state.sum);
        __builtin_memset(state.o, 0, sizeof(float) * n_rows * head_dim);
      }
      with_kind(k.kind, [&]<Kind kKind>() {
        products.template tile<kKind>(run, k, v, n, seen, state, next);
      });
    }
  }

  for (size_t i = 0; i < runs.size(); i++) {
    const DecodeRun& run = runs[i];
    clear_softmax(n_queries, run.max, run.sum);
    __builtin_memset(run.o, 0, sizeof(float) * n_queries * head_dim);
    for (int kind = 0; kind < kKinds; kind++) {
      const State& state = work.states[i][kind];
      if (state.used) {
        const bool ints = static_cast<Kind>(kind) == Kind::kInt;
        merge_state<Products>(run, static_cast<Kind>(kind), state,
                              coded && ints ? work.coded[i].v_step : nullptr,
                              reinterpret_cast<float*>(work.tiles[0]));
      }
    }
  }
}

}  // namespace
}  // namespace mustafar
