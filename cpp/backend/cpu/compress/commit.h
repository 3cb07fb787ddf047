// Pruning and compression of the blocks that left a sequence's window (Backend::commit).
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "backend/cpu/isa.h"
#include "core/thread_pool.h"

namespace mustafar {

// Compresses layers [first_layer, first_layer + n_layers) of every step, then moves what stays
// dense to dense_out. Throws StateError naming layer and position where a row that must be
// quantised is not finite; nothing has been moved then.
//
// Policies beyond the per-token ones, all per block of 64 tokens, w[d] the sum of |q_d| over the
// window's queries (SequenceView::query_magnitude):
//   K kOutputAware         per token, |k_d| w[d]
//   kChannelMagnitude      per channel, |x|
//   K kChannelOutputAware  over the block, |k_d| w[d]: w alone cannot reorder a channel's tokens
//   V kChannelOutputAware  per channel, |v_t| a[t], a[t] = sum_d w[d] |k_td|: it bounds the sum of
//                          the token's |logits|, in place of probabilities that nobody has kept
//   K kChannelStructured   whole channels by w[d] ||k_d|| (ThinK)
// A profile's ranking weights multiply |x| in the per-token policies and w in those of keys; inside
// a channel they change nothing.
void commit_blocks(ThreadPool& pool, Isa isa, DType tail_dtype, std::span<const CommitStep> steps,
                   int32_t first_layer, int32_t n_layers);

// Keeps |q| of the step's newest rows for commit, where the step has room for it (else does
// nothing): the group's query heads summed, position p in slot p % query_window. q:
// [n_rows][n_heads * head_dim], the step's rows as attention sees them.
void record_query_magnitude(const SequenceView& step, int32_t layer, int32_t n_heads,
                            int32_t n_kv_heads, int32_t head_dim, const float* q);

}  // namespace mustafar
