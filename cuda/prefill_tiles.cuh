// Tiles of 64 tokens for the prefill kernel: K or V rows in the tail's type in shared memory,
// copied there (dense rows) or expanded from a staged slot by the whole block.
//
// A row is kDim 2-byte values; its 16-byte chunk n stands at chunk n ^ (row % 8). So the 8 rows
// that ldmatrix reads at one chunk, and the 8 chunks that 8 lanes write, lie in different banks.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/attention.h"
#include "cuda/device_ops.cuh"
#include "cuda/expand.cuh"
#include "cuda/unpack.cuh"

namespace mustafar::cuda {

constexpr int kTileTokens = kBlockTokens;
constexpr int kPrefillWarps = 4;
constexpr int kPrefillThreads = kPrefillWarps * kWarpSize;

template <int kDim>
constexpr int kTileBytes = kTileTokens * kDim * 2;

template <int kDim>
constexpr int kStageBytes = 2 * kTileBytes<kDim>;  // K and V

// Bytes from a tile's start to a chunk of a row.
template <int kDim>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  return row * kDim * 2 + ((chunk ^ (row & 7)) << 4);
}

// How tiles of the store come to shared memory.
enum class StoreTiles {
  kCopied,    // dense slots of the tail's type: as dense rows are
  kExpanded,  // both slots staged as they are, then expanded by table
  kCoded,     // the same, of coded rows
  kUnpacked,  // any other: value by value from global memory
};

inline StoreTiles store_tiles(const StoreLayout& layout, DType tail, int64_t stage_bytes) {
  const auto copied = [&](const SlotLayout& s) { return s.dense && s.dtype == tail; };
  const auto expanded = [&](const SlotLayout& s) {
    return s.dtype == tail || s.dtype == DType::kInt8 || s.dtype == DType::kInt4;
  };
  if (copied(layout.k) && copied(layout.v)) return StoreTiles::kCopied;
  // With 16 bytes behind the slots: a run of values may be read past its end, by 8 bytes.
  const int64_t bytes = int64_t{layout.k.slot_bytes} + layout.v.slot_bytes + 16;
  if (layout.k.dtype == DType::kCoded && layout.v.dtype == DType::kCoded && bytes <= stage_bytes) {
    return StoreTiles::kCoded;
  }
  return expanded(layout.k) && expanded(layout.v) && bytes <= stage_bytes ? StoreTiles::kExpanded
                                                                          : StoreTiles::kUnpacked;
}

// ---- copies ----

// 64 rows that lie end to end.
template <int kDim>
__device__ __forceinline__ void copy_rows(const uint8_t* from, uint8_t* tile) {
  constexpr int kChunks = kDim / 8, kRows = kPrefillThreads / kChunks;  // of a pass: 8 or 16
  const int thread = static_cast<int>(threadIdx.x);
  uint8_t* to = tile + tile_offset<kDim>(thread / kChunks, thread % kChunks);
  from += thread * 16;
#pragma unroll
  for (int i = 0; i < kTileTokens / kRows; i++) {
    cp_async16(to + i * kRows * kDim * 2, from + i * kRows * kDim * 2);
  }
}

// The dense rows of one sequence, layer and KV head: the dense buffer's, then the call's own.
struct DenseRows {
  const uint8_t* dense;  // keys
  const uint8_t* fresh;
  int64_t dense_to_values;  // bytes from a key to its token's value
  int64_t fresh_to_values;
  int32_t dense_tokens;
};

__device__ __forceinline__ DenseRows dense_rows(const AttentionArgs& args, const SequenceView& s,
                                                int kv_head, int64_t row_bytes) {
  const auto run = [&](int32_t kind) {
    return dense_run(s, s.dense_tokens, args.layer, kind, args.n_kv_heads, kv_head, row_bytes);
  };
  const DenseRun keys = run(kKeys), values = run(kValues);
  return {keys.dense, keys.fresh, values.dense - keys.dense, values.fresh - keys.fresh,
          s.dense_tokens};
}

// Keys and values of dense rows [first, first + 64), zeros from `end` on (values times a weight of
// 0 must be 0).
template <int kDim>
__device__ __forceinline__ void copy_dense(const DenseRows& rows, int32_t first, int32_t end,
                                           uint8_t* keys, uint8_t* values) {
  constexpr int kRowBytes = kDim * 2;
  const auto key = [&rows](int32_t at) {
    return at < rows.dense_tokens ? rows.dense + int64_t{at} * kRowBytes
                                  : rows.fresh + int64_t{at - rows.dense_tokens} * kRowBytes;
  };
  const auto to_values = [&rows](int32_t at) {
    return at < rows.dense_tokens ? rows.dense_to_values : rows.fresh_to_values;
  };
  const int32_t piece_end =
      first < rows.dense_tokens && rows.dense_tokens < end ? rows.dense_tokens : end;
  if (first + kTileTokens <= piece_end) {
    const uint8_t* from = key(first);
    copy_rows<kDim>(from, keys);
    copy_rows<kDim>(from + to_values(first), values);
    return;
  }
  constexpr int kChunks = kDim / 8, kRows = kPrefillThreads / kChunks;
  const int thread = static_cast<int>(threadIdx.x), row = thread / kChunks;
  const int to = tile_offset<kDim>(row, thread % kChunks);
#pragma unroll 1
  for (int i = 0; i < kTileTokens / kRows; i++) {
    const int32_t wanted = first + row + i * kRows;
    const int32_t at = wanted < end ? wanted : end - 1;
    const uint8_t* from = key(at) + thread % kChunks * 16;
    cp_async16_or_zero(keys + to + i * kRows * kRowBytes, from, wanted < end);
    cp_async16_or_zero(values + to + i * kRows * kRowBytes, from + to_values(at), wanted < end);
  }
}

__device__ __forceinline__ uint32_t bf16_to_f16(uint32_t pair) {
  return pack2_f16_saturated(bits_float(pair << 16), bits_float(pair & 0xffff0000u));
}

// A tile of bf16 rows to f16, in place: each thread those bytes that it copied itself, so that its
// own wait is enough.
template <int kDim>
__device__ __forceinline__ void convert_copied_rows(uint8_t* tile) {
  constexpr int kChunks = kDim / 8, kRows = kPrefillThreads / kChunks;
  const int thread = static_cast<int>(threadIdx.x);
  uint8_t* at = tile + tile_offset<kDim>(thread / kChunks, thread % kChunks);
#pragma unroll
  for (int i = 0; i < kTileTokens / kRows; i++) {
    uint4* chunk = reinterpret_cast<uint4*>(at + i * kRows * kDim * 2);
    const uint4 x = *chunk;
    *chunk = {bf16_to_f16(x.x), bf16_to_f16(x.y), bf16_to_f16(x.z), bf16_to_f16(x.w)};
  }
}

// bytes: a multiple of 16.
__device__ __forceinline__ void copy_bytes(const uint8_t* from, int32_t bytes, uint8_t* to) {
#pragma unroll 4
  for (int32_t at = static_cast<int32_t>(threadIdx.x) * 16; at < bytes;
       at += kPrefillThreads * 16) {
    cp_async16(to + at, from + at);
  }
}

// ---- expansion ----

constexpr int kRunDims = 32;  // of one row, expanded by one thread: one word of the mask

// Words of a run where every run of a row has as many; 0: runs of any length and alignment.
__device__ __forceinline__ int run_words(const SlotLayout& slot, int bits) {
  if (slot.ragged || slot.dense || kRunDims % slot.group != 0) return 0;
  const int run_bits = kRunDims / slot.group * slot.keep * bits;
  return run_bits % 32 == 0 ? run_bits / 32 : 0;
}

template <int kBits, int kWords>
__device__ __forceinline__ void expand_held(const uint32_t* run, uint32_t mask,
                                            const uint8_t* lane_table, uint32_t bias,
                                            uint32_t (&out)[kExpandedWords<kBits, kRunDims>]) {
  uint32_t held[kWords];
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(run + i);
      held[i] = four.x;
      held[i + 1] = four.y;
      held[i + 2] = four.z;
      held[i + 3] = four.w;
    }
  } else if constexpr (kWords % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(run + i);
      held[i] = two.x;
      held[i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i++) held[i] = run[i];
  }
  RegisterRun<kBits, kRunDims, kWords>::expand(held, mask, lane_table, bias, out);
}

// Dims [32 run, 32 run + 32) of a staged row. A run that keeps a quarter, three eighths or half of
// its values (not int4) is held in registers.
template <int kBits>
__device__ __forceinline__ void expand_run(const SlotLayout& slot, const uint8_t* staged, int row,
                                           int run, const uint8_t* lane_table, uint32_t bias,
                                           uint32_t (&out)[kExpandedWords<kBits, kRunDims>]) {
  const uint8_t* values = staged + slot.values_offset;
  if (slot.dense) {
    load_dense<kBits, kRunDims>(values + row * slot.row_bytes, run * kRunDims, bias, out);
    return;
  }
  const uint32_t* masks = reinterpret_cast<const uint32_t*>(staged) + row * slot.mask_words;
  const uint32_t mask = masks[run];
  if constexpr (kBits != 4) {
    const int words = run_words(slot, kBits);
    const uint32_t* from =
        reinterpret_cast<const uint32_t*>(values + row * slot.row_bytes) + run * words;
    constexpr int kUnit = kBits / 8;  // words of an eighth of the values
    if (words == 2 * kUnit) return expand_held<kBits, 2 * kUnit>(from, mask, lane_table, bias, out);
    if (words == 3 * kUnit) return expand_held<kBits, 3 * kUnit>(from, mask, lane_table, bias, out);
    if (words == 4 * kUnit) return expand_held<kBits, 4 * kUnit>(from, mask, lane_table, bias, out);
  }
  int start = kept_before(masks, run * kRunDims);
  if (slot.ragged) {
    start += reinterpret_cast<const uint16_t*>(staged + slot.offsets_offset)[row];
  } else {
    values += row * slot.row_bytes;
  }
  MemoryRun<kBits, kRunDims>::expand(reinterpret_cast<const uint32_t*>(values), start, mask,
                                     lane_table, bias, out);
}

// Bytes biased by 128 to 2-byte floats: their codes times scale.
template <DType kType>
__device__ __forceinline__ void codes_to_halves(const uint32_t (&bytes)[kRunDims / 4], float scale,
                                                uint32_t (&out)[kRunDims / 2]) {
  // With 0x4b000000 around it a byte makes the float 2^23 + byte, exactly.
  constexpr float kBias = 8388608.0f + 128.0f;
  const auto value = [scale](uint32_t word, uint32_t i) {
    return (bits_float(byte_permute(word, 0x4b000000u, 0x7540u | i)) - kBias) * scale;
  };
#pragma unroll
  for (int i = 0; i < kRunDims / 4; i++) {
#pragma unroll
    for (uint32_t j = 0; j < 2; j++) {
      out[2 * i + j] = pack2<kType>(value(bytes[i], 2 * j), value(bytes[i], 2 * j + 1));
    }
  }
}

// A staged slot into a tile of kTile, by the whole block; kTail: the tail's type. Integer codes
// come times their scale where the tile is f16. bf16 holds a code exactly but not code times scale:
// such a tile gets codes (int4: 16 times the code) and scales[64] what to multiply by.
template <DType kTail, DType kTile, int kDim>
__device__ __forceinline__ void expand_slot(const SlotLayout& slot, const uint8_t* staged,
                                            const uint8_t* lane_table, uint8_t* tile,
                                            float* scales) {
  constexpr bool kCodes = kTile == DType::kBF16;
  constexpr int kRuns = kDim / kRunDims, kRowsPerWarp = kWarpSize / kRuns;
  constexpr uint32_t kBias = 0x80808080u;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  // Of every 8 neighbouring lanes the two lowest runs and rows mod 4 differ: no bank is hit twice.
  const int run = kRuns == 4 ? (lane & 1) | (lane >> 2 & 2) : lane & 1;
  const int lane_row = kRuns == 4 ? (lane >> 1 & 3) | (lane >> 2 & 4) : lane >> 1;
  const float unit = slot.dtype == DType::kInt4 ? 0.0625f : 1.0f;
#pragma unroll 1
  for (int row = warp * kRowsPerWarp + lane_row; row < kTileTokens;
       row += kPrefillWarps * kRowsPerWarp) {
    uint32_t out[kRunDims / 2];
    if (slot.dtype == kTail) {
      expand_run<16>(slot, staged, row, run, lane_table, 0u, out);
      if constexpr (kTail != kTile) {
#pragma unroll
        for (int i = 0; i < kRunDims / 2; i++) out[i] = bf16_to_f16(out[i]);
      }
    } else {
      uint32_t bytes[kRunDims / 4];
      if (slot.dtype == DType::kInt8) {
        expand_run<8>(slot, staged, row, run, lane_table, kBias, bytes);
      } else {
        expand_run<4>(slot, staged, row, run, lane_table, kBias, bytes);
      }
      const float scale = stored_scale(slot, staged, row) * unit;
      if (kCodes && run == 0) scales[row] = scale;
      codes_to_halves<kTile>(bytes, kCodes ? 1.0f : scale, out);
    }
#pragma unroll
    for (int i = 0; i < kRunDims / 8; i++) {
      *reinterpret_cast<uint4*>(tile + tile_offset<kDim>(row, run * kRunDims / 8 + i)) = {
          out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]};
    }
  }
}

// The same of coded slots, a thread eight dims of a row. codes: [kDim] in shared memory.
template <DType kTile, int kDim>
__device__ __forceinline__ void expand_coded_slot(const SlotLayout& slot, const uint8_t* staged,
                                                  const CodeDim* codes, uint8_t* tile,
                                                  float* scales) {
  constexpr bool kCodes = kTile == DType::kBF16;
  constexpr int kOctets = kDim / 8, kRows = kPrefillThreads / kOctets;  // of a pass
  const int thread = static_cast<int>(threadIdx.x), octet = thread % kOctets;
  const CodeDim* const dims = codes + 8 * octet;
  const uint32_t at = dims[0].first_bit();
  const uint8_t* const first_word = staged + slot.values_offset + at / 32 * 4;
#pragma unroll 1
  for (int row = thread / kOctets; row < kTileTokens; row += kRows) {
    const float scale = stored_scale(slot, staged, row);
    if (kCodes && octet == 0) scales[row] = scale;
    const float unit = kCodes ? 0.5f : 0.5f * scale;
    // Eight codes, of at most 7 bits, are in three words. Past a row's end a slot goes on.
    const uint32_t* const word =
        reinterpret_cast<const uint32_t*>(first_word + row * slot.row_bytes);
    uint32_t low = funnel_right(word[0], word[1], at % 32);
    uint32_t high = funnel_right(word[1], word[2], at % 32);
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const CodeDim dim = dims[i];
      const uint32_t width = dim.width(), above = ~0u << width;
      const uint32_t code = low & ~above;
      low = funnel_right(low, high, width);
      high >>= width;
      x[i] = static_cast<float>(static_cast<int32_t>(2 * code + 1 + above)) * (dim.step * unit);
    }
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[i] = kCodes ? pack2<DType::kBF16>(x[2 * i], x[2 * i + 1])
                      : pack2_f16_saturated(x[2 * i], x[2 * i + 1]);
    }
    *reinterpret_cast<uint4*>(tile + tile_offset<kDim>(row, octet)) = {out[0], out[1], out[2],
                                                                       out[3]};
  }
}

// The same of any slot that is not coded, from global memory.
template <DType kTile, int kDim>
__device__ __forceinline__ void unpack_slot(const SlotLayout& slot, const uint8_t* from,
                                            uint8_t* tile, float* scales) {
  constexpr bool kCodes = kTile == DType::kBF16;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / kWarpSize; row < kTileTokens;
       row += kPrefillWarps) {
    const float scale = stored_scale(slot, from, row);
    if (kCodes && lane_id() == 0) scales[row] = scale;
    unpack_row_to(slot, from, nullptr, row, kCodes ? 1.0f : scale, [tile, row](int d, float x) {
      reinterpret_cast<uint16_t*>(tile + tile_offset<kDim>(row, d / 8))[d % 8] =
          kCodes ? float_bf16(x) : static_cast<uint16_t>(pack2_f16_saturated(x, 0.0f));
    });
  }
}

// ---- the order of tiles ----

// Tiles of one sequence, layer and KV head, copied one ahead into two stages of K and V.
template <DType kType, int kDim>
class TileSource {
 public:
  // first: the first tile. rows: in shared memory, filled by one thread; a barrier must follow.
  // They would take many registers.
  __device__ __forceinline__ TileSource(const AttentionArgs& args, const SequenceView& s,
                                        StoreTiles how, int32_t first, int32_t end, uint8_t* stages,
                                        DenseRows* rows)
      : args_(args),
        s_(s),
        how_(how),
        n_blocks_(s.n_blocks),
        end_(end),
        stages_(stages),
        rows_(rows) {
    if (first < n_blocks_) page_ = s.pages[first];
    if (threadIdx.x == 0) *rows = dense_rows(args, s, kv_head(), kDim * 2);
  }

  __device__ __forceinline__ bool expands(int32_t tile) const {
    return tile < n_blocks_ && how_ != StoreTiles::kCopied;
  }
  __device__ __forceinline__ uint8_t* stage(int i) const { return stages_ + i * kStageBytes<kDim>; }

  // Starts the copies of a tile. Tiles come in order, the store's one after another, stage 1 is
  // given to those of the store that are expanded.
  __device__ __forceinline__ void start(int32_t tile, int to) {
    uint8_t* keys = stage(to);
    uint8_t* values = keys + kTileBytes<kDim>;
    if (tile >= n_blocks_) {
      copy_dense<kDim>(*rows_, (tile - n_blocks_) * kTileTokens, end_ - n_blocks_ * kBlockTokens,
                       keys, values);
    } else {
      if (how_ == StoreTiles::kCopied) {
        copy_rows<kDim>(page_ + slots(), keys);
        copy_rows<kDim>(page_ + slots() + args_.layout.k.slot_bytes, values);
      } else if (how_ != StoreTiles::kUnpacked) {
        copy_bytes(page_ + slots(), args_.layout.k.slot_bytes + args_.layout.v.slot_bytes, keys);
      }
      if (tile + 1 < n_blocks_) page_ = s_.pages[tile + 1];
    }
    cp_async_commit();
  }

  // Of a tile that is not expanded, after this thread's copies have come.
  __device__ __forceinline__ void convert_keys(int in) const {
    if constexpr (kType == DType::kBF16) convert_copied_rows<kDim>(stage(in));
  }

  // What expand() reads, at table: the expansion table or that of coded dims, K then V. By the
  // whole block, a barrier must follow.
  __device__ __forceinline__ void fill_table(uint8_t* table) const {
    if (how_ == StoreTiles::kExpanded) fill_expand_table(table);
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    if (how_ != StoreTiles::kCoded || warp > 1) return;
    load_code_dims(code_table(s_.codes, args_.layout, args_.layer, kv_head(), warp == 0), kDim,
                   reinterpret_cast<CodeDim*>(table) + warp * kDim);
  }

  // A tile that has been copied to stage 1, into stage 0. scales: [64], of the values.
  __device__ __forceinline__ void expand(int32_t tile, const uint8_t* table, float* scales) const {
    uint8_t* keys = stage(0);
    uint8_t* values = keys + kTileBytes<kDim>;
    const SlotLayout& k = args_.layout.k;
    const SlotLayout& v = args_.layout.v;
    if (how_ == StoreTiles::kExpanded) {
      const uint8_t* staged = stage(1);
      const uint8_t* lane_table = table + lane_id() * 4;
      expand_slot<kType, DType::kF16, kDim>(k, staged, lane_table, keys, nullptr);
      expand_slot<kType, kType, kDim>(v, staged + k.slot_bytes, lane_table, values, scales);
    } else if (how_ == StoreTiles::kCoded) {
      const uint8_t* staged = stage(1);
      const CodeDim* codes = reinterpret_cast<const CodeDim*>(table);
      expand_coded_slot<DType::kF16, kDim>(k, staged, codes, keys, nullptr);
      expand_coded_slot<kType, kDim>(v, staged + k.slot_bytes, codes + kDim, values, scales);
    } else {
      const uint8_t* from = s_.pages[tile] + slots();
      unpack_slot<DType::kF16, kDim>(k, from, keys, nullptr);
      unpack_slot<kType, kDim>(v, from + k.slot_bytes, values, scales);
    }
  }

 private:
  __device__ __forceinline__ int kv_head() const { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ int64_t slots() const {
    return k_slot_offset(args_.layout, args_.layer, kv_head());
  }

  const AttentionArgs& args_;
  const SequenceView& s_;
  StoreTiles how_;
  int32_t n_blocks_, end_;  // end: of the tokens that the block sees
  uint8_t* stages_;
  DenseRows* rows_;
  const uint8_t* page_ = nullptr;  // of the tile to start next, read a tile ahead
};

}  // namespace mustafar::cuda
