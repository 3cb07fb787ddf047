// Prune + compress, a warp per row.
//
// Grid: x new block of a step, y (layer, KV head, K or V), z step; 8 warps, each takes every eighth
// of the block's 64 rows. Lane i of a warp holds dims i, 32 + i, ...: a ballot over one of these
// words is that word of the mask, most significant decision first (radix select on the bits of
// |x|), and a kept value's place is the number of mask bits below it. Elements gather in shared
// memory and leave as whole words. Masks, values, scales and the slot's padding are all written:
// every byte of it.
//
// Shared: ranking weights [D] f32, then per warp [D] words of staged elements.
// Limits: head_dim <= 256, slots that are neither ragged nor coded (compress_ragged.cu and
// compress_coded.cu have those).
#include "cuda/compress.h"
#include "cuda/compress_ops.cuh"
#include "cuda/launch.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kWarps = 8;

template <int kWords>
__device__ void compress_row(const CompressArgs& args, const SlotLayout& slot, const uint8_t* x,
                             const float* weight, uint8_t* out, int32_t row, uint32_t* staged,
                             int32_t bad_code) {
  const int lane = lane_id();
  float values[kWords];
  uint32_t keys[kWords];
#pragma unroll
  for (int w = 0; w < kWords; w++) {
    const int d = 32 * w + lane;
    values[w] = d < slot.head_dim ? load_element(x, args.tail_dtype, d) : 0.0f;
    keys[w] = d < slot.head_dim ? rank_key(values[w], weight != nullptr ? weight[d] : 1.0f) : 0;
  }
  uint32_t mask[kWords];
  if (slot.dense) {
#pragma unroll
    for (int w = 0; w < kWords; w++) mask[w] = bits_below(slot.head_dim - 32 * w);
  } else {
    // Unweighted keys of 2-byte values have no low mantissa bits.
    const int lowest_bit = weight != nullptr || args.tail_dtype == DType::kF32 ? 0
                           : args.tail_dtype == DType::kBF16                   ? 16
                                                                               : 13;
    select_largest<kWords>(keys, slot.head_dim, slot.group, slot.keep, lowest_bit, mask);
    uint32_t* masks = reinterpret_cast<uint32_t*>(out) + row * slot.mask_words;
#pragma unroll
    for (int w = 0; w < kWords; w++) {
      if (lane == w && w < slot.mask_words) masks[w] = mask[w];
    }
  }

  const float scale = store_scale<kWords>(args, slot, values, mask, out, row, bad_code);
  const int n = stage_kept<kWords>(values, mask, scale, slot.dtype, staged);
  sync_warp();
  uint32_t* words = reinterpret_cast<uint32_t*>(out + slot.values_offset + row * slot.row_bytes);
  for (int i = lane; i < slot.row_bytes / 4; i += kWarpSize) {
    words[i] = pack_word(staged, n, i, slot.dtype);
  }
  sync_warp();  // the next row stages over these
}

template <int kWords>
__global__ void __launch_bounds__(kWarps* kWarpSize) compress_rows_kernel(CompressArgs args) {
  const CommitView& step = args.steps[blockIdx.z];
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (!has_new_block(step, block)) return;
  const SlotPlace at = slot_place(args, step, block, static_cast<int32_t>(blockIdx.y));
  const SlotLayout& slot = at.kind == kKeys ? args.layout.k : args.layout.v;
  if (slot.ragged) return;
  float* weight = reinterpret_cast<float*>(shared_memory());
  const bool weighted = load_weights(args, step, at, weight);
  sync_block();

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  uint32_t* staged = reinterpret_cast<uint32_t*>(weight + slot.head_dim) + warp * slot.head_dim;
  const int32_t first = step.sequence.n_sinks + block * kBlockTokens;
  for (int32_t row = warp; row < kBlockTokens; row += kWarps) {
    compress_row<kWords>(args, slot, at.run.row(first + row), weighted ? weight : nullptr, at.slot,
                         row, staged, bad_row_code(step, at, first + row));
  }
  zero_padding(slot, at.slot);
}

// Sinks and what follows the new blocks, 16 bytes a thread and chunk after chunk, each read whole
// before any of it is written: the new place overlaps the old when the buffer stays the same.
constexpr int kMoveThreads = 256;

template <typename Word>
__device__ void move_words(const DenseRun& run, int64_t from_row, int64_t n_rows, uint8_t* to) {
  const int64_t per_row = run.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t n = n_rows * per_row;
  Word* out = reinterpret_cast<Word*>(to);
  for (int64_t first = 0; first < n; first += kMoveThreads) {
    const int64_t i = first + threadIdx.x;
    Word word{};
    if (i < n) {
      word = reinterpret_cast<const Word*>(run.row(from_row + i / per_row))[i % per_row];
    }
    sync_block();
    if (i < n) out[i] = word;
    sync_block();
  }
}

__global__ void __launch_bounds__(kMoveThreads) move_rest_kernel(CompressArgs args) {
  const CommitView& step = args.steps[blockIdx.z];
  const int32_t heads = args.layout.n_kv_heads;
  const int32_t kind = static_cast<int32_t>(blockIdx.y) & 1;
  const int32_t head = static_cast<int32_t>(blockIdx.y) / 2 % heads;
  const int32_t layer = args.first_layer + static_cast<int32_t>(blockIdx.y) / 2 / heads;
  const int64_t row_bytes = args.layout.k.head_dim * (args.tail_dtype == DType::kF32 ? 4 : 2);
  const SequenceView& s = step.sequence;
  const DenseRun run = dense_run(s, step.dense_tokens, layer, kind, heads, head, row_bytes);
  uint8_t* out =
      step.dense_out + dense_offset(out_capacity(step), layer, kind, heads, head, row_bytes);
  const int64_t total = int64_t{step.dense_tokens} + step.fresh_tokens;
  const int64_t sinks = s.n_sinks < total ? s.n_sinks : total;
  const int64_t from = sinks + int64_t{step.n_new_blocks} * kBlockTokens;
  const auto move = [&](int64_t from_row, int64_t n_rows, uint8_t* to) {
    if (row_bytes % 16 == 0) {
      move_words<uint4>(run, from_row, n_rows, to);
    } else {
      move_words<uint32_t>(run, from_row, n_rows, to);
    }
  };
  move(0, sinks, out);
  if (from < total) move(from, total - from, out + sinks * row_bytes);
}

}  // namespace

void compress(const CompressArgs& args, Stream stream) {
  const int32_t head_dim = args.layout.k.head_dim;
  for (const SlotLayout* slot : {&args.layout.k, &args.layout.v}) {
    const int32_t group = slot->group;
    const bool whole = group == head_dim || (group <= 32 ? 32 % group == 0 : group % 32 == 0);
    if (!slot->dense && !slot->ragged && !whole) {
      throw Error("device \"cuda\" can't rank in groups of " + std::to_string(group) +
                  " dims (a divisor or a multiple of 32, or head_dim)");
    }
  }
  if (args.layout.k.dtype == DType::kCoded) return compress_coded(args, stream);
  const Grid grid{args.max_new_blocks, int64_t{args.n_layers} * args.layout.n_kv_heads * 2,
                  args.n_steps};
  const int64_t shared = int64_t{head_dim} * 4 * (1 + kWarps);
  const auto run = [&](auto kernel) {
    launch("compress_rows", kernel, grid, kWarps * kWarpSize, shared, stream, args);
  };
  if (head_dim <= 32) {
    run(compress_rows_kernel<1>);
  } else if (head_dim <= 64) {
    run(compress_rows_kernel<2>);
  } else if (head_dim <= 128) {
    run(compress_rows_kernel<4>);
  } else {
    run(compress_rows_kernel<8>);
  }
  if (args.layout.k.ragged || args.layout.v.ragged) compress_ragged(args, stream);
}

void move_rest(const CompressArgs& args, Stream stream) {
  const Grid grid{1, int64_t{args.n_layers} * args.layout.n_kv_heads * 2, args.n_steps};
  launch("move_rest", move_rest_kernel, grid, kMoveThreads, 0, stream, args);
}

}  // namespace mustafar::cuda
