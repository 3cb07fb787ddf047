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

// What a launch of a decode kernel has to do, for splits_per_block. 0: as many splits as max_splits
// allows, of 8 tiles.
struct DecodeLoad {
  int32_t n_splits = 0;     // of all sequences together
  int32_t split_tiles = 0;  // of the longest split
  bool operator==(const DecodeLoad&) const = default;
};

struct AttentionArgs {
  const SequenceView* sequences = nullptr;  // [n_sequences] on the device
  int32_t n_sequences = 0;
  int32_t n_rows = 0;         // of all sequences together
  int32_t max_row_count = 1;  // most rows of one sequence
  int32_t max_splits = 1;     // at least that of every sequence (decode); 1 in prefill
  StoreLayout layout;         // of every sequence
  DType tail_dtype = DType::kBF16;
  int32_t layer = 0;
  int32_t window = 0;  // tokens that a query sees, its own among them; 0: all before it
  int32_t n_heads = 0, n_kv_heads = 0, head_dim = 0;
  const float* q = nullptr;   // [n_rows][n_heads * head_dim], rotated and transformed
  float* partials = nullptr;  // [n_rows][n_heads][max_splits][head_dim + 2]: output, max, sum
  float* out = nullptr;       // [n_rows][n_heads * head_dim]
  DecodeLoad load;
  int32_t splits_per_block = 0;  // of a decode kernel: 1 to 8; 0: by splits_per_block()
  bool decode = true;            // one row a sequence, its token in the dense buffer
  bool writes_out = false;       // prefill_attention_fast writes out itself: no combine follows
  bool undoes_values = true;     // combine_attention does, else undo_value_transform is to follow
};

// A sequence has a split for every kMinSplitTiles tiles of 64 tokens that it begins: enough of them
// to make a block's fixed costs small. Beyond kMaxSplits, which fill a GPU at batch 1 with 8 KV
// heads, splits grow instead.
constexpr int32_t kMinSplitTiles = 4;
constexpr int32_t kMaxSplits = 64;

// A decode block knows the addresses of so many tiles' pages beforehand.
constexpr int32_t kListedTiles = 64;

MUSTAFAR_HOST_DEVICE inline int32_t n_decode_splits(int32_t n_tiles) {
  const int32_t splits = (n_tiles + kMinSplitTiles - 1) / kMinSplitTiles;
  return splits < kMaxSplits ? splits : kMaxSplits;
}

// What a decode step visits of a sequence: blocks, then rows of the dense buffer, the new token's
// the last. Beginning with what its window sees, a layer's tiles are fewer than the cache has.
struct SeenTokens {
  int32_t first_block = 0, n_blocks = 0;
  int32_t hidden_rows = 0;            // of the first block, before the window
  int32_t first_row = 0, n_rows = 0;  // of the dense buffer

  MUSTAFAR_HOST_DEVICE int32_t n_tiles() const {
    return n_blocks + (n_rows + kBlockTokens - 1) / kBlockTokens;
  }
  MUSTAFAR_HOST_DEVICE int32_t n_splits() const { return n_decode_splits(n_tiles()); }
};

MUSTAFAR_HOST_DEVICE inline SeenTokens seen_tokens(const SequenceView& s, int32_t window) {
  SeenTokens seen;
  seen.n_blocks = s.n_blocks;
  seen.n_rows = s.dense_tokens + 1;
  if (window > 0 && s.pos0 >= window) {
    const HiddenRows hidden = hidden_before(s, s.pos0 - window + 1);
    seen.first_block = hidden.store / kBlockTokens;
    seen.n_blocks -= seen.first_block;
    seen.hidden_rows = hidden.store % kBlockTokens;
    seen.first_row = hidden.dense;
    seen.n_rows -= hidden.dense;
  }
  return seen;
}

// The most tiles and splits that a sequence has in a layer of a window, whatever its length: a
// window's tokens begin at most one tile more than they fill, where store and dense buffer meet.
MUSTAFAR_HOST_DEVICE inline int32_t most_window_tiles(int32_t window) {
  return window / kBlockTokens + 2;
}
MUSTAFAR_HOST_DEVICE inline int32_t most_window_splits(int32_t window) {
  return n_decode_splits(most_window_tiles(window));
}

// First tile of split `split` of n_splits; that of split n_splits is the end. Splits differ by one
// tile at most.
MUSTAFAR_HOST_DEVICE inline int32_t split_begin(int32_t split, int32_t n_splits, int32_t n_tiles) {
  const uint32_t each = static_cast<uint32_t>(n_tiles) / static_cast<uint32_t>(n_splits);
  const int32_t longer =
      n_tiles - static_cast<int32_t>(each) * n_splits;  // so many, the first ones, have a tile more
  return split * static_cast<int32_t>(each) + (split < longer ? split : longer);
}

// How many consecutive splits a block of a decode kernel takes, up to `most`, a constant of the
// kernel. A block's start costs as much as 3 tiles and the end of a split as 0.7; n_slots blocks
// run at once. heads: blocks of a split; sequences count as equally long. One where all
// splits run at once, as at batch 1, and never so many that a quarter of the slots stays empty or
// that they have more than kListedTiles tiles. Results are the same for any number.
inline int32_t splits_per_block(const DecodeLoad& load, int32_t n_sequences, int64_t heads,
                                int64_t n_slots, int32_t most) {
  const int32_t each = (load.n_splits + n_sequences - 1) / n_sequences;
  int32_t best = 1;
  double least = 0.0;
  for (int32_t n = 1; n <= most; n++) {
    if (n > 1 && n * load.split_tiles > kListedTiles) break;
    const int64_t of_each = (each + n - 1) / n;
    const int64_t blocks = (n == 1 ? load.n_splits : of_each * n_sequences) * heads;
    if (n == 1 && blocks <= n_slots) return 1;
    if (n > 1 && 4 * blocks < 3 * n_slots) break;
    const double waves = static_cast<double>((blocks + n_slots - 1) / n_slots);
    const double cost = waves * (3.0 + n * (load.split_tiles + 0.7));
    if (n == 1 || cost < least) {
      least = cost;
      best = n;
    }
  }
  return best;
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

// Merges the partials of every row and head into out (merge_splits.cuh), in the order that
// v_backward wants where that is still to be applied.
void combine_attention(const AttentionArgs& args, Stream stream);

// |q| of the newest rows into SequenceView::query_magnitude, a KV head's query heads summed.
void record_query_magnitude(const AttentionArgs& args, Stream stream);

}  // namespace mustafar::cuda
