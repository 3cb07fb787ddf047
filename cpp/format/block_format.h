// The compressed KV block: constants, layout and addressing, shared by the CPU and CUDA kernels,
// the state files and the tests. Plain C++20, also compiled by nvcc: PODs and inline functions
// only.
//
// A block is 64 tokens of one KV head, K or V, in one slot of fixed size (128-byte aligned):
//
//     masks   [64][mask_words]   uint32, bit i of word w is index 32 * w + i; absent in dense slots
//     offsets [65] uint16        ragged slots only: index of each row's first value, then the
//                                number of values
//     values  [64][row_bytes]    kept values in ascending order of index, rows padded to whole
//                                words (ragged: one run of values, rows end to end)
//     scales  [64] bf16          int8, int4 and coded only
//
// Coded rows (format/coded.h) have no masks: a row is its dims' codes, of different widths, end to
// end.
//
// A row is stored permuted (format version 2): the members of a group are dealt round the row,
// since after RoPE strong key dims are neighbours, and a group of neighbours would have to drop
// some of them. stored_index says where a dim stands; masks, values and everything else that
// handles rows (the dense buffer too) speak of stored indices. Where nothing is grouped the order
// is the row's.
//
// int4 packs two values to a byte, low nibble first, as two's complement. All fields little-endian.
// A page holds one block of one sequence for all layers and KV heads, K slot before V slot.
#pragma once

#include <cstdint>
#include <span>

#include "core/dtype.h"
#include "mustafar/host_device.h"

namespace mustafar {

// The version of the rules and bytes below that files carry. Version 1 had groups of neighbouring
// dims.
inline constexpr uint32_t kStoreVersion = 2;
inline constexpr int32_t kBlockTokens = 64;
inline constexpr int32_t kSlotAlignment = 128;  // bytes
inline constexpr int32_t kSlabSlack = 64;       // readable bytes after every slab of pages

struct SlotLayout {
  int32_t head_dim = 0;
  int32_t group = 0;     // dims ranked together; head_dim in pattern row (ragged: 64, the tokens
                         // of a channel)
  int32_t keep = 0;      // kept values per group; group when dense
  int32_t row_keep = 0;  // kept values per row (ragged: their mean in a full slot)
  DType dtype = DType::kF32;
  bool dense = false;          // no masks: every value is stored
  bool ragged = false;         // counts fixed per block, not per row
  int32_t mask_words = 0;      // per row; 0 when dense
  int32_t row_bytes = 0;       // of values, a multiple of 4 (ragged: capacity / 64)
  int32_t offsets_offset = 0;  // bytes from the slot's start
  int32_t values_offset = 0;
  int32_t scales_offset = 0;
  int32_t slot_bytes = 0;

  bool operator==(const SlotLayout&) const = default;
};

// The slots of one layer, alike for all its KV heads.
struct LayerSlots {
  SlotLayout k, v;
  int64_t offset = 0;  // bytes from a page's start to the layer's first slot
};

struct StoreLayout {
  SlotLayout k, v;  // where layers differ, the first one's
  int32_t n_layers = 0;
  int32_t n_kv_heads = 0;
  int64_t page_bytes = 0;
  // Where layers have rows of different sizes, as coded rows may: [n_layers], host memory that
  // outlives the layout. They differ in row_bytes and in what follows from it alone. Null: every
  // layer has slots k and v, as on devices other than the host it must.
  const LayerSlots* layers = nullptr;

  bool operator==(const StoreLayout&) const = default;
};

MUSTAFAR_HOST_DEVICE inline bool has_scales(DType dtype) {
  return dtype == DType::kInt8 || dtype == DType::kInt4 || dtype == DType::kCoded;
}

// The slots of a layer. Host code alone.
inline const SlotLayout& slot_of(const StoreLayout& layout, int32_t layer, bool is_key) {
  if (layout.layers == nullptr) return is_key ? layout.k : layout.v;
  return is_key ? layout.layers[layer].k : layout.layers[layer].v;
}

// Bytes from a page's start to the slot of one layer and KV head.
MUSTAFAR_HOST_DEVICE inline int64_t k_slot_offset(const StoreLayout& layout, int32_t layer,
                                                  int32_t head) {
#if !defined(__CUDA_ARCH__)
  if (layout.layers != nullptr) {
    const LayerSlots& slots = layout.layers[layer];
    return slots.offset + head * (int64_t{slots.k.slot_bytes} + slots.v.slot_bytes);
  }
#endif
  return (int64_t{layer} * layout.n_kv_heads + head) *
         (int64_t{layout.k.slot_bytes} + layout.v.slot_bytes);
}
MUSTAFAR_HOST_DEVICE inline int64_t v_slot_offset(const StoreLayout& layout, int32_t layer,
                                                  int32_t head) {
#if !defined(__CUDA_ARCH__)
  if (layout.layers != nullptr) {
    return k_slot_offset(layout, layer, head) + layout.layers[layer].k.slot_bytes;
  }
#endif
  return k_slot_offset(layout, layer, head) + layout.k.slot_bytes;
}

// Group sizes of pattern group; head_dim itself where 16 does not divide it.
inline int32_t default_group(int32_t head_dim, bool is_key) {
  if (head_dim % 16 != 0) return head_dim;
  return is_key && head_dim % 128 == 0 ? 32 : 16;
}

// Kept values of a group: never more pruning than asked. In pattern group every group's run is
// whole 4-byte words, so keep is rounded up to a multiple of 2 (2-byte values), 4 (int8) or 8
// (int4). 1e-9 keeps the rounding of `sparsity` from adding a value.
inline int32_t keep_of(int32_t group, double sparsity, DType dtype, bool whole_words) {
  const double exact = group * (1.0 - sparsity) - 1e-9;
  int32_t keep = static_cast<int32_t>(exact);
  if (keep < exact) keep++;
  if (keep < 1) keep = 1;
  const int32_t unit = !whole_words            ? 1
                       : dtype == DType::kF32  ? 1
                       : dtype == DType::kInt8 ? 4
                       : dtype == DType::kInt4 ? 8
                                               : 2;
  keep = (keep + unit - 1) / unit * unit;
  return keep < group ? keep : group;
}

inline int32_t round_up(int32_t x, int32_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Offsets and size of a slot whose rows are known.
inline void place_parts(SlotLayout& s) {
  int32_t at = kBlockTokens * s.mask_words * 4;
  s.offsets_offset = at;
  if (s.ragged) at += round_up((kBlockTokens + 1) * 2, 4);
  s.values_offset = at;
  at += kBlockTokens * s.row_bytes;
  s.scales_offset = at;
  if (has_scales(s.dtype)) at += kBlockTokens * 2;
  s.slot_bytes = round_up(at, kSlotAlignment);
}

// Layout of one slot. sparsity 0: dense. group_pattern false: pattern row. ragged: counts are fixed
// per block (per-channel policies, masks of the caller's), so the pattern does not apply.
inline SlotLayout make_slot_layout(int32_t head_dim, bool is_key, double sparsity,
                                   bool group_pattern, DType dtype, bool ragged = false) {
  SlotLayout s;
  s.head_dim = head_dim;
  s.dtype = dtype;
  s.dense = sparsity == 0.0;
  s.ragged = ragged && !s.dense;
  if (s.ragged) {
    s.group = kBlockTokens;
    s.keep = keep_of(s.group, sparsity, dtype, false);
    s.row_keep = (head_dim * s.keep + kBlockTokens - 1) / kBlockTokens;
  } else if (s.dense) {
    s.group = s.keep = s.row_keep = head_dim;
  } else {
    s.group = group_pattern ? default_group(head_dim, is_key) : head_dim;
    s.keep = keep_of(s.group, sparsity, dtype, group_pattern && head_dim % 16 == 0);
    s.row_keep = head_dim / s.group * s.keep;
  }
  s.mask_words = s.dense ? 0 : (head_dim + 31) / 32;
  s.row_bytes = round_up(static_cast<int32_t>(dtype_bytes(dtype, s.row_keep)), 4);
  place_parts(s);
  return s;
}

// Bytes of a coded row of `bits` a dim, never fewer than asked: whole 4-byte words. 1e-9 keeps the
// rounding of `bits` from adding a word.
inline int32_t coded_row_bytes(int32_t head_dim, double bits) {
  const double exact = head_dim * bits / 8 - 1e-9;
  int32_t bytes = static_cast<int32_t>(exact);
  if (bytes < exact) bytes++;
  return round_up(bytes, 4);
}

// Layout of a slot of coded rows of so many bytes, a multiple of 4.
inline SlotLayout make_coded_slot(int32_t head_dim, int32_t row_bytes) {
  SlotLayout s;
  s.head_dim = head_dim;
  s.dtype = DType::kCoded;
  s.dense = true;
  s.group = s.keep = s.row_keep = head_dim;
  s.row_bytes = row_bytes;
  place_parts(s);
  return s;
}

// The same, of 1 <= bits <= 7 a dim on average.
inline SlotLayout make_coded_layout(int32_t head_dim, double bits) {
  return make_coded_slot(head_dim, coded_row_bytes(head_dim, bits));
}

// Groups that the dims of a row are dealt to; 1: stored in their own order.
inline int32_t n_groups(const SlotLayout& s) {
  return s.dense || s.ragged ? 1 : s.head_dim / s.group;
}

// Where dim d of a row stands when its dims are dealt to n_groups (which divides head_dim): group
// d mod n_groups, groups one after another.
MUSTAFAR_HOST_DEVICE inline int32_t stored_index(int32_t d, int32_t n_groups, int32_t head_dim) {
  return d % n_groups * (head_dim / n_groups) + d / n_groups;
}

// Values that a ragged slot holds.
inline int32_t ragged_capacity(const SlotLayout& s) {
  return kBlockTokens * (s.dtype == DType::kInt4
                             ? s.row_bytes * 2
                             : s.row_bytes / static_cast<int32_t>(dtype_bytes(s.dtype, 1)));
}

inline StoreLayout make_store_layout(int32_t n_layers, int32_t n_kv_heads, const SlotLayout& k,
                                     const SlotLayout& v) {
  StoreLayout layout;
  layout.k = k;
  layout.v = v;
  layout.n_layers = n_layers;
  layout.n_kv_heads = n_kv_heads;
  layout.page_bytes = int64_t{n_layers} * n_kv_heads * (int64_t{k.slot_bytes} + v.slot_bytes);
  return layout;
}

// The layout of a store whose layers differ. layers: [n_layers], at least one, which the layout
// keeps pointing to; their offsets are filled in.
inline StoreLayout make_store_layout(std::span<LayerSlots> layers, int32_t n_kv_heads) {
  StoreLayout layout;
  layout.k = layers[0].k;
  layout.v = layers[0].v;
  layout.n_layers = static_cast<int32_t>(layers.size());
  layout.n_kv_heads = n_kv_heads;
  layout.layers = layers.data();
  for (LayerSlots& slots : layers) {
    slots.offset = layout.page_bytes;
    layout.page_bytes += n_kv_heads * (int64_t{slots.k.slot_bytes} + slots.v.slot_bytes);
  }
  return layout;
}

// Tokens in the compressed store when n are cached: whole blocks between the sinks and the window.
inline int64_t compressed_tokens(int64_t n, int64_t sinks, int64_t window) {
  const int64_t eligible = n - sinks - window;
  return eligible <= 0 ? 0 : eligible / kBlockTokens * kBlockTokens;
}

}  // namespace mustafar
