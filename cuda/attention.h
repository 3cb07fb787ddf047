// Attention over a compressed cache on the device: Backend::attend.
//
// A sequence's tokens are cut into splits, whole tiles of 64 tokens, by its length alone, so that a
// result does not depend on the batch. A kernel leaves a partial softmax (max, sum, output) per
// row, head and split; combine_attention merges them and undoes the value transform. A prompt's
// rows are one split each: their kernel can write the output at once.
#pragma once

#include <cstdint>

#include "backend/cache_view.h"
#include "core/dtype.h"
#include "cuda/device.h"

namespace mustafar::cuda {

struct AttentionArgs {
  const SequenceView* sequences = nullptr;  // [n_sequences] on the device
  int32_t n_sequences = 0;
  int32_t n_rows = 0;         // of all sequences together
  int32_t max_row_count = 1;  // most rows of one sequence
  int32_t max_splits = 1;     // at least that of every sequence (decode); 1 in prefill
  StoreLayout layout;         // of every sequence
  DType tail_dtype = DType::kBF16;
  int32_t layer = 0;
  int32_t n_heads = 0, n_kv_heads = 0, head_dim = 0;
  const float* q = nullptr;   // [n_rows][n_heads * head_dim], rotated and transformed
  float* partials = nullptr;  // [n_rows][n_heads][max_splits][head_dim + 2]: output, max, sum
  float* out = nullptr;       // [n_rows][n_heads * head_dim]
  bool decode = true;         // one row a sequence, its token in the dense buffer
  bool writes_out = false;    // prefill_attention_fast writes out itself: no combine follows
};

// A sequence has a split for every kMinSplitTiles tiles of 64 tokens that it begins: enough of them
// to make a block's fixed costs small. Beyond kMaxSplits, which fill a GPU at batch 1 with 8 KV
// heads, splits grow instead.
constexpr int32_t kMinSplitTiles = 4;
constexpr int32_t kMaxSplits = 64;

// Tiles of a decode step: blocks, then the dense buffer with the new token.
MUSTAFAR_HOST_DEVICE inline int32_t n_decode_tiles(int32_t n_blocks, int32_t dense_tokens) {
  return n_blocks + (dense_tokens + 1 + kBlockTokens - 1) / kBlockTokens;
}

MUSTAFAR_HOST_DEVICE inline int32_t n_decode_splits(int32_t n_blocks, int32_t dense_tokens) {
  const int32_t tiles = n_decode_tiles(n_blocks, dense_tokens);
  const int32_t splits = (tiles + kMinSplitTiles - 1) / kMinSplitTiles;
  return splits < kMaxSplits ? splits : kMaxSplits;
}

// First tile of split `split` of n_splits; that of split n_splits is the end. Splits differ by one
// tile at most.
MUSTAFAR_HOST_DEVICE inline int32_t split_begin(int32_t split, int32_t n_splits, int32_t n_tiles) {
  const uint32_t each = static_cast<uint32_t>(n_tiles) / static_cast<uint32_t>(n_splits);
  const int32_t longer =
      n_tiles - static_cast<int32_t>(each) * n_splits;  // so many, the first ones, have a tile more
  return split * static_cast<int32_t>(each) + (split < longer ? split : longer);
}

// Tensor-core kernels of one decode step (decode_attention.cu), which leave partials; false where
// the layout has none: head_dim 64 or 128, f16 or bf16 tail, values of the tail's type, int8 or
// int4, not ragged; coded rows of the widths in decode_attention_coded.cu.
bool decode_attention_fast(const AttentionArgs& args, Stream stream);

// Flash attention for many rows (prefill_attention.cu); false unless head_dim is 64 or 128 and the
// tail f16 or bf16. With writes_out it writes `out` and no partials; where a sequence has a
// v_backward, that is still to be applied.
bool prefill_attention_fast(const AttentionArgs& args, Stream stream);

// Any layout, type and head_dim up to 256, f32 arithmetic (attention_plain.cu).
void attention_plain(const AttentionArgs& args, Stream stream);

// Merges the partials of every row and head into out (merge_splits.cuh).
void combine_attention(const AttentionArgs& args, Stream stream);

// |q| of the newest rows into SequenceView::query_magnitude, a KV head's query heads summed.
void record_query_magnitude(const AttentionArgs& args, Stream stream);

}  // namespace mustafar::cuda
