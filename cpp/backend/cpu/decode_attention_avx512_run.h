// Decode attention, AVX-512: runs of tiles. Queries are prepared once, then each tile goes through
// scores, softmax and values, with the next KV head's slots on their way from memory. Included by
// the files of the AVX-512 paths alone.
#pragma once

#include "backend/cpu/decode_attention_avx512_softmax.h"

namespace mustafar {
namespace {

constexpr int32_t kMaxBlocks = 64;  // beyond 256 queries per KV head, always two terms

// A partial softmax over the tiles of one kind, all queries of a KV head.
struct State {
  bool used;
  float* max;  // [n_queries]
  float* sum;
  float* o;          // [n_queries, to a multiple of 8][head_dim], dims in the kind's order
  uint8_t* queries;  // prepared, as the products want them
  float* q_unit;     // [n_queries] what a score of prepared queries is to be multiplied by
  float* q_error;    // [n_queries] |second bf16 term|^2 / |q|^2
  bool two_terms[kMaxBlocks];  // of every four query heads: what the last tile needed
};

struct Work {
  State states[kMaxSpanHeads][kKinds];
  float* scores;      // [8][64]
  uint8_t* weights;   // [8][64] of 2 or 4 bytes
  uint8_t* tiles[2];  // K and V: int4 widened, or partial tiles padded with zeros
  uint8_t* expanded;  // as large as a tile in f32 and 8 KiB more: rows, for products from memory
};

uint8_t* take(uint8_t*& at, int64_t bytes) {
  uint8_t* p = at;
  at += (bytes + 63) / 64 * 64;
  return p;
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
    const StoreLayout& layout = *run.sequence->layout;
    const uint8_t* page = run.sequence->pages[tile];
    return Prefetch(page + run.k_offset, layout.k.slot_bytes / 64, page + run.v_offset,
                    layout.v.slot_bytes / 64);
  }
  const DenseTile dense = dense_tile(run, tile);
  const int32_t lines =
      static_cast<int32_t>(dense.n * dtype_bytes(run.tail_dtype, run.head_dim) / 64);
  return Prefetch(dense.k, lines, dense.v, lines);
}

// Adds a kind's partial softmax to the result, its dims back in their own order.
template <class Products>
void merge_state(const DecodeRun& run, Kind kind, const State& state, float* in_order) {
  for (int32_t h = 0; h < run.n_queries; h++) {
    const float max = state.max[h] > run.max[h] ? state.max[h] : run.max[h];
    const __m512 shift = _mm512_set1_ps(max == -__builtin_inff() ? 0.0f : max);
    const __m512 mine = exp2_ps(_mm512_sub_ps(_mm512_set1_ps(run.max[h]), shift));
    const __m512 other = exp2_ps(_mm512_sub_ps(_mm512_set1_ps(state.max[h]), shift));
    run.max[h] = max;
    run.sum[h] = run.sum[h] * _mm512_cvtss_f32(mine) + state.sum[h] * _mm512_cvtss_f32(other);
    float* o = run.o + int64_t{h} * run.head_dim;
    Products::in_order(kind, state.o + int64_t{h} * run.head_dim, run.head_dim, in_order);
    for (int32_t d = 0; d < run.head_dim; d += 16) {
      const __m512 x = _mm512_load_ps(in_order + d);
      const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(o + d), mine);
      _mm512_storeu_ps(o + d, _mm512_fmadd_ps(x, other, old));
    }
  }
}

// Products are what a tile of one KV head is multiplied by: prepare(run, kind, state) before its
// first tile, then tile<kind>(run, k, v, n, state, next), and in_order(), which puts the dims of a
// row of State::o back in their own order.
template <class Products>
void run_tiles(DecodeRuns runs) {
  const DecodeRun& first = runs[0];
  const int32_t n_queries = first.n_queries, head_dim = first.head_dim;
  const int32_t n_rows = (n_queries + 7) / 8 * 8;
  Work work;
  uint8_t* at = first.scratch;
  work.scores = reinterpret_cast<float*>(take(at, 8 * kTileTokens * 4));
  work.weights = take(at, 8 * kTileTokens * 4);
  for (uint8_t*& tile : work.tiles) tile = take(at, int64_t{kTileTokens} * head_dim * 4 + 64);
  work.expanded = take(at, int64_t{kTileTokens} * head_dim * 4 + 8192);
  for (size_t i = 0; i < runs.size(); i++) {
    for (State& state : work.states[i]) {
      state.used = false;
      state.max = reinterpret_cast<float*>(take(at, n_queries * 4));
      state.sum = reinterpret_cast<float*>(take(at, n_queries * 4));
      state.q_unit = reinterpret_cast<float*>(take(at, n_queries * 4));
      state.q_error = reinterpret_cast<float*>(take(at, n_queries * 4));
      state.o = reinterpret_cast<float*>(take(at, int64_t{n_rows} * head_dim * 4));
      state.queries = take(at, int64_t{n_rows} * head_dim * 4);
    }
  }
  Products products(first, work);

  for (int32_t tile = first.first_tile; tile < first.first_tile + first.n_tiles; tile++) {
    for (size_t i = 0; i < runs.size(); i++) {
      const DecodeRun& run = runs[i];
      Rows k, v;
      int32_t n = kTileTokens;
      if (tile < run.sequence->n_blocks) {
        const uint8_t* page = run.sequence->pages[tile];
        k = slot_rows(run.sequence->layout->k, page + run.k_offset, work.tiles[0]);
        v = slot_rows(run.sequence->layout->v, page + run.v_offset, work.tiles[1]);
      } else {
        const DenseTile dense = dense_tile(run, tile);
        n = dense.n;
        k = dense_rows(run, dense.k, n, Products::kRowMultiple, work.tiles[0]);
        v = dense_rows(run, dense.v, n, Products::kRowMultiple, work.tiles[1]);
      }
      const bool last = i + 1 == runs.size();
      Prefetch next = last ? lines_of(first, tile + 1) : lines_of(runs[i + 1], tile);
      State& state = work.states[i][static_cast<int>(k.kind)];
      if (!state.used) {
        state.used = true;
        products.prepare(run, k.kind, state);
        for (int32_t h = 0; h < n_queries; h++) {
          state.max[h] = -__builtin_inff();
          state.sum[h] = 0.0f;
        }
        __builtin_memset(state.o, 0, sizeof(float) * n_rows * head_dim);
      }
      switch (k.kind) {
        case Kind::kF32:
          products.template tile<Kind::kF32>(run, k, v, n, state, next);
          break;
        case Kind::kF16:
          products.template tile<Kind::kF16>(run, k, v, n, state, next);
          break;
        case Kind::kBF16:
          products.template tile<Kind::kBF16>(run, k, v, n, state, next);
          break;
        case Kind::kInt:
          products.template tile<Kind::kInt>(run, k, v, n, state, next);
          break;
      }
    }
  }

  for (size_t i = 0; i < runs.size(); i++) {
    const DecodeRun& run = runs[i];
    for (int32_t h = 0; h < n_queries; h++) {
      run.max[h] = -__builtin_inff();
      run.sum[h] = 0.0f;
    }
    __builtin_memset(run.o, 0, sizeof(float) * n_queries * head_dim);
    for (int kind = 0; kind < kKinds; kind++) {
      const State& state = work.states[i][kind];
      if (state.used) {
        merge_state<Products>(run, static_cast<Kind>(kind), state,
                              reinterpret_cast<float*>(work.tiles[0]));
      }
    }
  }
}

}  // namespace
}  // namespace mustafar
