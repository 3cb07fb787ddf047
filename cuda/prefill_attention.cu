// Flash attention for many query rows on the tensor cores: prefill, over store, dense buffer and
// the call's own tokens, causal and, in kernels of their own, within a window: tiles that none of a
// block's pairs sees are left out.
//
// Grid: x KV head, y sequence, z chunk of 128 pairs, the last (which see most) first. A pair is one
// query row and one query head of the KV head's group, so that a compressed tile is expanded once
// for the whole group; 4 warps, 32 pairs each. S = Q K^T and O = P V by 16x8x16 products over tiles
// of 64 tokens (prefill_tiles.cuh), the online softmax in registers in base 2. Q and K are f16
// whatever the tail, V and P in the tail's type.
//
// Tiles go through two stages, one barrier a tile: while the products run over one, the next is
// copied to the other by cp.async. Of the store, the next tile's slots are copied as they are to
// stage 1, and expanded to stage 0 by the whole block when its turn comes.
//
// A tile at head_dim 128, by count: 4 x 256 products are 1,024 cycles of the tensor cores at the
// dense peak, about 1,650 at what mma.sync is known to reach on sm_90. Cycles of shared memory (128
// bytes each, no bank conflict): ldmatrix 4 x 80 x 4 = 1,280 (K and V 512 each, Q 256), copies 256,
// bf16 keys to f16 256; so the products' floor is 67 % of them, 57 % in bf16. Instructions that a
// scheduler issues: about 870, in bf16 990 (SASS for sm_90a without masks and rescaling, which few
// tiles need). Exponentials: 512 cycles. head_dim 64 has half of everything but these. A tile of
// the store (K 12/32, V 4/16): 1,280 and about 650 cycles of shared memory, 53 %; 610 instructions
// in place of the conversion (int8 750).
//
// Shared: Q [128][D], two stages of K and V [64][D], 2 bytes each; value scales [64] f32; the
// expansion table; where the dense rows lie: 98.3 KiB at head_dim 128, two blocks a multiprocessor
// on sm_90. Limits: f16 or bf16 tail, head_dim 64 or 128; any store.
#include "cuda/async_copy.cuh"
#include "cuda/attention.h"
#include "cuda/device_ops.cuh"
#include "cuda/launch.cuh"
#include "cuda/matrix_ops.cuh"
#include "cuda/prefill_tiles.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kWarpPairs = 32;  // two products' rows
constexpr int kPairs = kPrefillWarps * kWarpPairs;
constexpr float kHeadroom = 8.0f;  // a weight of up to 2^8 keeps the old maximum
constexpr float kNoScore = -1e30f;

template <int kDim>
constexpr int kQueryBytes = 2 * kPairs * kDim;
template <int kDim>
constexpr int kSharedBytes =  // the stages take the block's output at the end
    kQueryBytes<kDim> + 2 * kStageBytes<kDim> + kTileTokens * 4 + kTableBytes +
    16 * ((sizeof(DenseRows) + 15) / 16);

// What the kernel is given beside AttentionArgs, worked out once on the host.
struct PrefillPlan {
  StoreTiles store;
  int32_t heads_per_kv;
};

// The block's 128 pairs: which row and head each is, and how many tokens it sees.
class Pairs {
 public:
  __device__ __forceinline__ Pairs(const AttentionArgs& args, const PrefillPlan& plan,
                                   const SequenceView& s)
      : args_(args),
        plan_(plan),
        // Chunks that see most come first.
        first_(static_cast<int32_t>(gridDim.z - 1 - blockIdx.z) * kPairs),
        all_(s.n_rows * plan.heads_per_kv),
        sees0_(s.n_blocks * kBlockTokens + s.dense_tokens + s.pos0 - s.fresh_pos0 + 1) {}

  __device__ __forceinline__ int32_t first() const { return first_; }
  __device__ __forceinline__ int32_t all() const { return all_; }  // of the sequence and KV head
  __device__ __forceinline__ int32_t clamped(int32_t pair) const {
    return pair < all_ ? pair : all_ - 1;
  }
  __device__ __forceinline__ int32_t sees(int32_t pair) const {
    return sees0_ + clamped(pair) / plan_.heads_per_kv;
  }
  __device__ __forceinline__ int32_t position(const SequenceView& s, int32_t pair) const {
    return s.pos0 + clamped(pair) / plan_.heads_per_kv;
  }
  // Of (row, head) in the batch.
  __device__ __forceinline__ int64_t index(const SequenceView& s, int32_t pair) const {
    const int32_t heads = plan_.heads_per_kv;
    return int64_t{s.row0 + pair / heads} * args_.n_heads + static_cast<int>(blockIdx.x) * heads +
           pair % heads;
  }

 private:
  const AttentionArgs& args_;
  const PrefillPlan& plan_;
  int32_t first_, all_, sees0_;
};

// The block's queries, scaled for base 2, as a tile of 128 rows of f16.
template <int kDim>
__device__ __forceinline__ void load_queries(const float* q, const SequenceView& s,
                                             const Pairs& pairs, uint8_t* tile) {
  constexpr int kChunks = kDim / 8;
  const float scale = kLog2E / sqrtf(static_cast<float>(kDim));
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 8  // their loads under way together
  for (int i = 0; i < kChunks; i++) {
    const int row = (i * kPrefillThreads + thread) / kChunks, chunk = thread % kChunks;
    const float4* from = reinterpret_cast<const float4*>(
        q + pairs.index(s, pairs.clamped(pairs.first() + row)) * kDim + chunk * 8);
    const float4 a = from[0], b = from[1];
    *reinterpret_cast<uint4*>(tile + tile_offset<kDim>(row, chunk)) = {
        pack2_f16_saturated(a.x * scale, a.y * scale),
        pack2_f16_saturated(a.z * scale, a.w * scale),
        pack2_f16_saturated(b.x * scale, b.y * scale),
        pack2_f16_saturated(b.z * scale, b.w * scale)};
  }
}

// Blocks per multiprocessor are stated: two hide each other's barriers and expansion.
// kScaled: value tiles hold integer codes, so their scales go to the weights. kWindow: args.window.
template <DType kType, int kDim, bool kScaled, bool kWindow>
__global__ void __launch_bounds__(kPrefillThreads, 2)
    prefill_attention_kernel(AttentionArgs args, PrefillPlan plan) {
  constexpr int kRowBytes = kDim * 2;
  const SequenceView& s = args.sequences[blockIdx.y];
  const Pairs pairs(args, plan, s);
  if (pairs.first() >= pairs.all()) return;

  uint8_t* queries = shared_memory();
  uint8_t* stages = queries + kQueryBytes<kDim>;
  float* scales = reinterpret_cast<float*>(stages + 2 * kStageBytes<kDim>);  // [64], of the values
  uint8_t* table = reinterpret_cast<uint8_t*>(scales + kTileTokens);
  const int32_t end = pairs.sees(pairs.first() + kPairs - 1);
  // The first tiles of store and dense rows that the first pair, whose window begins first, sees.
  int32_t tile = 0, dense_tile = s.n_blocks;
  if constexpr (kWindow) {
    const HiddenRows hidden = hidden_before(s, pairs.position(s, pairs.first()) - args.window + 1);
    dense_tile += hidden.dense / kTileTokens;
    tile = hidden.store / kTileTokens;
    if (tile == s.n_blocks) tile = dense_tile;
  }
  const auto next_tile = [&] { return kWindow && tile + 1 == s.n_blocks ? dense_tile : tile + 1; };
  TileSource<kType, kDim> source(args, s, plan.store, tile, end, stages,
                                 reinterpret_cast<DenseRows*>(table + kTableBytes));
  sync_block();
  source.start(tile, 1);
  load_queries<kDim>(args.q, s, pairs, queries);
  source.fill_table(table);

  const int lane = lane_id(), g = lane >> 2, c = lane & 3;
  const int32_t warp_pair =
      pairs.first() + static_cast<int32_t>(threadIdx.x) / kWarpSize * kWarpPairs;
  // What the warp's first and last pairs see; nothing where it has none.
  const int32_t warp_sees = pairs.sees(warp_pair);
  const int32_t warp_end = warp_pair < pairs.all() ? pairs.sees(warp_pair + kWarpPairs - 1) : 0;
  // This lane's rows for ldmatrix; the chunk of step i is found by an exclusive or with 32 i.
  const int q_at = tile_offset<kDim>(warp_pair - pairs.first() + lane % 16, lane / 16);
  const int k_at = tile_offset<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const int v_at = tile_offset<kDim>(lane % 8 + lane / 8 % 2 * 8, lane / 16);

  // Of this lane's rows g, g + 8, g + 16, g + 24.
  float shift[4], sum[4];
#pragma unroll
  for (int r = 0; r < 4; r++) {
    shift[r] = kNoScore;
    sum[r] = 0.0f;
  }
  float out[2][kDim / 8][4] = {};

  const int32_t n_tiles = (end + kTileTokens - 1) / kTileTokens;
  int stage = 1;
#pragma unroll 1
  for (; tile < n_tiles; tile = next_tile()) {
    const int32_t first = tile * kTileTokens;
    const bool expands = source.expands(tile);
    cp_async_wait<0>();
    if (!expands) source.convert_keys(stage);
    sync_block();  // the tile is here, and all are done with the one before
    if (expands) {
      source.expand(tile, table, scales);
      sync_block();
      stage = 0;
    } else if (kScaled && tile == dense_tile) {  // dense rows from here on
      if (threadIdx.x < kTileTokens) scales[threadIdx.x] = 1.0f;
      sync_block();
    }
    const uint8_t* keys = source.stage(stage);
    const uint8_t* values = keys + kTileBytes<kDim>;
    stage ^= 1;
    if (next_tile() < n_tiles) source.start(next_tile(), stage);
    if (first >= warp_end) continue;
    const auto hidden_rows = [&](int32_t pair) {  // of the tile, the first ones
      const HiddenRows hidden = hidden_before(s, pairs.position(s, pair) - args.window + 1);
      return tile < s.n_blocks ? hidden.store - first
                               : hidden.dense - first + s.n_blocks * kTileTokens;
    };
    if (kWindow && hidden_rows(warp_pair) >= kTileTokens) continue;

    float scores[2][kTileTokens / 8][4] = {};
#pragma unroll
    for (int i = 0; i < kDim / 16; i++) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) {
        load_matrices<false>(a[m], queries + (q_at ^ 32 * i) + m * 16 * kRowBytes);
      }
#pragma unroll
      for (int j = 0; j < kTileTokens / 16; j++) {
        uint32_t b[4];
        load_matrices<false>(b, keys + (k_at ^ 32 * i) + j * 16 * kRowBytes);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma_16x8x16<DType::kF16>(scores[m][2 * j], a[m], low);
          mma_16x8x16<DType::kF16>(scores[m][2 * j + 1], a[m], high);
        }
      }
    }

    if (first + kTileTokens > warp_sees) {
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const int32_t sees = pairs.sees(warp_pair + g + 8 * r) - first - 2 * c;
#pragma unroll
        for (int j = 0; j < kTileTokens / 8; j++) {
#pragma unroll
          for (int n = 0; n < 2; n++) {
            if (8 * j + n >= sees) scores[r / 2][j][r % 2 * 2 + n] = -INFINITY;
          }
        }
      }
    }

    if (kWindow && hidden_rows(warp_pair + kWarpPairs - 1) > 0) {
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const int32_t hidden = hidden_rows(warp_pair + g + 8 * r) - 2 * c;
#pragma unroll
        for (int j = 0; j < kTileTokens / 8; j++) {
#pragma unroll
          for (int n = 0; n < 2; n++) {
            if (8 * j + n < hidden) scores[r / 2][j][r % 2 * 2 + n] = -INFINITY;
          }
        }
      }
    }

    // A maximum that is passed by little may stay: weights are then more than 1, all by one factor.
    float highest[4];
    bool passed = false;
#pragma unroll
    for (int r = 0; r < 4; r++) {
      highest[r] = scores[r / 2][0][r % 2 * 2];
#pragma unroll
      for (int j = 0; j < kTileTokens / 8; j++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
          highest[r] = fmaxf(highest[r], scores[r / 2][j][r % 2 * 2 + n]);
        }
      }
      passed = passed || highest[r] > shift[r] + kHeadroom;
    }
    if (ballot(passed) != 0u) {
#pragma unroll
      for (int r = 0; r < 4; r++) {
        highest[r] = fmaxf(highest[r], shuffle_xor(highest[r], 1));
        highest[r] = fmaxf(highest[r], shuffle_xor(highest[r], 2));
        const float raised = fmaxf(highest[r], shift[r]);
        const float rescale = exp2_approx(shift[r] - raised);
        shift[r] = raised;
        sum[r] *= rescale;
#pragma unroll
        for (int i = 0; i < kDim / 8; i++) {
          out[r / 2][i][r % 2 * 2] *= rescale;
          out[r / 2][i][r % 2 * 2 + 1] *= rescale;
        }
      }
    }

#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
      for (int j = 0; j < kTileTokens / 8; j++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
          float& score = scores[r / 2][j][r % 2 * 2 + n];
          score = exp2_approx(score - shift[r]);
          sum[r] += score;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTileTokens / 16; j++) {
      if constexpr (kScaled) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const float scale = scales[16 * j + 8 * (n / 2) + 2 * c + n % 2];
#pragma unroll
          for (int r = 0; r < 4; r++) scores[r / 2][2 * j + n / 2][r % 2 * 2 + n % 2] *= scale;
        }
      }
      uint32_t p[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const float* pair = &scores[m][2 * j + n / 2][n % 2 * 2];
          p[m][n] = pack2<kType>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int i = 0; i < kDim / 16; i++) {
        uint32_t b[4];
        load_matrices<true>(b, values + (v_at ^ 32 * i) + j * 16 * kRowBytes);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma_16x8x16<kType>(out[m][2 * i], p[m], low);
          mma_16x8x16<kType>(out[m][2 * i + 1], p[m], high);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 4; r++) {
    sum[r] += shuffle_xor(sum[r], 1);
    sum[r] += shuffle_xor(sum[r], 2);
  }
  if (args.writes_out) {
    sync_block();  // the stages are free
    float* rows = reinterpret_cast<float*>(source.stage(0)) + (warp_pair - pairs.first()) * kDim;
    const int32_t groups = s.transform.v_backward != nullptr ? 1 : s.transform.v_groups;
    const int32_t members = kDim / groups;  // of a group: the inverse of stored_index
#pragma unroll
    for (int r = 0; r < 4; r++) sum[r] = 1.0f / sum[r];
#pragma unroll
    for (int i = 0; i < kDim / 8; i++) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const int32_t stored = 8 * i + 2 * c + n;
        const int32_t d = stored % members * groups + stored / members;
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const int row = g + 8 * r;
          rows[row * kDim + (d ^ (row & 7) * 4)] = out[r / 2][i][r % 2 * 2 + n] * sum[r];
        }
      }
    }
    sync_warp();
    for (int i = lane; i < kWarpPairs * kDim / 4; i += kWarpSize) {
      const int row = i / (kDim / 4), chunk = i % (kDim / 4);
      if (warp_pair + row >= pairs.all()) break;
      reinterpret_cast<float4*>(args.out + pairs.index(s, warp_pair + row) * kDim)[chunk] =
          reinterpret_cast<const float4*>(rows + row * kDim)[chunk ^ (row & 7)];
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < 4; r++) {
    const int32_t pair = warp_pair + g + 8 * r;
    if (pair >= pairs.all()) continue;
    float* partial = args.partials + pairs.index(s, pair) * args.max_splits * (kDim + 2);
#pragma unroll
    for (int i = 0; i < kDim / 8; i++) {
      partial[8 * i + 2 * c] = out[r / 2][i][r % 2 * 2];
      partial[8 * i + 2 * c + 1] = out[r / 2][i][r % 2 * 2 + 1];
    }
    if (c == 0) {
      partial[kDim] = shift[r];
      partial[kDim + 1] = sum[r];
    }
  }
}

}  // namespace

bool prefill_attention_fast(const AttentionArgs& args, Stream stream) {
  const bool half_tail = args.tail_dtype == DType::kF16 || args.tail_dtype == DType::kBF16;
  if (!half_tail || (args.head_dim != 64 && args.head_dim != 128)) return false;
  const int32_t heads_per_kv = args.n_heads / args.n_kv_heads;
  const int64_t pairs = int64_t{args.max_row_count} * heads_per_kv;
  const Grid grid{args.n_kv_heads, args.n_sequences, (pairs + kPairs - 1) / kPairs};
  const auto run = [&](auto kernel, int64_t shared_bytes, int64_t stage_bytes) {
    launch("prefill_attention", kernel, grid, kPrefillThreads, shared_bytes, stream, args,
           PrefillPlan{store_tiles(args.layout, args.tail_dtype, stage_bytes), heads_per_kv});
  };
  const auto run_dim = [&]<int kDim>() {
    const bool scaled = has_scales(args.layout.v.dtype);
    const auto run_window = [&]<bool kWindow>() {
      run(args.tail_dtype == DType::kF16
              ? prefill_attention_kernel<DType::kF16, kDim, false, kWindow>
          : scaled ? prefill_attention_kernel<DType::kBF16, kDim, true, kWindow>
                   : prefill_attention_kernel<DType::kBF16, kDim, false, kWindow>,
          kSharedBytes<kDim>, kStageBytes<kDim>);
    };
    args.window > 0 ? run_window.template operator()<true>()
                    : run_window.template operator()<false>();
  };
  args.head_dim == 64 ? run_dim.template operator()<64>() : run_dim.template operator()<128>();
  return true;
}

}  // namespace mustafar::cuda
