// What the compress kernels share: where a slot is, ranking weights, selection, packing.
#pragma once

#include "cuda/compress.h"
#include "cuda/device_ops.cuh"

namespace mustafar::cuda {

__device__ __forceinline__ uint32_t bits_below(int n) {  // the low n bits; all for n >= 32
  return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1u;
}

// Orders as |x * weight| does, every NaN x above Inf (format/prune.cc has the definition).
__device__ __forceinline__ uint32_t rank_key(float x, float weight) {
  const uint32_t x_bits = float_bits(x) & 0x7fffffffu;
  const uint32_t bits = float_bits(multiply_rounded(x, weight)) & 0x7fffffffu;
  if (x_bits > 0x7f800000u) return 0x7fc00000u;
  return bits > 0x7f800000u ? 0u : bits;
}

// Masks of the `keep` largest keys of every group of `group` neighbouring dims of one row; ties
// keep the lower dim. keys: lane i holds dims i, 32 + i, ...; mask: the same in every lane.
template <int kWords>
__device__ void select_largest(const uint32_t (&keys)[kWords], int32_t head_dim, int32_t group,
                               int32_t keep, int lowest_bit, uint32_t (&mask)[kWords]) {
  const int lane = lane_id();
#pragma unroll
  for (int w = 0; w < kWords; w++) {
    // My group's dims [low, high); one word holds it unless the group is wider.
    const int d = 32 * w + lane;
    const int valid = d < head_dim ? d : head_dim - 1;  // spare lanes vote as the last dim's group
    const int low = valid / group * group;
    const int high = low + group < head_dim ? low + group : head_dim;
    const auto count = [&](uint32_t threshold, bool equal_only, int end) {
      int n = 0;
#pragma unroll
      for (int v = 0; v < kWords; v++) {
        if (group <= 32 && v != w) continue;
        const bool in = equal_only ? keys[v] == threshold : keys[v] >= threshold;
        const uint32_t range = bits_below(end - 32 * v) & ~bits_below(low - 32 * v);
        // Every lane votes for its own key against its own threshold: in a wide group all lanes of
        // the group share one threshold; others' votes are masked off.
        n += popcount(ballot(in) & range);
      }
      return n;
    };
    uint32_t threshold = 0;
    for (int bit = 30; bit >= lowest_bit; bit--) {
      const uint32_t candidate = threshold | 1u << bit;
      if (count(candidate, false, high) >= keep) threshold = candidate;
    }
    const int larger = count(threshold + 1, false, high);
    const int equal_before = count(threshold, true, d);
    const bool kept = d < head_dim && (keys[w] > threshold ||
                                       (keys[w] == threshold && larger + equal_before < keep));
    mask[w] = ballot(kept);
  }
}

// Scale of an int8 or int4 row (format/pack.h), as bf16 bits.
__device__ __forceinline__ uint16_t quant_scale(float absmax, DType dtype) {
  const uint32_t bits = float_bits(divide_rounded(absmax, dtype == DType::kInt8 ? 127.0f : 7.0f));
  return static_cast<uint16_t>((bits >> 16) + ((bits & 0xffffu) != 0 ? 1 : 0));
}

// A value as it is stored: the element's bits in the low end of a word.
__device__ __forceinline__ uint32_t element_bits(float x, float scale, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return float_bits(x);
    case DType::kF16:
      return float_f16(x);
    case DType::kBF16:
      return float_bf16(x);
    default:
      break;
  }
  if (scale == 0.0f) return 0;
  const float limit = dtype == DType::kInt8 ? 127.0f : 7.0f;
  const float code = fminf(fmaxf(rintf(divide_rounded(x, scale)), -limit), limit);
  return static_cast<uint32_t>(static_cast<int32_t>(code)) & (dtype == DType::kInt8 ? 0xffu : 0xfu);
}

__device__ __forceinline__ int32_t elements_per_word(DType dtype) {
  return dtype == DType::kF32 ? 1 : dtype == DType::kInt8 ? 4 : dtype == DType::kInt4 ? 8 : 2;
}

// Word i of a run of n elements, zero past its end.
__device__ __forceinline__ uint32_t pack_word(const uint32_t* elements, int32_t n, int32_t i,
                                              DType dtype) {
  const int per_word = elements_per_word(dtype);
  const int bits = 32 / per_word;
  uint32_t word = 0;
  for (int j = 0; j < per_word; j++) {
    const int at = i * per_word + j;
    if (at < n) word |= elements[at] << (j * bits);
  }
  return word;
}

// Stores the scale of a row that is quantised, of its kept values, and names the row in bad_row
// where one of all its values is not finite. Returns the scale; 0 where the slot has none. values:
// lane i holds dims i, 32 + i, ..., zero from head_dim on.
template <int kWords>
__device__ __forceinline__ float store_scale(const CompressArgs& args, const SlotLayout& slot,
                                             const float (&values)[kWords],
                                             const uint32_t (&mask)[kWords], uint8_t* out,
                                             int32_t row, int32_t bad_code) {
  if (!has_scales(slot.dtype)) return 0.0f;
  const int lane = lane_id();
  bool finite = true;
  float absmax = 0.0f;
#pragma unroll
  for (int w = 0; w < kWords; w++) {
    finite = finite && (float_bits(values[w]) & 0x7f800000u) != 0x7f800000u;
    if (mask[w] >> lane & 1) absmax = fmaxf(absmax, fabsf(values[w]));
  }
  if (ballot(!finite) != 0) {
    if (lane == 0) atomic_minimum(args.bad_row, bad_code);
  }
  const uint16_t bits = quant_scale(warp_max(absmax), slot.dtype);
  if (lane == 0) reinterpret_cast<uint16_t*>(out + slot.scales_offset)[row] = bits;
  return bf16_float(bits);
}

// The elements of a row's kept values, in order, to staged. Returns their number.
template <int kWords>
__device__ __forceinline__ int stage_kept(const float (&values)[kWords],
                                          const uint32_t (&mask)[kWords], float scale, DType dtype,
                                          uint32_t* staged) {
  const int lane = lane_id();
  int before = 0;
#pragma unroll
  for (int w = 0; w < kWords; w++) {
    if (mask[w] >> lane & 1) {
      staged[before + popcount(mask[w] & bits_below(lane))] = element_bits(values[w], scale, dtype);
    }
    before += popcount(mask[w]);
  }
  return before;
}

// Whether there is such a block and some query will see it.
__device__ __forceinline__ bool has_new_block(const CommitView& step, int32_t block) {
  return block < step.n_new_blocks && step.new_pages[block] != nullptr;
}

struct SlotPlace {
  int32_t layer, head, kind;
  uint8_t* slot;
  DenseRun run;
};

// index: (layer * n_kv_heads + head) * 2 + kind, layers counted from first_layer.
__device__ __forceinline__ SlotPlace slot_place(const CompressArgs& args, const CommitView& step,
                                                int32_t block, int32_t index) {
  const int32_t heads = args.layout.n_kv_heads;
  const int64_t row_bytes = args.layout.k.head_dim * (args.tail_dtype == DType::kF32 ? 4 : 2);
  SlotPlace at;
  at.kind = index & 1;
  at.head = index / 2 % heads;
  at.layer = args.first_layer + index / 2 / heads;
  at.slot =
      step.new_pages[block] + (at.kind == kKeys ? k_slot_offset(args.layout, at.layer, at.head)
                                                : v_slot_offset(args.layout, at.layer, at.head));
  at.run =
      dense_run(step.sequence, step.dense_tokens, at.layer, at.kind, heads, at.head, row_bytes);
  return at;
}

// Ranking weights of a slot's dims into weight [D] (shared); false where all are 1. Ends without a
// barrier.
__device__ __forceinline__ bool load_weights(const CompressArgs& args, const CommitView& step,
                                             const SlotPlace& at, float* weight) {
  const SequenceView& s = step.sequence;
  const int32_t head_dim = args.layout.k.head_dim;
  const int32_t heads = args.layout.n_kv_heads;
  const float* profile = at.kind == kKeys ? s.transform.k_weight : s.transform.v_weight;
  if (profile != nullptr) profile += head_index(at.layer, heads, at.head) * head_dim;
  const bool by_query = needs_queries(step.policy(at.kind)) && s.query_magnitude != nullptr;
  for (int32_t d = static_cast<int32_t>(threadIdx.x); d < head_dim;
       d += static_cast<int32_t>(blockDim.x)) {
    float w = profile != nullptr ? profile[d] : 1.0f;
    if (by_query) {
      const int32_t n = step.end_pos < s.query_window ? step.end_pos : s.query_window;
      float sum = 0.0f;
      const float* slots = query_slots(s, at.layer, heads, at.head, head_dim);
      for (int32_t p = step.end_pos - n; p < step.end_pos; p++) {
        sum = add_rounded(sum, slots[int64_t{p % s.query_window} * head_dim + d]);
      }
      w = at.kind == kKeys && profile != nullptr ? multiply_rounded(sum, w) : sum;
    }
    weight[d] = w;
  }
  return profile != nullptr || by_query;
}

// Row `index` of the dense run as CompressArgs::bad_row names it.
__device__ __forceinline__ int32_t bad_row_code(const CommitView& step, const SlotPlace& at,
                                                int32_t index) {
  const int32_t position = step.end_pos - (step.dense_tokens + step.fresh_tokens) + index;
  return (at.layer * 2 + at.kind) * kBadRowPositions +
         (position < kBadRowPositions ? position : kBadRowPositions - 1);
}

// Zeroes the bytes after the last field of a slot.
__device__ __forceinline__ void zero_padding(const SlotLayout& slot, uint8_t* out) {
  const int32_t end = slot.scales_offset + (has_scales(slot.dtype) ? kBlockTokens * 2 : 0);
  for (int32_t i = end + static_cast<int32_t>(threadIdx.x); i < slot.slot_bytes;
       i += static_cast<int32_t>(blockDim.x)) {
    out[i] = 0;
  }
}

}  // namespace mustafar::cuda
