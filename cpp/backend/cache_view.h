// One sequence's cache as every operation sees it: what it consists of, and where each row of keys
// and values lies. Plain data and inline functions, used by the CPU's code and by CUDA kernels
// alike; a view is uploaded as it is. Pointers are memory of the backend's device.
//
// `kind` is kKeys or kValues. A row is one token's head_dim values of one KV head, in stored order
// (format/block_format.h); row_bytes is its size in the tail dtype.
#pragma once

#include <cstdint>

#include "format/block_format.h"
#include "format/coded.h"
#include "mustafar/prune_policy.h"

namespace mustafar {

inline constexpr int32_t kKeys = 0;
inline constexpr int32_t kValues = 1;

// What brings rows into the cache's own coordinates: the KV transform of a profile, per layer and
// KV head D x D, row vectors (k' = k F, q' = q B^T), and the stored order of block_format.h.
// Matrices and weights are given in stored order; rows without a matrix are dealt to k_groups or
// v_groups.
struct KVTransform {
  const float* k_forward = nullptr;  // [n_layers][n_kv_heads][D][D], as the next three; or null
  const float* k_backward = nullptr;
  const float* v_forward = nullptr;
  const float* v_backward = nullptr;
  const float* k_weight = nullptr;  // [n_layers][n_kv_heads][D] ranking weights, or null
  const float* v_weight = nullptr;
  int32_t k_groups = 1;  // 1: the order is the row's own
  int32_t v_groups = 1;

  // Whether keys and values reach the cache as the model made them.
  MUSTAFAR_HOST_DEVICE bool is_identity() const {
    return k_forward == nullptr && v_forward == nullptr && k_groups == 1 && v_groups == 1;
  }
};

// One sequence's part in a call. Its cache is the store (n_blocks pages), then the dense buffer
// (sinks, then tail), then the tokens of this call.
//
// Views are compared byte by byte to see whether the device has them already: no padding.
struct SequenceView {
  // Rows of this operation.
  int32_t row0 = 0;  // first of its rows in the batch
  int32_t n_rows = 0;
  int32_t pos0 = 0;  // position of its first row (for RoPE and the causal mask)

  int32_t query_window = 0;  // queries that query_magnitude, below, has room for

  // The cache as it stood before the call.
  const uint8_t* const* pages = nullptr;  // [n_blocks] page addresses, oldest first
  uint8_t* dense = nullptr;  // [n_layers][2 (K, V)][n_kv_heads][dense_capacity][D], tail dtype
  // Prefill: where the call's keys and values of the current layer go and are read from, starting
  // at position fresh_pos0: [2 (K, V)][n_kv_heads][fresh_capacity][D], tail dtype. Null in decode:
  // the row goes to slot dense_tokens of the dense buffer.
  uint8_t* fresh = nullptr;
  int32_t n_blocks = 0;
  int32_t dense_capacity = 0;  // tokens
  int32_t dense_tokens = 0;    // valid before the call
  int32_t n_sinks = 0;         // leading dense tokens that never enter the store
  int32_t fresh_capacity = 0;  // tokens
  int32_t fresh_pos0 = 0;
  int32_t dropped_blocks = 0;  // of the store, the oldest: pages begins after them
  int32_t long_rope = 0;       // its rows take the long frequencies, where a model has some

  KVTransform transform;
  CodeTables codes;  // where the store's rows are coded, else null pointers

  // |q| of the newest queries, summed over a KV head's query heads, kept where a policy ranks keys
  // by it, else null: [n_layers][n_kv_heads][query_window][D] f32, query at position p in slot p %
  // query_window.
  float* query_magnitude = nullptr;
};

// Moves blocks that left the window into the store: of the logical run dense[0, dense_tokens) ++
// fresh[0, fresh_tokens) the tokens from n_sinks on are compressed into new_pages, 64 each; what
// remains (sinks, then the rest) goes to dense_out, which may be the sequence's own dense buffer.
// With no new block and no fresh token it moves the dense tokens to another buffer.
struct CommitView {
  SequenceView sequence;
  // [n_new_blocks] page addresses, null for a block that no query will ever see.
  uint8_t* const* new_pages = nullptr;
  uint8_t* dense_out = nullptr;  // as SequenceView::dense, of dense_out_capacity
  int32_t dense_tokens = 0;      // valid now: decode's new row included
  int32_t fresh_tokens = 0;      // 0 in decode
  int32_t n_new_blocks = 0;
  int32_t end_pos = 0;             // tokens cached once the call is over
  int32_t dense_out_capacity = 0;  // tokens; 0: as many as the sequence's dense buffer holds
  PrunePolicy k_policy = PrunePolicy::kMagnitude;
  PrunePolicy v_policy = PrunePolicy::kMagnitude;
  uint8_t unused[2] = {};  // in place of padding

  MUSTAFAR_HOST_DEVICE PrunePolicy policy(int32_t kind) const {
    return kind == kKeys ? k_policy : v_policy;
  }
};

// ---- where things lie ----

// Which of the [n_layers][n_kv_heads] entries of a transform, of code tables or of query magnitudes
// belongs to a head.
MUSTAFAR_HOST_DEVICE inline int64_t head_index(int32_t layer, int32_t n_kv_heads, int32_t head) {
  return int64_t{layer} * n_kv_heads + head;
}

// Bytes from the start of a dense buffer of `capacity` tokens to its first row of a layer, kind and
// head.
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

// Tokens that the buffer has room for to which a commit moves what stays dense.
MUSTAFAR_HOST_DEVICE inline int32_t out_capacity(const CommitView& step) {
  return step.dense_out_capacity > 0 ? step.dense_out_capacity : step.sequence.dense_capacity;
}

// Bytes from the start of the fresh buffer, which holds one layer, to its first row of a kind and
// head.
MUSTAFAR_HOST_DEVICE inline int64_t fresh_offset(const SequenceView& s, int32_t kind,
                                                 int32_t n_kv_heads, int32_t head,
                                                 int64_t row_bytes) {
  return (int64_t{kind} * n_kv_heads + head) * s.fresh_capacity * row_bytes;
}

// The dense rows of one layer, kind and KV head: dense[0, dense_tokens) ++ fresh.
struct DenseRun {
  const uint8_t* dense;  // [dense_tokens][row_bytes]
  const uint8_t* fresh;  // likewise, or null where the call has no fresh buffer
  int32_t dense_tokens;
  int64_t row_bytes;

  MUSTAFAR_HOST_DEVICE const uint8_t* row(int64_t i) const {
    return i < dense_tokens ? dense + i * row_bytes : fresh + (i - dense_tokens) * row_bytes;
  }
};

// dense_tokens: of the dense buffer's rows, those that the run takes.
MUSTAFAR_HOST_DEVICE inline DenseRun dense_run(const SequenceView& s, int32_t dense_tokens,
                                               int32_t layer, int32_t kind, int32_t n_kv_heads,
                                               int32_t head, int64_t row_bytes) {
  DenseRun run;
  run.dense = s.dense + dense_offset(s, layer, kind, n_kv_heads, head, row_bytes);
  run.fresh =
      s.fresh == nullptr ? nullptr : s.fresh + fresh_offset(s, kind, n_kv_heads, head, row_bytes);
  run.dense_tokens = dense_tokens;
  run.row_bytes = row_bytes;
  return run;
}

// Where the call's own token at `position` is written.
MUSTAFAR_HOST_DEVICE inline uint8_t* new_row(const SequenceView& s, int32_t layer, int32_t kind,
                                             int32_t n_kv_heads, int32_t head, int64_t position,
                                             int64_t row_bytes) {
  if (s.fresh != nullptr) {
    return s.fresh + fresh_offset(s, kind, n_kv_heads, head, row_bytes) +
           (position - s.fresh_pos0) * row_bytes;
  }
  return s.dense + dense_offset(s, layer, kind, n_kv_heads, head, row_bytes) +
         s.dense_tokens * row_bytes;
}

// The slots of a head's query magnitudes, [query_window][head_dim].
MUSTAFAR_HOST_DEVICE inline float* query_slots(const SequenceView& s, int32_t layer,
                                               int32_t n_kv_heads, int32_t head, int32_t head_dim) {
  return s.query_magnitude + head_index(layer, n_kv_heads, head) * s.query_window * head_dim;
}

// ---- what lies before a layer's window ----

// Rows that a query does not see, of each part of a cache the first ones. Within a part tokens
// stand in order: sinks, which are older than the store, lead the dense buffer, and what follows
// them there is newer.
struct HiddenRows {
  int32_t store = 0;  // of the held blocks' rows
  int32_t dense = 0;  // of the dense buffer's with the call's own behind them
  int32_t fresh = 0;  // of the call's own
};

// first: the position of the first token that is seen.
MUSTAFAR_HOST_DEVICE inline HiddenRows hidden_before(const SequenceView& s, int32_t first) {
  const auto at_least = [](int32_t low, int32_t x) { return x > low ? x : low; };
  HiddenRows hidden;
  const int32_t held = s.n_blocks * kBlockTokens;
  const int32_t before_held = s.dropped_blocks * kBlockTokens;
  hidden.store = at_least(0, first - s.n_sinks - before_held);
  if (hidden.store > held) hidden.store = held;
  hidden.dense =
      first < s.n_sinks ? at_least(0, first) : at_least(s.n_sinks, first - before_held - held);
  hidden.fresh = at_least(0, first - s.fresh_pos0);
  return hidden;
}

// The sequence that row `row` of a batch belongs to, or null. Sequences stand in the order of their
// rows.
MUSTAFAR_HOST_DEVICE inline const SequenceView* find_sequence(const SequenceView* sequences,
                                                              int32_t n_sequences, int32_t row) {
  const auto holds = [&](int32_t i) {
    return row >= sequences[i].row0 && row < sequences[i].row0 + sequences[i].n_rows;
  };
  if (n_sequences <= 0 || row < sequences[0].row0) return nullptr;
  // Where each has one row.
  const int32_t guess = row - sequences[0].row0;
  if (guess < n_sequences && holds(guess)) return &sequences[guess];
  int32_t first = 0, end = n_sequences;  // the last one that begins at or before the row
  while (end - first > 1) {
    const int32_t middle = first + (end - first) / 2;
    (sequences[middle].row0 <= row ? first : end) = middle;
  }
  return holds(first) ? &sequences[first] : nullptr;
}

}  // namespace mustafar
