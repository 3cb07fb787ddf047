// What decode.cc asks of an instruction set's file: one run of tiles of one KV head.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "core/dtype.h"

namespace mustafar {

inline constexpr int32_t kTileTokens = kBlockTokens;

// A run of consecutive tiles of one sequence and KV head. Tiles are the store's blocks, then the
// dense buffer in pieces of 64 tokens, the last one partial.
struct DecodeRun {
  const SequenceStep* sequence = nullptr;
  int32_t n_queries = 0;  // query heads of the KV head
  int32_t head_dim = 0;
  DType tail_dtype = DType::kF32;
  int32_t first_tile = 0, n_tiles = 0;
  int32_t hidden_rows = 0;  // of the store's first block, that lie before the layer's window
  // Where the KV head's keys and values lie: of a page, the slots, their byte offsets, and the
  // tables of coded ones (all unset without pages); of the dense buffer, [dense_tokens][head_dim]
  // of the tail type.
  const SlotLayout *k_slot = nullptr, *v_slot = nullptr;
  int64_t k_offset = 0, v_offset = 0;
  CodeTable k_codes, v_codes;
  const uint8_t* k_dense = nullptr;
  const uint8_t* v_dense = nullptr;
  int32_t dense_tokens = 0;  // the new one included
  const float* q = nullptr;  // [n_queries][head_dim]
  float q_scale = 0.0f;      // log2(e) / sqrt(head_dim): scores are in units of log2
  // Rows of which much is pruned, or of few bits, differ from what they were by a tenth or so.
  // Beside that, queries and weights may be rounded to one byte where that is faster, a hundredth;
  // not if fine.
  bool fine = false;
  uint8_t* scratch = nullptr;  // decode_scratch_bytes(), aligned to 128; shared by a span

  // Out: the partial softmax. max [n_queries] in log2 units, sum [n_queries] of 2^(score - max),
  // o [n_queries][head_dim] of the values weighted so.
  float* max = nullptr;
  float* sum = nullptr;
  float* o = nullptr;
};

// Runs of the same tiles of one sequence, of neighbouring KV heads: their slots of a tile lie one
// after another in its page, and memory is fastest when it is read in that order.
using DecodeRuns = std::span<const DecodeRun>;
inline constexpr int32_t kMaxSpanHeads = 16;

// Bytes of scratch that any of the functions below needs for a span of KV heads: two tiles in f32
// and an expanded one, scores and weights; for each head the queries in up to four forms and as
// many partial softmaxes, in blocks of eight queries, and the tables of coded rows.
[[maybe_unused]] static inline int64_t decode_scratch_bytes(int32_t n_queries, int32_t head_dim,
                                                            int32_t span_heads) {
  const int64_t tile = int64_t{kTileTokens} * head_dim * 4 + 128;
  const int64_t queries = (int64_t{n_queries} + 7) / 8 * 8;
  const int64_t head = queries * (48 * head_dim + 128) + 40 * head_dim + 2048;
  return 3 * tile + int64_t{kTileTokens} * head_dim + span_heads * head + 64 * kTileTokens + 16384;
}

// Dense rows of a tile: [n][head_dim] of the tail type, keys and values.
struct DenseTile {
  const uint8_t* k;
  const uint8_t* v;
  int32_t n;  // tokens
};

[[maybe_unused]] static inline DenseTile dense_tile(const DecodeRun& run, int32_t tile) {
  const int32_t first = (tile - run.sequence->n_blocks) * kTileTokens;
  const int64_t at = first * dtype_bytes(run.tail_dtype, run.head_dim);
  const int32_t left = run.dense_tokens - first;
  return {run.k_dense + at, run.v_dense + at, left < kTileTokens ? left : kTileTokens};
}

// Which of a tile's n rows are attended to: bit t is row t.
[[maybe_unused]] static inline uint64_t seen_rows(const DecodeRun& run, int32_t tile, int32_t n) {
  const uint64_t rows = n < kTileTokens ? (uint64_t{1} << n) - 1 : ~uint64_t{0};
  return tile == 0 && run.sequence->n_blocks > 0 ? rows >> run.hidden_rows << run.hidden_rows
                                                 : rows;
}

// Whether a file below serves these rows: 32 dims at a time, 64 for integers.
[[maybe_unused]] static inline bool decode_serves(const DecodeRun& run) {
  if (run.head_dim % 32 != 0) return false;
  if (run.sequence->n_blocks == 0) return true;
  if (run.k_slot->ragged || run.v_slot->ragged) return false;
  return is_float(run.k_slot->dtype) || run.head_dim % 64 == 0;
}

[[maybe_unused]] static inline bool is_coded(const DecodeRun& run) {
  return run.sequence->n_blocks > 0 && run.k_slot->dtype == DType::kCoded;
}

// Serves every layout and type on every processor.
void decode_run_plain(const DecodeRun& run);

// These serve the rows for which decode_serves is true.
void decode_run_neon(const DecodeRun& run);
void decode_runs_avx2(DecodeRuns runs);
void decode_runs_avx512(DecodeRuns runs);
void decode_runs_avx512bf16(DecodeRuns runs);
void decode_runs_amx(DecodeRuns runs);

}  // namespace mustafar
