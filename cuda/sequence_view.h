// What kernels see of a sequence: the device's form of backend.h's SequenceStep and CommitStep.
// PODs in arrays on the device, written once per step, so that a recorded step replays unpatched.
#pragma once

#include <cstdint>

#include "format/block_format.h"
#include "format/coded.h"

namespace mustafar::cuda {

struct SequenceView {
  int32_t row0 = 0, n_rows = 0, pos0 = 0;  // this call's rows

  const uint8_t* const* pages = nullptr;  // [n_blocks], oldest first
  uint8_t* dense = nullptr;  // [n_layers][2 (K, V)][n_kv_heads][dense_capacity][D], tail dtype
  uint8_t* fresh = nullptr;  // [2 (K, V)][n_kv_heads][fresh_capacity][D], or null in decode
  int32_t n_blocks = 0;
  int32_t dense_capacity = 0, dense_tokens = 0, n_sinks = 0;
  int32_t fresh_capacity = 0, fresh_pos0 = 0;

  // KV transform, [n_layers][n_kv_heads][D][D] each, or null.
  const float* k_forward = nullptr;
  const float* k_backward = nullptr;
  const float* v_forward = nullptr;
  const float* v_backward = nullptr;
  const float* k_weight = nullptr;  // [n_layers][n_kv_heads][D], or null
  const float* v_weight = nullptr;
  int32_t k_groups = 1, v_groups = 1;  // KVTransform's: rows without a matrix are dealt to them

  CodeTables codes;  // where the store's rows are coded

  float* query_magnitude = nullptr;  // [n_layers][n_kv_heads][query_window][D], or null
  int32_t query_window = 0;
};

struct CommitView {
  SequenceView sequence;
  uint8_t* const* new_pages = nullptr;  // [n_new_blocks]
  uint8_t* dense_out = nullptr;         // as SequenceView::dense, of dense_out_capacity
  int32_t dense_out_capacity = 0;       // tokens; 0: as many as the sequence's dense buffer holds
  int32_t dense_tokens = 0, fresh_tokens = 0, n_new_blocks = 0, end_pos = 0;
  int32_t k_policy = 0, v_policy = 0;  // PrunePolicy
};

// The dense tokens of one layer, KV head and kind: dense[0, dense_tokens) ++ fresh.
struct DenseRun {
  const uint8_t* dense;
  const uint8_t* fresh;
  int32_t dense_tokens;
  int64_t row_bytes;

  MUSTAFAR_HOST_DEVICE const uint8_t* row(int64_t i) const {
    return i < dense_tokens ? dense + i * row_bytes : fresh + (i - dense_tokens) * row_bytes;
  }
};

// Bytes to a layer's and head's keys (kind 0) or values (kind 1) in a dense buffer of `capacity`
// tokens.
MUSTAFAR_HOST_DEVICE inline int64_t dense_offset(int32_t capacity, int32_t layer, int32_t kind,
                                                 int32_t n_kv_heads, int32_t head,
                                                 int64_t row_bytes) {
  return ((int64_t{layer} * 2 + kind) * n_kv_heads + head) * capacity * row_bytes;
}

MUSTAFAR_HOST_DEVICE inline int64_t dense_offset(const SequenceView& s, int32_t layer, int32_t kind,
                                                 int32_t n_kv_heads, int32_t head,
                                                 int64_t row_bytes) {
  return dense_offset(s.dense_capacity, layer, kind, n_kv_heads, head, row_bytes);
}

MUSTAFAR_HOST_DEVICE inline DenseRun dense_run(const SequenceView& s, int32_t dense_tokens,
                                               int32_t layer, int32_t kind, int32_t n_kv_heads,
                                               int32_t head, int64_t row_bytes) {
  DenseRun run;
  run.dense = s.dense + dense_offset(s, layer, kind, n_kv_heads, head, row_bytes);
  run.fresh = s.fresh == nullptr
                  ? nullptr
                  : s.fresh + (int64_t{kind} * n_kv_heads + head) * s.fresh_capacity * row_bytes;
  run.dense_tokens = dense_tokens;
  run.row_bytes = row_bytes;
  return run;
}

// The sequence that row `row` of a batch belongs to, or null.
MUSTAFAR_HOST_DEVICE inline const SequenceView* find_sequence(const SequenceView* sequences,
                                                              int32_t n_sequences, int32_t row) {
  for (int32_t i = 0; i < n_sequences; i++) {
    const SequenceView& s = sequences[i];
    if (row >= s.row0 && row < s.row0 + s.n_rows) return &s;
  }
  return nullptr;
}

}  // namespace mustafar::cuda
