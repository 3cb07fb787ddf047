// Which positions of a row, or of a block, are kept: exact counts, ranked by magnitude. The plain
// definition that every faster selection must reproduce bit for bit.
#pragma once

#include <cstdint>

#include "format/block_format.h"

namespace mustafar {

// Ranks by |x|, or by |x| * weight where weights are given. Ties keep the lower index; NaN ranks
// above Inf, all NaNs alike. Bits at or above head_dim are zero.

// Mask of one row of a slot that is not ragged: the largest layout.keep of each group.
// x: [head_dim]; weight: [head_dim], non-negative, or null; mask: out [layout.mask_words].
void select_row(const SlotLayout& layout, const float* x, const float* weight, uint32_t* mask);

// Masks of a block of a ragged slot. rows: [64][head_dim]; masks: out [64][layout.mask_words].

// The layout.keep largest tokens of every channel by |x| * token_weight ([64], or null).
void select_per_channel(const SlotLayout& layout, const float* rows, const float* token_weight,
                        uint32_t* masks);

// The head_dim * layout.keep largest values of the whole block by |x| * channel_weight ([head_dim],
// or null); ties keep the earlier token, then the lower dim.
void select_in_block(const SlotLayout& layout, const float* rows, const float* channel_weight,
                     uint32_t* masks);

// The layout.row_keep channels with the largest channel_weight * (l2 norm of the channel over the
// block), each for all 64 tokens (ThinK, arXiv 2407.21018). channel_weight: [head_dim], or null.
void select_whole_channels(const SlotLayout& layout, const float* rows, const float* channel_weight,
                           uint32_t* masks);

}  // namespace mustafar
