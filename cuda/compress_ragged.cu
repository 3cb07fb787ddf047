// Prune + compress of ragged slots (policies that fix the count of a block, not of a row), a block
// per slot.
//
// Grid: x new block of a step, y (layer, KV head, K or V), z step; 8 warps. The slot's 64 rows are
// staged as f32, then masks are chosen by the slot's policy:
//   per channel      a warp takes one word of every mask, 32 channels; lane i holds tokens i and
//                    32 + i of a channel
//   whole channels   a thread per channel takes its norm, warp 0 selects among them
//   over the block   the threshold is found bit by bit, all threads counting what reaches it
// Kept values then move to the front of the staging area, eight rows at a time: never past the rows
// that were read. From there they leave as whole words. Every byte of the slot is written.
//
// Shared: Scratch. Limit: head_dim <= 256 (69 KiB).
#include "cuda/compress.h"
#include "cuda/compress_ops.cuh"
#include "cuda/launch.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWords = kMaxHeadDim / kWarpSize;

struct Scratch {
  float* rows;          // [64][stride], later the kept elements' bits end to end
  float* weight;        // [D], of the dims
  float* token_weight;  // [64]
  uint32_t* keys;       // [D], of whole channels
  uint32_t* masks;      // [64][mask_words]
  int32_t* offsets;     // [66]: index of each row's first value, their number, 0
  int32_t* counts;      // [64]
  int stride;           // D + 1: a column is free of bank conflicts

  __device__ __forceinline__ Scratch(uint8_t* memory, const SlotLayout& slot)
      : stride(slot.head_dim + 1) {
    rows = reinterpret_cast<float*>(memory);
    weight = rows + kBlockTokens * stride;
    token_weight = weight + slot.head_dim;
    keys = reinterpret_cast<uint32_t*>(token_weight + kBlockTokens);
    masks = keys + slot.head_dim;
    offsets = reinterpret_cast<int32_t*>(masks + kBlockTokens * slot.mask_words);
    counts = offsets + kBlockTokens + 2;
  }
};

int64_t scratch_bytes(const SlotLayout& slot) {
  return 4 * (int64_t{kBlockTokens} * (slot.head_dim + 1 + 1 + slot.mask_words + 2) + 2 +
              2 * int64_t{slot.head_dim});
}

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int warp() { return thread() / kWarpSize; }

// a[t] = sum over d of weight[d] |k[t][d]|, one after another as the CPU adds them.
__device__ void weigh_tokens(const CompressArgs& args, const DenseRun& keys, int32_t first,
                             Scratch& w) {
  if (thread() >= kBlockTokens) return;
  const uint8_t* row = keys.row(first + thread());
  float sum = 0.0f;
  for (int32_t d = 0; d < args.layout.k.head_dim; d++) {
    const float k = fabsf(load_element(row, args.tail_dtype, d));
    sum = add_rounded(sum, multiply_rounded(w.weight[d], k));
  }
  w.token_weight[thread()] = sum;
}

// select_per_channel of format/prune.h. by_token: ranks by |x| token_weight.
__device__ void select_per_channel(const SlotLayout& slot, bool by_token, Scratch& w) {
  const int lane = lane_id();
  for (int word = warp(); word < slot.mask_words; word += kWarps) {
    uint32_t mine[2] = {0, 0};  // of tokens lane and 32 + lane
    for (int i = 0; i < kWarpSize && word * 32 + i < slot.head_dim; i++) {
      uint32_t keys[2], kept[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int t = 32 * j + lane;
        keys[j] =
            rank_key(w.rows[t * w.stride + word * 32 + i], by_token ? w.token_weight[t] : 1.0f);
      }
      select_largest<2>(keys, kBlockTokens, kBlockTokens, slot.keep, 0, kept);
#pragma unroll
      for (int j = 0; j < 2; j++) mine[j] |= (kept[j] >> lane & 1u) << i;
    }
#pragma unroll
    for (int j = 0; j < 2; j++) w.masks[(32 * j + lane) * slot.mask_words + word] = mine[j];
  }
}

// select_whole_channels of format/prune.h.
__device__ void select_whole_channels(const SlotLayout& slot, bool weighted, Scratch& w) {
  for (int d = thread(); d < slot.head_dim; d += kThreads) {
    double squares = 0;
    for (int t = 0; t < kBlockTokens; t++) {
      const double x = w.rows[t * w.stride + d];
      squares += x * x;  // products of floats are exact in double: an FMA rounds the same
    }
    w.keys[d] = rank_key(static_cast<float>(sqrt(squares)), weighted ? w.weight[d] : 1.0f);
  }
  sync_block();
  if (warp() != 0) return;
  uint32_t keys[kWords], mask[kWords];
#pragma unroll
  for (int v = 0; v < kWords; v++) {
    const int d = 32 * v + lane_id();
    keys[v] = d < slot.head_dim ? w.keys[d] : 0u;
  }
  select_largest<kWords>(keys, slot.head_dim, slot.head_dim, slot.row_keep, 0, mask);
#pragma unroll
  for (int v = 0; v < kWords; v++) {
    if (v >= slot.mask_words) continue;
    for (int t = lane_id(); t < kBlockTokens; t += kWarpSize) {
      w.masks[t * slot.mask_words + v] = mask[v];
    }
  }
}

// select_in_block of format/prune.h.
__device__ void select_in_block(const SlotLayout& slot, bool weighted, Scratch& w) {
  const int lane = lane_id();
  const auto key = [&](int t, int d) {
    return d < slot.head_dim ? rank_key(w.rows[t * w.stride + d], weighted ? w.weight[d] : 1.0f)
                             : 0u;
  };
  // Values of the block whose key is at least `least`, in every thread.
  const auto count = [&](uint32_t least) {
    int n = 0;
    for (int t = warp(); t < kBlockTokens; t += kWarps) {
      for (int d = lane; d < slot.head_dim; d += kWarpSize) n += key(t, d) >= least ? 1 : 0;
    }
    n = warp_sum(n);
    if (lane == 0) w.counts[warp()] = n;
    sync_block();
    n = 0;
    for (int i = 0; i < kWarps; i++) n += w.counts[i];
    sync_block();  // the next count writes over these
    return n;
  };
  const int keep = slot.head_dim * slot.keep;
  uint32_t threshold = 0;
  for (int bit = 30; bit >= 0; bit--) {
    const uint32_t candidate = threshold | 1u << bit;
    if (count(candidate) >= keep) threshold = candidate;
  }
  const int ties = keep - count(threshold + 1);  // the first of the values at the threshold

  for (int t = warp(); t < kBlockTokens; t += kWarps) {
    int n = 0;
    for (int v = 0; v < slot.mask_words; v++) {
      const int d = 32 * v + lane;
      n += popcount(ballot(d < slot.head_dim && key(t, d) == threshold));
    }
    if (lane == 0) w.counts[t] = n;
  }
  sync_block();
  for (int t = warp(); t < kBlockTokens; t += kWarps) {
    int before = 0;
    for (int u = 0; u < t; u++) before += w.counts[u];
    for (int v = 0; v < slot.mask_words; v++) {
      const int d = 32 * v + lane;
      const uint32_t mine = key(t, d);
      const uint32_t equal = ballot(d < slot.head_dim && mine == threshold);
      const bool tie =
          (equal >> lane & 1u) != 0 && before + popcount(equal & bits_below(lane)) < ties;
      const uint32_t mask = ballot((d < slot.head_dim && mine > threshold) || tie);
      if (lane == 0) w.masks[t * slot.mask_words + v] = mask;
      before += popcount(equal);
    }
  }
}

// Masks, row offsets, values and scales of the slot, from rows and masks.
__device__ void pack_slot(const CompressArgs& args, const CommitView& step, const SlotPlace& at,
                          const SlotLayout& slot, int32_t first, Scratch& w) {
  const int lane = lane_id();
  if (thread() < kBlockTokens) {
    int n = 0;
    for (int v = 0; v < slot.mask_words; v++) {
      n += popcount(w.masks[thread() * slot.mask_words + v]);
    }
    w.counts[thread()] = n;
  }
  sync_block();
  for (int t = thread(); t < kBlockTokens + 2; t += kThreads) {
    int n = 0;
    for (int u = 0; u < t && u < kBlockTokens; u++) n += w.counts[u];
    w.offsets[t] = t <= kBlockTokens ? n : 0;
  }
  sync_block();
  uint32_t* out = reinterpret_cast<uint32_t*>(at.slot);
  for (int i = thread(); i < kBlockTokens * slot.mask_words; i += kThreads) out[i] = w.masks[i];
  uint32_t* offsets = reinterpret_cast<uint32_t*>(at.slot + slot.offsets_offset);
  for (int i = thread(); i <= kBlockTokens / 2; i += kThreads) {
    offsets[i] = static_cast<uint32_t>(w.offsets[2 * i] | w.offsets[2 * i + 1] << 16);
  }

  uint32_t* elements = reinterpret_cast<uint32_t*>(w.rows);
  for (int t = warp(); t < kBlockTokens; t += kWarps) {
    float values[kWords];
    uint32_t mask[kWords];
#pragma unroll
    for (int v = 0; v < kWords; v++) {
      const int d = 32 * v + lane;
      values[v] = d < slot.head_dim ? w.rows[t * w.stride + d] : 0.0f;
      mask[v] = v < slot.mask_words ? w.masks[t * slot.mask_words + v] : 0u;
    }
    const float scale = store_scale<kWords>(args, slot, values, mask, at.slot, t,
                                            bad_row_code(step, at, first + t));
    sync_block();  // these rows are in registers
    stage_kept<kWords>(values, mask, scale, slot.dtype, elements + w.offsets[t]);
    sync_block();
  }
  uint32_t* words = reinterpret_cast<uint32_t*>(at.slot + slot.values_offset);
  const int32_t total = w.offsets[kBlockTokens];
  for (int i = thread(); i < kBlockTokens * slot.row_bytes / 4; i += kThreads) {
    words[i] = pack_word(elements, total, i, slot.dtype);
  }
  zero_padding(slot, at.slot);
}

__global__ void __launch_bounds__(kThreads) compress_ragged_kernel(CompressArgs args) {
  const CommitView& step = args.steps[blockIdx.z];
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (!has_new_block(step, block)) return;
  const SlotPlace at = slot_place(args, step, block, static_cast<int32_t>(blockIdx.y));
  const SlotLayout& slot = at.kind == kKeys ? args.layout.k : args.layout.v;
  if (!slot.ragged) return;
  Scratch w(shared_memory(), slot);
  const int32_t first = step.sequence.n_sinks + block * kBlockTokens;
  for (int t = warp(); t < kBlockTokens; t += kWarps) {
    const uint8_t* row = at.run.row(first + t);
    for (int d = lane_id(); d < slot.head_dim; d += kWarpSize) {
      w.rows[t * w.stride + d] = load_element(row, args.tail_dtype, d);
    }
  }
  const bool weighted = load_weights(args, step, at, w.weight);
  sync_block();
  const PrunePolicy policy = step.policy(at.kind);
  if (policy == PrunePolicy::kChannelStructured) {
    select_whole_channels(slot, weighted, w);
  } else if (policy == PrunePolicy::kChannelOutputAware && at.kind == kKeys) {
    select_in_block(slot, weighted, w);
  } else {
    const bool by_token = policy == PrunePolicy::kChannelOutputAware;
    if (by_token) {
      const SlotPlace keys = slot_place(args, step, block, static_cast<int32_t>(blockIdx.y) - 1);
      weigh_tokens(args, keys.run, first, w);
      sync_block();
    }
    select_per_channel(slot, by_token, w);
  }
  sync_block();
  pack_slot(args, step, at, slot, first, w);
}

}  // namespace

void compress_ragged(const CompressArgs& args, Stream stream) {
  const SlotLayout& slot = args.layout.k.ragged ? args.layout.k : args.layout.v;
  const Grid grid{args.max_new_blocks, int64_t{args.n_layers} * args.layout.n_kv_heads * 2,
                  args.n_steps};
  launch("compress_ragged", compress_ragged_kernel, grid, kThreads, scratch_bytes(slot), stream,
         args);
}

}  // namespace mustafar::cuda
