"""The compressed KV cache in plain numpy: the definition to read, and to check other code against.

Nothing here is used by the runtime, and nothing here calls it. To read in this order: numbers
(formats and rounding), slots (which values of a row are kept, how a block of 64 tokens is laid out
in bytes), policies (what ranks the values), coded (the other kind of slot), budget
(coded rows of other sizes in other layers), cache (how blocks make
pages, when tokens are compressed, and attention over all of it). Apart from the cache: weights
(matrices that are rounded when a model is loaded).

A *row* is one token of one KV head, K or V: ``head_dim`` values. Ranking and quantising read rows
already rounded to the cache's tail type (`round_to`) and in stored order (`Slot.stored`): the dims
of a group are dealt round the row.
"""

from .budget import deal_rows, row_errors
from .cache import HeadCache, attend, compressed_tokens, page_bytes, slot_offset
from .coded import (
    CODED_ERROR,
    CODED_STEP,
    MAX_WIDTH,
    code_row,
    coded_row_bytes,
    deal_widths,
    pack_coded_block,
    unpack_coded_block,
)
from .numbers import F32, bf16_to_f32, f32_to_bf16, round_to
from .policies import (
    K_POLICIES,
    V_POLICIES,
    block_masks,
    channel_masks,
    policy_masks,
    query_weight,
    structured_masks,
    token_weight,
)
from .slots import (
    BLOCK_TOKENS,
    SLOT_ALIGNMENT,
    VALUE_DTYPES,
    Slot,
    decode,
    encode,
    group_size,
    keep_count,
    pack_block,
    quantise,
    stored_order,
    top_mask,
    unpack_block,
)
from .weights import dequantise_matrix, quantise_matrix

__all__ = [
    "BLOCK_TOKENS",
    "CODED_ERROR",
    "CODED_STEP",
    "F32",
    "HeadCache",
    "K_POLICIES",
    "MAX_WIDTH",
    "SLOT_ALIGNMENT",
    "Slot",
    "VALUE_DTYPES",
    "V_POLICIES",
    "attend",
    "bf16_to_f32",
    "block_masks",
    "channel_masks",
    "code_row",
    "coded_row_bytes",
    "compressed_tokens",
    "deal_rows",
    "deal_widths",
    "decode",
    "dequantise_matrix",
    "encode",
    "f32_to_bf16",
    "group_size",
    "keep_count",
    "pack_block",
    "pack_coded_block",
    "page_bytes",
    "policy_masks",
    "quantise",
    "quantise_matrix",
    "query_weight",
    "round_to",
    "row_errors",
    "slot_offset",
    "stored_order",
    "structured_masks",
    "token_weight",
    "top_mask",
    "unpack_block",
    "unpack_coded_block",
]
