// Coded rows (format/coded.h) in the decode kernel. A value is a sum over the bits of its code, so
// every bit of a row counts as a dim of its own: no table says in the loop which bits belong
// together, and a head's widths may be any.
//
//   S^T = K Q^T   A row's bits are bytes of the A operand: word & 0x01010101 << j is four of them,
//                 0 or 2^j. The weight of a bit is the query's dim times the code's step times the
//                 bit's power of 2, split into two int8 terms. Lane c owns words c, c + 4, ... of a
//                 row. Bits of each j are summed apart, those from 4 on come as j - 4. What a
//                 code's middle takes off is a constant of the query.
//   O^T = V^T P^T The transposed load of ldmatrix gives units of 16 bits of a row, two tokens in a
//                 word. (unit & 1 << j) is an f16, 0 or a power of 2 that j alone tells, to which
//                 products are exact; only j = 15 would be -0, and is made 1 or -1. Output rows are
//                 bits: tile (n, j) holds bits j (row g) and j + 8 (row g + 8) of unit g of a row's
//                 n-th 16 bytes. P is rounded to f16 once, far finer than codes are.
//
// A warp takes the keys of its own 16 tokens and hands P to the block: of the values of all 64 it
// takes bits 2 warp and 2 warp + 1 of every byte. So its sums are few, which leaves registers for
// more warps, and a split ends without a merge of warps. A tile costs one barrier: P is written
// as if no score exceeded the maximum by much, and again where one did (kMaxSlack). Up to eight
// query heads share a row's bits: the second four are columns 4-7 of the values' product, and
// further products of the keys'.
//
// Rows lie in a stage an odd number of 16 bytes apart: free of bank conflicts.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/attention.h"
#include "cuda/coded_rows.cuh"
#include "cuda/decode_coded_end.cuh"
#include "cuda/decode_coded_shape.cuh"
#include "cuda/decode_coded_start.cuh"
#include "cuda/decode_scores.cuh"
#include "cuda/decode_softmax.cuh"
#include "cuda/decode_stages.cuh"
#include "cuda/device_ops.cuh"
#include "cuda/matrix_ops.cuh"

namespace mustafar::cuda {

// Copies a warp's 16 rows of K, of V and their scales to a stage.
template <typename Shape>
class CodedCopier {
 public:
  __device__ __forceinline__ explicit CodedCopier(const SlotLayout& slot)
      : slot_bytes_(slot.slot_bytes) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = lane_id();
    from_ = static_cast<uint32_t>(warp * kDecodeTokens * Shape::kRowBytes + lane * kUnit);
    scales_ = static_cast<uint32_t>((lane >> 1) * slot.slot_bytes + slot.scales_offset +
                                    warp * kDecodeTokens * 2 + (lane & 1) * 16);
#pragma unroll
    for (int i = 0; i < kCopies; i++) {
      const int n = i * kWarpSize + lane;
      to_[i] = Shape::kStride == Shape::kRowBytes
                   ? n * kUnit
                   : n / kRowUnits * Shape::kStride + n % kRowUnits * kUnit;
    }
  }

  __device__ __forceinline__ void start(const uint8_t* k_slot, uint8_t* stage) const {
    const int lane = lane_id();
#pragma unroll
    for (int kind = 0; kind < 2; kind++) {
      const uint8_t* const from = k_slot + kind * slot_bytes_ + from_;
      uint8_t* const to = stage + kind * kDecodeTokens * Shape::kStride;
#pragma unroll
      for (int i = 0; i < kCopies; i++) {
        if ((i + 1) * kWarpSize > kUnits && i * kWarpSize + lane >= kUnits) continue;
        if constexpr (kUnit == 16) {
          cp_async16(to + to_[i], from + i * kWarpSize * kUnit);
        } else {
          cp_async_few<8>(to + to_[i], from + i * kWarpSize * kUnit);
        }
      }
    }
    if (lane < 4) {
      cp_async16(stage + 2 * kDecodeTokens * Shape::kStride + lane * 16, k_slot + scales_);
    }
  }

 private:
  static constexpr int kUnit = Shape::kRowBytes % 16 == 0 ? 16 : 8;  // bytes of a copy
  static constexpr int kRowUnits = Shape::kRowBytes / kUnit;
  static constexpr int kUnits = kDecodeTokens * kRowUnits;
  static constexpr int kCopies = (kUnits + kWarpSize - 1) / kWarpSize;
  static_assert(Shape::kRowBytes % kUnit == 0);

  int32_t slot_bytes_;
  uint32_t from_, scales_;  // bytes from a K slot
  int32_t to_[kCopies];
};

// Eight times the sums of bits' weights over 16 staged K rows: of the lane's token (CodedSums) and
// its two queries of every set. rows: word c of row g; weights: the lane's first.
template <typename Shape>
__device__ __forceinline__ void coded_scores(const uint8_t* rows, const uint8_t* weights,
                                             float (&scores)[Shape::kSets][2]) {
  int32_t sums[Shape::kSets][4][4] = {};  // of bit j of half bytes: 2^j times its weights
#pragma unroll
  for (int n = 0; n < Shape::kChunks; n++) {
    const uint32_t words[2] = {
        *reinterpret_cast<const uint32_t*>(rows + 16 * n),
        *reinterpret_cast<const uint32_t*>(rows + 8 * Shape::kStride + 16 * n)};
    const uint32_t above[2] = {words[0] >> 4, words[1] >> 4};
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      uint4 b[Shape::kSets];
#pragma unroll
      for (int set = 0; set < Shape::kSets; set++) {
        b[set] = *reinterpret_cast<const uint4*>(weights + set * Shape::kWeightBytes +
                                                 (2 * n + pair) * kWarpSize * 16);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int j = 2 * pair + i;
        const uint32_t bit = 0x01010101u << j;
        const uint32_t a[4] = {words[0] & bit, words[1] & bit, above[0] & bit, above[1] & bit};
#pragma unroll
        for (int set = 0; set < Shape::kSets; set++) {
          const uint32_t weight[2] = {i == 0 ? b[set].x : b[set].z, i == 0 ? b[set].y : b[set].w};
          mma_16x8x32_s8(sums[set][j], a, weight);
        }
      }
    }
  }
  // A query's two terms lie two lanes apart: one of the lanes adds up row g, the other row g + 8.
  const bool odd = (lane_id() & 2) != 0;
#pragma unroll
  for (int set = 0; set < Shape::kSets; set++) {
    int32_t whole[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const auto& of = sums[set];
      whole[i] = ((of[0][i] * 2 + of[1][i]) * 2 + of[2][i]) * 2 + of[3][i];
      if (!odd) whole[i] *= 128;
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int32_t other = shuffle_xor(odd ? whole[n] : whole[2 + n], 2);
      scores[set][n] = static_cast<float>((odd ? whole[2 + n] : whole[n]) + other);
    }
  }
}

// O^T += V^T P^T of a tile's 64 staged V rows, in the warp's bits. rows: the row and half chunk of
// which the lane gives ldmatrix the address; p: the lane's words of CodedExchange.
template <typename Shape>
__device__ __forceinline__ void add_coded_values(const uint8_t* rows, const uint32_t* p,
                                                 const BitMasks& masks, CodedSums<Shape>& sums) {
#pragma unroll
  for (int pair = 0; pair < kDecodeWarps / 2; pair++) {
    const uint4 four = reinterpret_cast<const uint4*>(p)[pair];
    const uint32_t b[2][2] = {{four.x, four.y}, {four.z, four.w}};
#pragma unroll
    for (int n = 0; n < Shape::kChunks; n++) {
      uint32_t units[4];  // tokens 0-7 and 8-15 of a warp's, then of the next warp's
      load_matrices<true>(units, rows + 2 * pair * Shape::kWarpStages + 16 * n);
#pragma unroll
      for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const uint32_t set = i == 1 ? masks.ones : 0u;
          const uint32_t a[4] = {units[2 * h] & masks.low[i], (units[2 * h] & masks.high[i]) | set,
                                 units[2 * h + 1] & masks.low[i],
                                 (units[2 * h + 1] & masks.high[i]) | set};
          mma_16x8x16<DType::kF16>(sums.out[2 * n + i], a, b[h]);
        }
      }
    }
  }
}

// Attends to the store's tiles and finishes the splits that end among them; of one that goes on,
// the block's result is left at the first stage, kPartialFloats a query. shared: the block's; plan:
// lists the tiles' slots once the block has passed a barrier.
template <typename Shape>
__device__ void attend_coded_store(const AttentionArgs& args, const CodeTables& tables, int kv_head,
                                   const TileRun& run, const FirstSlots& first,
                                   const BlockPlan& plan, const BlockQueries<Shape>& queries,
                                   uint8_t* shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = lane_id();
  const int g = lane >> 2, c = lane & 3, odd = c >> 1;
  uint8_t* const all_stages = shared + Shape::kStagesAt;
  uint8_t* const stages = all_stages + warp * Shape::kWarpStages;
  const CodedCopier<Shape> copier(args.layout.k);
  const auto copy = [&](const uint8_t* slot, uint8_t* stage) { copier.start(slot, stage); };
  TileStream stream(run, first, plan, stages, Shape::kStageBytes, copy);

  // While the first copies are under way. The queries' place is free until the dense buffer's turn,
  // the merging area until a split's end.
  CodeDim* const dims = reinterpret_cast<CodeDim*>(shared);
  float* const scales = reinterpret_cast<float*>(shared + Shape::kScalesAt);
  auto& exchange = *reinterpret_cast<typename Shape::Exchange*>(shared + Shape::kExchangeAt);
  if (threadIdx.x < 2) exchange.raised[threadIdx.x] = 0;
  weigh_bits<Shape>(code_table(tables, args.layout, args.layer, kv_head, true),
                    code_table(tables, args.layout, args.layer, kv_head, false), queries, dims,
                    reinterpret_cast<float*>(queries.shared),
                    reinterpret_cast<uint16_t*>(shared + Shape::kMergeAt),
                    shared + Shape::kWeightsAt, scales);
  // Read in every tile: they would take registers that the loop does not have.
  const float* const q_scales = scales + 2 * c % 4;  // of the lane's queries
  const uint8_t* const weights = shared + Shape::kWeightsAt + lane * 16;

  const int k_place = kept(g * Shape::kStride + 4 * c);
  const int scales_place = 2 * kDecodeTokens * Shape::kStride + 2 * (g + 8 * odd);
  const int v_place =
      kept((lane >> 4) * Shape::kWarpStages + (kDecodeTokens + (lane & 15)) * Shape::kStride);
  const BitMasks masks(warp);
  CodedSums<Shape> sums;
  const auto attend = [&](int32_t i) {
    const int32_t at = stream.arrive();
    const uint8_t* const stage = stages + at;
    float score[Shape::kSets][2], e[Shape::kSets][2];
    coded_scores<Shape>(stage + k_place, weights, score);
    const auto row_scale = [&](int kind) {
      return bf16_float(
          *reinterpret_cast<const uint16_t*>(stage + scales_place + kind * kDecodeTokens * 2));
    };
    const float k_scale = row_scale(kKeys);
    const float v_scale = fmaxf(row_scale(kValues), 0x1p-60f);  // that of a row of zeros is 0
    uint32_t words[Shape::kSets];
    auto& p_of_tile = exchange.p[i & 1];
    // Returns the largest of the lane's P.
    const auto give_p = [&] {
      float most = 0.0f;
#pragma unroll
      for (int set = 0; set < Shape::kSets; set++) {
        float p[2];
#pragma unroll
        for (int n = 0; n < 2; n++) {
          e[set][n] = exp2_approx(score[set][n] - sums.max[set][n]);
          p[n] = e[set][n] * v_scale;
          most = fmaxf(most, p[n]);
        }
        words[set] = pack2<DType::kF16>(p[0], p[1]);
        // Lanes from g = 4 on have the second eight tokens.
        p_of_tile[(set * kSetQueries + (g & 3)) * 4 + c][2 * warp + (g >> 2)] =
            transpose_8x8(words[set]);
      }
      return most;
    };
#pragma unroll
    for (int set = 0; set < Shape::kSets; set++) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float* const scale = q_scales + set * kSetQueries + n;
        score[set][n] = (score[set][n] * scale[0] + scale[Shape::kQueries]) * k_scale;
      }
    }
    constexpr float kMost = static_cast<float>(1 << static_cast<int>(kMaxSlack));
    if (give_p() > kMost) exchange.raised[i & 1] = i + 1;
    sync_block();  // P is written, the rows of all warps are here, all are done with the tile
                   // before
    stream.refill(i);
    if (exchange.raised[i & 1] == i + 1) {
      // As in update_softmax, for the block.
      const HiddenTokens hidden{plan.run.hidden_rows, i, g};
      const bool hides = hidden.any() && hidden.hides(odd);
      const float log_scale = log2_approx(v_scale);
#pragma unroll
      for (int set = 0; set < Shape::kSets; set++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
          if (hides) score[set][n] = -INFINITY;
          float top = score[set][n] + log_scale;
#pragma unroll
          for (int m = 2; m <= 16; m *= 2) top = fmaxf(top, shuffle_xor(top, m));
          if (lane < 2) exchange.top[warp][set * kSetQueries + 2 * lane + n] = top;
        }
      }
      sync_block();
      float rescale[Shape::kSets][2];
#pragma unroll
      for (int set = 0; set < Shape::kSets; set++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
          float top = sums.max[set][n];
#pragma unroll
          for (int w = 0; w < kDecodeWarps; w++) {
            top = fmaxf(top, exchange.top[w][set * kSetQueries + 2 * c % 4 + n]);
          }
          rescale[set][n] = exp2_approx(sums.max[set][n] - top);
          sums.max[set][n] = top;
          sums.sum[set][n] *= rescale[set][n];
          sums.p_sum[set][n] *= rescale[set][n];
        }
      }
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float of_column = odd == 0 ? rescale[0][n] : rescale[Shape::kSets - 1][n];
#pragma unroll
        for (int t = 0; t < Shape::kBitTiles; t++) {
          sums.out[t][n] *= of_column;
          sums.out[t][2 + n] *= of_column;
        }
      }
      give_p();
      sync_block();
    }
#pragma unroll
    for (int set = 0; set < Shape::kSets; set++) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        sums.sum[set][n] += e[set][n];
        sums.p_sum[set][n] +=
            half_float<DType::kF16>(static_cast<uint16_t>(words[set] >> (16 * n)));
      }
    }
    add_coded_values<Shape>(all_stages + v_place + at, p_of_tile[g % Shape::kQueries * 4 + c],
                            masks, sums);
  };
  for_splits(plan, run.n, attend, [&](int32_t split, bool whole) {
    PartialRows rows = {reinterpret_cast<float*>(all_stages), kPartialFloats<Shape>,
                        Shape::kQueries};
    if (whole) {
      rows = {partial_of<Shape>(args, plan, split, 0), args.max_splits * kPartialFloats<Shape>,
              plan.n_heads};
    }
    write_coded_split<Shape>(sums, dims, shared + Shape::kMergeAt, exchange, rows);
    sums = {};
  });
  cp_async_wait<0>();
}

}  // namespace mustafar::cuda
