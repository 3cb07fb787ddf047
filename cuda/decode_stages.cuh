// The memory side of the decode kernel: 16 rows of K and 16 of V per warp and tile, copied to a
// stage of shared memory as they are stored, and expanded from there into fragments.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/attention.h"
#include "cuda/device_ops.cuh"
#include "cuda/expand.cuh"

namespace mustafar::cuda {

constexpr int kDecodeTokens = 16;  // of a tile, per warp
constexpr int kStages = 3;         // tiles of a warp in shared memory: one in use, two on their way
constexpr int kStageSlack = 16;    // bytes that a run of any length may read past its row
constexpr int kMostSplits = 8;     // of a block, one after another

// Some tiles of the store that lie one after another.
struct TileRun {
  const uint8_t* const* pages;
  int64_t slot_at;  // bytes from a page to the slot of the KV head's keys
  int32_t n;
  int32_t hidden_rows;  // of the first tile, before the layer's window
};

// The slots of a run's first tiles, where it has any: loaded all at once, with the list of a plan,
// before anything waits for one of them.
struct FirstSlots {
  const uint8_t* slots[kStages - 1];

  __device__ __forceinline__ explicit FirstSlots(const TileRun& run) {
#pragma unroll
    for (int i = 0; i < kStages - 1; i++) {
      slots[i] = load_constant_pointer(run.pages + (i < run.n ? i : 0)) + run.slot_at;
    }
  }
};

// What a block works on. It is kept in shared memory: the loop over the tiles has no registers to
// spare, and would wait at every tile if it fetched the page's address from global memory.
struct BlockPlan {
  static constexpr int kListed = kListedTiles;

  const uint8_t* slots[kListed];    // of the KV head's keys, in the first tiles
  TileRun run;                      // all of them
  int32_t begins[kMostSplits + 1];  // of its splits: tiles, the dense buffer's too; then the end
  int32_t row, first_split, n_splits, kv_head;
  int32_t first_head, n_heads;   // query heads
  int32_t n_blocks;              // tiles that are the store's
  int32_t first_row, n_rows;     // of the dense buffer, seen
  const uint8_t *keys, *values;  // the first of those rows, when their turn comes

  __device__ __forceinline__ const uint8_t* slot(int32_t i) const {
    if (i < kListed) [[likely]]
      return slots[i];
    return load_constant_pointer(run.pages + i) + run.slot_at;
  }
};
constexpr int kPlanBytes = (sizeof(BlockPlan) + 15) / 16 * 16;

// What of a warp's 16 tokens in tile `tile` of a run its layer's window hides. first: this lane's
// first token of the 16, the second being eight later.
struct HiddenTokens {
  static constexpr bool kAny = true;
  int32_t hidden_rows, tile, first;

  __device__ __forceinline__ bool any() const { return tile == 0 && hidden_rows > 0; }
  __device__ __forceinline__ bool hides(int i) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    return warp * kDecodeTokens + first + 8 * i < hidden_rows;
  }
};

// Floats of a query's partial: output, max, sum.
template <typename Shape>
constexpr int kPartialFloats = Shape::kDim + 2;

// Where the partial of a query of the block goes: of a split, counted from the block's first.
template <typename Shape>
__device__ __forceinline__ float* partial_of(const AttentionArgs& args, const BlockPlan& plan,
                                             int split, int query) {
  const int64_t head = int64_t{plan.row} * args.n_heads + plan.first_head + query;
  return args.partials +
         (head * args.max_splits + plan.first_split + split) * kPartialFloats<Shape>;
}

// A run's tiles one after another, copied kStages - 1 ahead. Copy: copy(slot, stage) starts this
// lane's part of the copy of a tile.
template <typename Copy>
class TileStream {
 public:
  // Starts the first copies, for which the list of slots need not be ready.
  __device__ __forceinline__ TileStream(const TileRun& run, const FirstSlots& first,
                                        const BlockPlan& plan, uint8_t* stages, int32_t stage_bytes,
                                        const Copy& copy)
      : plan_(plan),
        n_(run.n),
        stage_bytes_(stage_bytes),
        used_((kStages - 1) * stage_bytes),
        stages_(stages),
        copy_(copy) {
#pragma unroll
    for (int i = 0; i < kStages - 1; i++) {
      if (i < n_) copy_(first.slots[i], stages_ + i * stage_bytes);
      cp_async_commit();
    }
  }

  // The stage of the last tile, by bytes from the first stage.
  __device__ __forceinline__ int32_t used() const { return used_; }

  // The stage of tile i, which is 0, then one more than before, by the whole warp. It stays until
  // the call after.
  __device__ __forceinline__ const uint8_t* next(int32_t i) {
    arrive();
    refill(i);
    return stages_ + used_;
  }

  // next() in two steps, for warps that read each other's stages: all are done with the tile before
  // when the second is called. arrive() waits for this warp's rows of the tile; returns bytes from
  // the first stage to its stage.
  __device__ __forceinline__ int32_t arrive() const {
    cp_async_wait<kStages - 2>();
    sync_warp();  // the copies of all lanes are here, and all are done with the stage to refill
    return after_used();
  }
  __device__ __forceinline__ void refill(int32_t i) {
    const int32_t ahead = i + kStages - 1;
    if (ahead < n_) {
      const uint8_t* slot = plan_.slot(ahead);
      copy_(slot, stages_ + used_);
    }
    cp_async_commit();
    used_ = after_used();
  }

 private:
  __device__ __forceinline__ int32_t after_used() const {
    return used_ == (kStages - 1) * stage_bytes_ ? 0 : used_ + stage_bytes_;
  }

  const BlockPlan& plan_;
  int32_t n_, stage_bytes_;
  int32_t used_;  // bytes to the stage of the last tile
  uint8_t* stages_;
  const Copy& copy_;
};

// A run's tiles, split after split: attend(i) takes tile i, finish(split, whole) what the tiles of
// one left, splits counted from the block's first. whole: false where the split goes on in the
// dense buffer.
template <typename Attend, typename Finish>
__device__ __forceinline__ void for_splits(const BlockPlan& plan, int32_t n_tiles, Attend&& attend,
                                           Finish&& finish) {
  int32_t i = 0;
#pragma unroll 1
  for (int32_t split = 0; i < n_tiles; split++) {
    // Read again after the tiles: one register less in their loop.
    const auto until = [&] { return plan.begins[split + 1] - plan.begins[0]; };
    const int32_t end = until() < n_tiles ? until() : n_tiles;
    do {  // no split is empty
      attend(i);
    } while (++i < end);
    finish(split, until() <= n_tiles);
  }
}

// Where a warp's 16 rows of a slot lie in a stage.
struct Piece {
  int32_t mask_bytes, value_bytes, scale_bytes;

  __device__ __forceinline__ int32_t bytes() const {
    return mask_bytes + value_bytes + scale_bytes;
  }
};

MUSTAFAR_HOST_DEVICE inline Piece piece_of(const SlotLayout& slot) {
  return {kDecodeTokens * slot.mask_words * 4, kDecodeTokens * slot.row_bytes,
          has_scales(slot.dtype) ? kDecodeTokens * 2 : 0};
}

// The same of a layout that is compiled in.
template <typename Shape>
__device__ __forceinline__ Piece fixed_piece(int32_t row_bytes) {
  return {kDecodeTokens * Shape::kDim / 8, kDecodeTokens * row_bytes,
          Shape::kBits == 16 ? 0 : kDecodeTokens * 2};
}

// Which 16 bytes a lane copies: a stage holds a warp's K masks, values and scales, then V's, end to
// end, and chunk n of it goes to lane n % 32.
struct CopyPlan {
  Piece k, v;
  int32_t k_values, k_scales, v_slot, v_values, v_scales;  // bytes from the K slot
  int warp;

  // Bytes from the K slot to what belongs at byte `at` of the stage.
  __device__ __forceinline__ uint32_t source(int32_t at) const {
    return static_cast<uint32_t>(signed_source(at));
  }

 private:
  __device__ __forceinline__ int32_t signed_source(int32_t at) const {
    if (at < k.mask_bytes) return warp * k.mask_bytes + at;
    at -= k.mask_bytes;
    if (at < k.value_bytes) return k_values + warp * k.value_bytes + at;
    at -= k.value_bytes;
    if (at < k.scale_bytes) return k_scales + warp * k.scale_bytes + at;
    at -= k.scale_bytes;
    if (at < v.mask_bytes) return v_slot + warp * v.mask_bytes + at;
    at -= v.mask_bytes;
    if (at < v.value_bytes) return v_slot + v_values + warp * v.value_bytes + at;
    return v_slot + v_scales + warp * v.scale_bytes + at - v.value_bytes;
  }
};

// Copies stage after stage. Where the layout is compiled in, a lane works out its chunks once.
template <typename Shape>
class StageCopier {
 public:
  __device__ __forceinline__ explicit StageCopier(const CopyPlan& plan) : plan_(plan) {
    if constexpr (Shape::kFixed) {
#pragma unroll
      for (int i = 0; i < kChunks; i++) source_[i] = plan.source((i * kWarpSize + lane_id()) * 16);
    }
  }

  __device__ __forceinline__ void start(const uint8_t* k_slot, uint8_t* stage) const {
    const int32_t at = lane_id() * 16;
    if constexpr (Shape::kFixed) {
#pragma unroll
      for (int i = 0; i < kChunks; i++) {
        if ((i + 1) * kWarpSize * 16 <= Shape::kStageBytes || at < kLastBytes) {
          cp_async16(stage + at + i * kWarpSize * 16, k_slot + source_[i]);
        }
      }
    } else {
      const int32_t bytes = plan_.k.bytes() + plan_.v.bytes();
#pragma unroll 1
      for (int32_t to = at; to < bytes; to += kWarpSize * 16) {
        cp_async16(stage + to, k_slot + plan_.source(to));
      }
    }
  }

 private:
  static constexpr int kChunks =
      Shape::kFixed ? (Shape::kStageBytes + kWarpSize * 16 - 1) / (kWarpSize * 16) : 1;
  static constexpr int kLastBytes = Shape::kStageBytes - (kChunks - 1) * kWarpSize * 16;
  CopyPlan plan_;
  uint32_t source_[kChunks];  // unsigned: no sign to extend in the loop
};

// A lane's dims of one staged row. kDims from first_dim on; run: its index among the row's runs.
template <int kBits, int kDims, int kRunWords>
__device__ __forceinline__ void expand_row(const SlotLayout& slot, const Piece& piece,
                                           const uint8_t* stage, int token, int run,
                                           const uint8_t* lane_table, uint32_t bias,
                                           uint32_t (&out)[kExpandedWords<kBits, kDims>]) {
  const uint8_t* values = stage + piece.mask_bytes + token * slot.row_bytes;
  const int first_dim = run * kDims;
  if constexpr (kRunWords > 0) {
    uint32_t mask;
    if constexpr (kDims == 32) {
      mask = reinterpret_cast<const uint32_t*>(stage)[token * 4 + run];
    } else {
      mask = reinterpret_cast<const uint16_t*>(stage)[token * 8 + run];
    }
    constexpr int kRowWords = 128 / kDims * kRunWords;  // a constant row lets offsets fold
    const uint32_t* words = reinterpret_cast<const uint32_t*>(stage + piece.mask_bytes) +
                            token * kRowWords + run * kRunWords;
    uint32_t held[kRunWords];
    if constexpr (kRunWords % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kRunWords; i += 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(words + i);
        held[i] = two.x;
        held[i + 1] = two.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRunWords; i++) held[i] = words[i];
    }
    RegisterRun<kBits, kDims, kRunWords>::expand(held, mask, lane_table, bias, out);
  } else if (slot.dense) {
    load_dense<kBits, kDims>(values, first_dim, bias, out);
  } else {
    const uint32_t* masks = reinterpret_cast<const uint32_t*>(stage) + token * slot.mask_words;
    const uint32_t mask = masks[first_dim / 32] >> (first_dim % 32);
    MemoryRun<kBits, kDims>::expand(reinterpret_cast<const uint32_t*>(values),
                                    kept_before(masks, first_dim), mask, lane_table, bias, out);
  }
}

__device__ __forceinline__ float row_scale(const Piece& piece, const uint8_t* stage, int token) {
  return bf16_float(
      reinterpret_cast<const uint16_t*>(stage + piece.mask_bytes + piece.value_bytes)[token]);
}

}  // namespace mustafar::cuda
