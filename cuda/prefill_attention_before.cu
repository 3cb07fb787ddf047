// The prefill kernel before prefill_attention.cu was built anew, kept until both are measured on
// one GPU.
//
// Flash attention for many query rows on the tensor cores: prefill, over store, dense buffer and
// the call's own tokens, causal.
//
// Grid: x chunk of 64 pairs, y KV head, z sequence. A pair is one query row and one query head of
// the KV head's group, so that a compressed tile is expanded once for the whole group; 4 warps, 16
// pairs each. Tiles of 64 tokens are expanded (or copied) to shared memory in the tail's type, a
// warp per row; S = Q K^T and O = P V by 16x8x16 products, the online softmax in registers in
// base 2. Rows of shared memory are D + 8 values apart, which keeps ldmatrix free of bank
// conflicts.
//
// bf16 holds an integer code exactly but not code times scale, so with a bf16 tail the tiles hold
// codes and the scales go to the scores and to P.
//
// Shared: K and V tiles [64][D + 8], their rows' scales [64] f32 each. Limits: f16 or bf16 tail,
// head_dim 64 or 128; any store.
#include "cuda/attention.h"
#include "cuda/device_ops.cuh"
#include "cuda/launch.cuh"
#include "cuda/unpack.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kPairs = 64;
constexpr int kTokens = 64;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

// Tokens [first, last) of one kind into shared memory; zeros past the end.
template <DType kType, int kDim>
__device__ void load_tile(const AttentionArgs& args, const SequenceView& s, const DenseRun& run,
                          int kind, int kv_head, int32_t first, int32_t last, uint16_t* tile,
                          float* scales) {
  const SlotLayout& slot = kind == 0 ? args.layout.k : args.layout.v;
  const int64_t at = kind == 0 ? k_slot_offset(args.layout, args.layer, kv_head)
                               : v_slot_offset(args.layout, args.layer, kv_head);
  const int32_t stored = s.n_blocks * kBlockTokens;
  for (int t = static_cast<int>(threadIdx.x) / kWarpSize; t < kTokens; t += kWarps) {
    const int32_t token = first + t;
    uint16_t* row = tile + t * (kDim + 8);
    if (token < stored) {
      const uint8_t* block = s.pages[token / kBlockTokens] + at;
      const float scale = stored_scale(slot, block, token % kBlockTokens);
      const bool codes = kType == DType::kBF16;
      if (lane_id() == 0) scales[t] = codes ? scale : 1.0f;
      unpack_row_to(
          slot, block, nullptr, token % kBlockTokens, codes ? 1.0f : scale,
          [row](int d, float x) { row[d] = kType == DType::kF16 ? float_f16(x) : float_bf16(x); });
    } else {
      if (lane_id() == 0) scales[t] = 1.0f;
      const uint32_t* from =
          token < last ? reinterpret_cast<const uint32_t*>(run.row(token - stored)) : nullptr;
      for (int i = lane_id(); i < kDim / 2; i += kWarpSize) {
        reinterpret_cast<uint32_t*>(row)[i] = from != nullptr ? from[i] : 0u;
      }
    }
  }
}

// Blocks per multiprocessor are stated: left to choose, ptxas aims at four for f16 x 64 and spills.
template <DType kType, int kDim>
__global__ void __launch_bounds__(kThreads, kDim == 64 ? 3 : 2)
    prefill_before_kernel(AttentionArgs args) {
  constexpr int kStride = kDim + 8;
  const SequenceView& s = args.sequences[blockIdx.z];
  const int heads_per_kv = args.n_heads / args.n_kv_heads;
  const int32_t all_pairs = s.n_rows * heads_per_kv;
  const int32_t first_pair = static_cast<int32_t>(blockIdx.x) * kPairs;
  if (first_pair >= all_pairs) return;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane >> 2, c = lane & 3;

  // A pair's row and head in the batch, and how many tokens it sees.
  const int32_t stored = s.n_blocks * kBlockTokens;
  const int32_t before = stored + s.dense_tokens;
  const auto index_of = [&](int32_t pair) {
    return int64_t{s.row0 + pair / heads_per_kv} * args.n_heads + kv_head * heads_per_kv +
           pair % heads_per_kv;
  };
  const auto visible = [&](int32_t pair) {
    return before + s.pos0 + pair / heads_per_kv - s.fresh_pos0 + 1;
  };
  const int32_t end_pair = first_pair + kPairs < all_pairs ? first_pair + kPairs : all_pairs;
  const int32_t last_token = visible(end_pair - 1);
  int32_t pairs[2], sees[2];  // of this lane's rows g and g + 8
  // bf16 keeps a query in two terms: with one, its rounding would be the largest error.
  constexpr int kTerms = kType == DType::kBF16 ? 2 : 1;
  uint32_t q[kTerms][kDim / 16][4];
  const float scale = 1.44269504f / sqrtf(static_cast<float>(kDim));
#pragma unroll
  for (int r = 0; r < 2; r++) {
    pairs[r] = first_pair + warp * 16 + g + 8 * r;
    const int32_t pair = pairs[r] < all_pairs ? pairs[r] : all_pairs - 1;
    sees[r] = visible(pair);
    const float* row = args.q + index_of(pair) * kDim;
#pragma unroll
    for (int i = 0; i < kDim / 16; i++) {
      const float* x = row + 16 * i + 2 * c;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float rest[2] = {x[8 * j] * scale, x[8 * j + 1] * scale};
#pragma unroll
        for (int term = 0; term < kTerms; term++) {
          const uint32_t word = pack2<kType>(rest[0], rest[1]);
          q[term][i][2 * j + r] = word;
          rest[0] -= half_float<kType>(static_cast<uint16_t>(word));
          rest[1] -= half_float<kType>(static_cast<uint16_t>(word >> 16));
        }
      }
    }
  }

  uint16_t* keys = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* values = keys + kTokens * kStride;
  float* key_scales = reinterpret_cast<float*>(values + kTokens * kStride);
  float* value_scales = key_scales + kTokens;
  const bool scaled_keys = has_scales(args.layout.k.dtype);
  const bool scaled_values = has_scales(args.layout.v.dtype);
  const int64_t row_bytes = kDim * 2;
  const DenseRun key_run =
      dense_run(s, s.dense_tokens, args.layer, 0, args.n_kv_heads, kv_head, row_bytes);
  const DenseRun value_run =
      dense_run(s, s.dense_tokens, args.layer, 1, args.n_kv_heads, kv_head, row_bytes);
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  float out[kDim / 8][4] = {};

  for (int32_t first = 0; first < last_token; first += kTokens) {
    sync_block();  // all are done with the last tile
    load_tile<kType, kDim>(args, s, key_run, 0, kv_head, first, last_token, keys, key_scales);
    load_tile<kType, kDim>(args, s, value_run, 1, kv_head, first, last_token, values, value_scales);
    sync_block();

    float scores[kTokens / 8][4] = {};
#pragma unroll
    for (int i = 0; i < kDim / 16; i++) {
#pragma unroll
      for (int j = 0; j < kTokens / 16; j++) {
        uint32_t b[4];
        const int token = 16 * j + lane % 8 + lane / 16 * 8, dim = 16 * i + lane / 8 % 2 * 8;
        load_matrices<false>(b, keys + token * kStride + dim);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int term = 0; term < kTerms; term++) {
          mma_16x8x16<kType>(scores[2 * j], q[term][i], low);
          mma_16x8x16<kType>(scores[2 * j + 1], q[term][i], high);
        }
      }
    }

    if (scaled_keys) {
#pragma unroll
      for (int j = 0; j < kTokens / 8; j++) {
#pragma unroll
        for (int n = 0; n < 4; n++) scores[j][n] *= key_scales[8 * j + 2 * c + n % 2];
      }
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
      float tile_max = max[r];
#pragma unroll
      for (int j = 0; j < kTokens / 8; j++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
          float& score = scores[j][2 * r + n];
          if (first + 8 * j + 2 * c + n >= sees[r]) score = -INFINITY;
          tile_max = fmaxf(tile_max, score);
        }
      }
      tile_max = fmaxf(tile_max, shuffle_xor(tile_max, 1));
      tile_max = fmaxf(tile_max, shuffle_xor(tile_max, 2));
      const float shift = tile_max == -INFINITY ? 0.0f : tile_max;
      const float rescale = exp2_approx(max[r] - shift);
      max[r] = tile_max;
      sum[r] *= rescale;
#pragma unroll
      for (int j = 0; j < kTokens / 8; j++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
          scores[j][2 * r + n] = exp2_approx(scores[j][2 * r + n] - shift);
          sum[r] += scores[j][2 * r + n];
        }
      }
#pragma unroll
      for (int i = 0; i < kDim / 8; i++) {
        out[i][2 * r] *= rescale;
        out[i][2 * r + 1] *= rescale;
      }
    }

    if (scaled_values) {
#pragma unroll
      for (int j = 0; j < kTokens / 8; j++) {
#pragma unroll
        for (int n = 0; n < 4; n++) scores[j][n] *= value_scales[8 * j + 2 * c + n % 2];
      }
    }
#pragma unroll
    for (int j = 0; j < kTokens / 16; j++) {
      const uint32_t p[4] = {pack2<kType>(scores[2 * j][0], scores[2 * j][1]),
                             pack2<kType>(scores[2 * j][2], scores[2 * j][3]),
                             pack2<kType>(scores[2 * j + 1][0], scores[2 * j + 1][1]),
                             pack2<kType>(scores[2 * j + 1][2], scores[2 * j + 1][3])};
#pragma unroll
      for (int i = 0; i < kDim / 16; i++) {
        uint32_t b[4];
        const int token = 16 * j + lane % 8 + lane / 8 % 2 * 8, dim = 16 * i + lane / 16 * 8;
        load_matrices<true>(b, values + token * kStride + dim);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_16x8x16<kType>(out[2 * i], p, low);
        mma_16x8x16<kType>(out[2 * i + 1], p, high);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] += shuffle_xor(sum[r], 1);
    sum[r] += shuffle_xor(sum[r], 2);
    if (pairs[r] >= all_pairs) continue;
    float* partial = args.partials + index_of(pairs[r]) * args.max_splits * (kDim + 2);
#pragma unroll
    for (int i = 0; i < kDim / 8; i++) {
      partial[8 * i + 2 * c] = out[i][2 * r];
      partial[8 * i + 2 * c + 1] = out[i][2 * r + 1];
    }
    if (c == 0) {
      partial[kDim] = max[r];
      partial[kDim + 1] = sum[r];
    }
  }
}

}  // namespace

bool prefill_attention_before(const AttentionArgs& args, Stream stream) {
  const bool half_tail = args.tail_dtype == DType::kF16 || args.tail_dtype == DType::kBF16;
  const bool coded = args.layout.k.dtype == DType::kCoded;
  if (!half_tail || coded || (args.head_dim != 64 && args.head_dim != 128)) return false;
  const int64_t pairs = int64_t{args.max_row_count} * (args.n_heads / args.n_kv_heads);
  const Grid grid{(pairs + kPairs - 1) / kPairs, args.n_kv_heads, args.n_sequences};
  const auto run = [&](auto kernel) {
    launch("prefill_attention_before", kernel, grid, kThreads,
           kTokens * ((args.head_dim + 8) * 4 + 8), stream, args);
  };
  if (args.tail_dtype == DType::kF16) {
    args.head_dim == 64 ? run(prefill_before_kernel<DType::kF16, 64>)
                        : run(prefill_before_kernel<DType::kF16, 128>);
  } else {
    args.head_dim == 64 ? run(prefill_before_kernel<DType::kBF16, 64>)
                        : run(prefill_before_kernel<DType::kBF16, 128>);
  }
  return true;
}

}  // namespace mustafar::cuda
