// What the parts of the decode kernel for coded rows (decode_coded.cuh) share: sizes, a block's
// shared memory, a lane's sums.
#pragma once

#include "cuda/coded_rows.cuh"
#include "cuda/decode_scores.cuh"
#include "cuda/decode_stages.cuh"
#include "cuda/device_ops.cuh"

namespace mustafar::cuda {

// What the warps of a block tell each other.
template <int kQueries>
struct CodedExchange {
  // P^T of a tile and of the next as B fragments: lane (g, c) takes words of all warps from
  // [4 (g % kQueries) + c], 48 bytes apart: few bank conflicts.
  uint32_t p[2][4 * kQueries][3 * kDecodeWarps];
  int32_t raised[2];  // by turns: the last tile, counted from 1, that has a new maximum
  int32_t unused[2];
  float top[kDecodeWarps][kQueries];
  // At a split's end.
  float max[kQueries];
  float sum[kDecodeWarps][kQueries], p_sum[kDecodeWarps][kQueries];
};

// kTailType: kF16 or kBF16. kWords: of a row, of K as of V. kQuerySets: of 4 query heads, 1 or 2.
template <DType kTailType, int kHeadDim, int kWords, int kQuerySets>
struct CodedShape {
  static constexpr bool kCoded = true;
  static constexpr DType kTail = kTailType;
  static constexpr int kDim = kHeadDim;
  static constexpr int kSets = kQuerySets;
  static constexpr int kQueries = kSets * kSetQueries;
  static constexpr int kRowBytes = 4 * kWords;
  static constexpr int kChunks = (kRowBytes + 15) / 16;  // of 16 bytes, the last filled or not
  static constexpr int kStride = (kChunks | 1) * 16;     // of rows in a stage
  static constexpr int kStageBytes = 2 * kDecodeTokens * kStride + 4 * kDecodeTokens;  // a warp's
  static constexpr int kWarpStages = kStages * kStageBytes + kStageSlack;
  static constexpr int kBitTiles = 2 * kChunks;  // of a warp
  using Exchange = CodedExchange<kQueries>;
  // Shared memory: the values' table of dims; bit weights of the queries; their scales and offsets;
  // what warps exchange; then as in DecodeShape, and a split's results.
  static constexpr int kWeightBytes = kChunks * 2 * kWarpSize * 16;  // of a set
  static constexpr int kWeightsAt = kDim * static_cast<int>(sizeof(CodeDim));
  static constexpr int kScalesAt = kWeightsAt + kSets * kWeightBytes;
  static constexpr int kExchangeAt = kScalesAt + 2 * kQueries * 4;
  static constexpr int kTable = kExchangeAt + sizeof(Exchange);
  static constexpr int kQueriesAt = kTable + kPlanBytes;
  static constexpr int kMergeAt = kQueriesAt + cuda::kQueryBytes<kDim, kSets>;
  // A split's sums of bits, of all queries each, one left out after every eight; or the warps'
  // results of rows of the dense buffer.
  static constexpr int kSumBytes = 4 * kQueries;  // of a bit
  static constexpr int kSumsBytes = kChunks * 16 * 9 * kSumBytes;
  static constexpr int kTailBytes = kDecodeWarps * kSetQueries * (kDim + 2) * 4;
  static constexpr int kStagesAt = kMergeAt + (kSumsBytes > kTailBytes ? kSumsBytes : kTailBytes);
  // Its blocks' starts are long, but with more splits than these, measured, blocks end together.
  static constexpr int kMostBlockSplits = 4;
  // As many as registers allow without spilling.
  static constexpr int kBlocksPerMultiprocessor = kSets == 2 ? (kDim == 64 ? 4 : 3)
                                                  : kChunks == 4 || kRowBytes == 40 ? 4
                                                                                    : 5;
  // What attend_tail takes for the dense buffer's rows.
  static constexpr int kBits = 16;
  static constexpr bool kDense = false;
  static constexpr bool kFixed = true;
  static constexpr bool kQueriesInStage = false;
  static constexpr int kKDims = kDim / 4;
  static constexpr int kVDims = kDim / 8;
  static constexpr int kTiles = kDim / 16;
};

// A lane's part of a split. Lane (g, c) has token g of its warp's 16, from c = 2 on token g + 8,
// and queries 2c % 4 and the next of every set.
template <typename Shape>
struct CodedSums {
  float max[Shape::kSets][2];         // over the block
  float sum[Shape::kSets][2] = {};    // this lane's tokens
  float p_sum[Shape::kSets][2] = {};  // likewise, of P as it is multiplied
  // O^T fragments of tiles (n, 2 warp) and (n, 2 warp + 1), n from 0 on; columns 4-7 are the second
  // set's or repeat the first's.
  float out[Shape::kBitTiles][4] = {};

  __device__ __forceinline__ CodedSums() {
#pragma unroll
    for (int set = 0; set < Shape::kSets; set++) max[set][0] = max[set][1] = -INFINITY;
  }
};

// The bits of two tokens that a warp multiplies, in four tiles' halves: bit j of a unit, or j + 8.
struct BitMasks {
  uint32_t low[2], high[2];
  uint32_t ones;  // to be set beside bit 15, so that this is a sign, where the warp has it: high[1]

  __device__ __forceinline__ explicit BitMasks(int warp) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      low[i] = 0x00010001u << (2 * warp + i);
      high[i] = low[i] << 8;
    }
    ones = warp == kDecodeWarps - 1 ? 0x3c003c00u : 0u;  // 1.0 twice, in f16
  }

  // What a sum over bit `bit` of units is to be multiplied by. Bit 15 counted as 1 - 2 bit: half
  // the sum of P is still to be added.
  static __device__ __forceinline__ float unit(uint32_t bit) {
    if (bit == 15) return -0.5f;
    const float power = half_float<DType::kF16>(static_cast<uint16_t>(1u << bit));
    return bits_float(0x7f000000u - float_bits(power));  // 1 / power
  }
};

}  // namespace mustafar::cuda
