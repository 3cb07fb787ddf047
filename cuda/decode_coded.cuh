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
//                 word, and (unit & 1 << j) is a subnormal f16, 2^(j - 24) or 0, to which products
//                 are exact. Output rows are bits: tile (n, j) holds bits j (row g) and j + 8 (row
//                 g + 8) of unit g of a row's n-th 16 bytes; one tile more sums P. P is rounded to
//                 f16 once, far finer than codes are. At a split's end the block's warps are
//                 merged in bits, which then become dims.
//
// Rows lie in a stage an odd number of 16 bytes apart: free of bank conflicts.
#pragma once

#include <type_traits>

#include "cuda/async_copy.cuh"
#include "cuda/attention.h"
#include "cuda/coded_rows.cuh"
#include "cuda/decode_scores.cuh"
#include "cuda/decode_softmax.cuh"
#include "cuda/decode_stages.cuh"
#include "cuda/device_ops.cuh"
#include "cuda/matrix_ops.cuh"

namespace mustafar::cuda {

// kTailType: kF16 or kBF16. kWords: of a row, of K as of V.
template <DType kTailType, int kHeadDim, int kWords>
struct CodedShape {
  static constexpr bool kCoded = true;
  static constexpr DType kTail = kTailType;
  static constexpr int kDim = kHeadDim;
  static constexpr int kSets = 1;
  static constexpr int kQueries = kSetQueries;
  static constexpr int kRowBytes = 4 * kWords;
  static constexpr int kChunks = (kRowBytes + 15) / 16;  // of 16 bytes, the last filled or not
  static constexpr int kStride = (kChunks | 1) * 16;     // of rows in a stage
  static constexpr int kStageBytes = 2 * kDecodeTokens * kStride + 4 * kDecodeTokens;
  static constexpr int kBitTiles = 8 * kChunks;
  // Shared memory: the values' table of dims; bit weights of the queries; their scales and offsets;
  // then as in DecodeShape, the merging area for bits.
  static constexpr int kWeightsAt = kDim * static_cast<int>(sizeof(CodeDim));
  static constexpr int kScalesAt = kWeightsAt + kChunks * 2 * kWarpSize * 16;
  static constexpr int kTable = kScalesAt + 2 * kSetQueries * 4;
  static constexpr int kQueriesAt = kTable + kPlanBytes;
  static constexpr int kMergeAt = kQueriesAt + cuda::kQueryBytes<kDim, kSets>;
  // A warp's sums of bits, of 4 queries each, 16 bytes left out after every eight; then the
  // queries' max, sum, sum of P.
  static constexpr int kSumsBytes = (kBitTiles * 16 + kBitTiles * 2) * 16;
  static constexpr int kPartBytes = kSumsBytes + 3 * 16;
  static constexpr int kStagesAt = kMergeAt + kDecodeWarps * kPartBytes;
  static constexpr int kMostBlockSplits = kMostSplits;  // its blocks' starts are long
  // As many as registers allow without spilling.
  static constexpr int kBlocksPerMultiprocessor = kChunks <= 2                          ? 4
                                                  : kChunks == 3 && kRowBytes % 16 == 0 ? 3
                                                                                        : 2;
  // What attend_tail takes for the dense buffer's rows.
  static constexpr int kBits = 16;
  static constexpr bool kDense = false;
  static constexpr bool kFixed = true;
  static constexpr bool kQueriesInStage = false;
  static constexpr int kKDims = kDim / 4;
  static constexpr int kVDims = kDim / 8;
  static constexpr int kTiles = kDim / 16;
};

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
      to_[i] = n / kRowUnits * Shape::kStride + n % kRowUnits * kUnit;
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

// The number of bits of the dims before this lane's, of which there are kLaneDims neighbours.
template <int kLaneDims>
__device__ __forceinline__ uint32_t bits_before(const uint32_t (&widths)[kLaneDims]) {
  const int lane = lane_id();
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < kLaneDims; i++) mine += widths[i];
  uint32_t end = mine;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const uint32_t other = shuffle(end, lane - step);
    if (lane >= step) end += other;
  }
  return end - mine;
}

// Bit weights, scales and offsets of the queries, and the values' table. A score is (scale * 8
// times the weighted sum of bits + offset) * the key's scale. Lane (g, c) reads weights 16 bytes at
// a time: of its n-th word the bits 0 and 1 of every byte's half, then 2 and 3, four bytes' weights
// in a word. The second terms are kSecondTerm further on. scaled: scratch, [kSetQueries][kDim] f32;
// dim_of: scratch, a word for every bit. By the whole block; ends with a barrier.
template <typename Shape>
__device__ __forceinline__ void weigh_bits(const CodeTable& keys, const CodeTable& values,
                                           const BlockQueries<Shape>& queries, CodeDim* value_dims,
                                           float* scaled, uint16_t* dim_of, uint8_t* weights,
                                           float* scales) {
  constexpr int kLaneDims = Shape::kDim / kWarpSize, kBits = Shape::kRowBytes * 8;
  constexpr int kSecondTerm = 4 * kSetQueries * 16;
  const float softmax_scale = kLog2E / sqrtf(static_cast<float>(Shape::kDim));
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = lane_id();
  const int first = lane * kLaneDims;
  static_assert(kMaxWidth < 8);
  const float lane_step = coded_step(lane & 7);
  const auto step_of = [&](uint32_t width, float sigma) {
    return multiply_rounded(shuffle(lane_step, static_cast<int>(width & 7)), sigma);
  };
  // Query `warp`, by its warp; x: weights of the lowest bits.
  uint32_t widths[kLaneDims];
  float sigmas[kLaneDims], x[kLaneDims], largest = 0.0f, offset = 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneDims; i++) {
    widths[i] = keys.widths[first + i];
    sigmas[i] = keys.sigmas[first + i];
    x[i] = warp < queries.n ? queries.from[warp * Shape::kDim + first + i] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kLaneDims; i++) {
    x[i] *= softmax_scale * step_of(widths[i], sigmas[i]);
    const float half = 0.5f * static_cast<float>(1u << widths[i]);
    largest = fmaxf(largest, fabsf(x[i]) * half);
    offset += x[i] * (0.5f - half);
  }
  largest = warp_max(largest);
  offset = warp_sum(offset);
  const float inverse = largest > 0.0f ? kTopWhole / largest : 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneDims; i++) scaled[warp * Shape::kDim + first + i] = x[i] * inverse;
  if (lane == 0) {
    scales[warp] = 0.125f * largest / kTopWhole;
    scales[kSetQueries + warp] = offset;
  }
  if (warp == 0) {
    uint32_t bit = bits_before(widths);
#pragma unroll
    for (int i = 0; i < kLaneDims; i++) {
#pragma unroll
      for (uint32_t b = 0; b < kMaxWidth; b++) {
        if (b < widths[i]) dim_of[bit + b] = static_cast<uint16_t>((first + i) | b << 8);
      }
      bit += widths[i];
    }
  } else if (warp == 1) {
#pragma unroll
    for (int i = 0; i < kLaneDims; i++) {
      widths[i] = values.widths[first + i];
      sigmas[i] = values.sigmas[first + i];
    }
    uint32_t bit = bits_before(widths);
#pragma unroll
    for (int i = 0; i < kLaneDims; i++) {
      value_dims[first + i] = {step_of(widths[i], sigmas[i]), bit | widths[i] << 16};
      bit += widths[i];
    }
  }
  sync_block();
  // A bit of every chunk a thread, for all queries: bit lane of word `warp`.
  uint8_t* const to = weights + lane % 4 / 2 * kWarpSize * 16 + warp * 16 +
                      (lane % 2 * 2 + lane % 8 / 4) * 4 + lane / 8;
#pragma unroll
  for (int n = 0; n < Shape::kChunks; n++) {
    const int bit = n * kDecodeWarps * kWarpSize + thread;
    const uint32_t place = bit < kBits ? dim_of[bit] : 0u;
    const float power = bit < kBits ? bits_float((127 + (place >> 8)) << 23) : 0.0f;
#pragma unroll
    for (int query = 0; query < kSetQueries; query++) {
      const TwoTerms terms = two_terms(scaled[query * Shape::kDim + (place & 0xff)] * power);
      uint8_t* const at = to + n * 2 * kWarpSize * 16 + query * 4 * 16;
      at[0] = terms.first;
      at[kSecondTerm] = terms.second;
    }
  }
  sync_block();
}

// Eight times the sums of bits' weights over 16 staged K rows. rows: word c of row g.
template <typename Shape>
__device__ __forceinline__ void coded_scores(const uint8_t* rows, const uint4* weights,
                                             float (&scores)[4]) {
  const int lane = lane_id();
  int32_t sums[4][4] = {};  // of bit j of half bytes: 2^j times its weights
#pragma unroll
  for (int n = 0; n < Shape::kChunks; n++) {
    const uint32_t words[2] = {
        *reinterpret_cast<const uint32_t*>(rows + 16 * n),
        *reinterpret_cast<const uint32_t*>(rows + 8 * Shape::kStride + 16 * n)};
    const uint32_t above[2] = {words[0] >> 4, words[1] >> 4};
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      const uint4 b = weights[(2 * n + pair) * kWarpSize + lane];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int j = 2 * pair + i;
        const uint32_t bit = 0x01010101u << j;
        const uint32_t a[4] = {words[0] & bit, words[1] & bit, above[0] & bit, above[1] & bit};
        const uint32_t weight[2] = {i == 0 ? b.x : b.z, i == 0 ? b.y : b.w};
        mma_16x8x32_s8(sums[j], a, weight);
      }
    }
  }
  // A query's two terms lie two lanes apart.
  const int32_t term = lane & 2 ? 1 : 128;
  const int32_t weight[4] = {8 * term, 4 * term, 2 * term, term};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int32_t sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) sum += sums[j][i] * weight[j];
    scores[i] = static_cast<float>(sum + shuffle_xor(sum, 2));
  }
}

// O^T += V^T P^T of 16 staged V rows, in bits.
template <typename Shape>
__device__ __forceinline__ void add_coded_values(const uint8_t* rows, const uint32_t (&p)[2],
                                                 Softmax<Shape::kBitTiles + 1>& softmax) {
  const int lane = lane_id();
  const uint8_t* const at = rows + (lane & 15) * Shape::kStride + (lane >> 4) * 16;
#pragma unroll
  for (int n = 0; n < Shape::kChunks; n += 2) {
    uint32_t units[4];  // tokens 0-7 and 8-15 of the first 16 bytes, then of the second
    load_matrices<true>(units, at + 16 * n);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (n + h >= Shape::kChunks) continue;
      const uint32_t low[2] = {units[2 * h], units[2 * h + 1]};
      const uint32_t high[2] = {low[0] >> 8, low[1] >> 8};
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const uint32_t bit = 0x00010001u << j;
        const uint32_t a[4] = {low[0] & bit, high[0] & bit, low[1] & bit, high[1] & bit};
        mma_16x8x16<DType::kF16>(softmax.out[8 * (n + h) + j], a, p);
      }
    }
  }
  constexpr uint32_t kOnes = 0x3c003c00u;  // 1.0 twice, in f16
  const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
  mma_16x8x16<DType::kF16>(softmax.out[Shape::kBitTiles], ones, p);
}

// Where a split's result goes: query i's output, max and sum to `to` + i * stride, the first
// n_queries of them.
struct PartialRows {
  float* to;
  int32_t stride;
  int n_queries;
};

// Merges the warps' sums of bits and turns them into sums of dims. A thread has one dim of
// kThreadQueries queries. dims: the values' table; area: kDecodeWarps parts (CodedShape). Barriers
// as in write_partials.
template <typename Shape>
__device__ __forceinline__ void merge_bits(Softmax<Shape::kBitTiles + 1>& bits, const CodeDim* dims,
                                           uint8_t* area, const PartialRows& rows) {
  const int thread = kept(static_cast<int>(threadIdx.x));
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int g = lane >> 2, c = lane & 3, odd = c >> 1;
#pragma unroll
  for (int n = 0; n < 2; n++) {
#pragma unroll
    for (int m = 4; m <= 16; m *= 2) bits.sum[n] += shuffle_xor(bits.sum[n], m);
  }
  sync_block();  // the parts of before have been read
  {
    // Lanes c and c + 2 have the same: one gives row g, the other row g + 8.
    uint8_t* const mine = area + warp * Shape::kPartBytes + (c & 1) * 8;
    uint8_t* const sums = mine + (2 * g + odd) * 9 * 16;
#pragma unroll
    for (int t = 0; t < Shape::kBitTiles; t++) {
      const auto& out = bits.out[t];
      *reinterpret_cast<float2*>(sums + (t / 8 * 16 * 9 + t % 8) * 16) = {
          odd == 0 ? out[0] : out[2], odd == 0 ? out[1] : out[3]};
    }
    if (lane < 2) {
      float2* const state = reinterpret_cast<float2*>(mine + Shape::kSumsBytes);
      state[0] = {bits.max[0], bits.max[1]};
      state[2] = {bits.sum[0], bits.sum[1]};
      state[4] = {bits.out[Shape::kBitTiles][0], bits.out[Shape::kBitTiles][1]};
    }
  }
  sync_block();
  constexpr int kThreadQueries = kSetQueries * Shape::kDim / (kDecodeWarps * kWarpSize);
  using Floats = std::conditional_t<kThreadQueries == 4, float4, float2>;
  const int d = thread % Shape::kDim, first_query = thread / Shape::kDim * kThreadQueries;
  const uint8_t* const parts = area + first_query * 4;
  const auto load = [](const uint8_t* from, float(&to)[kThreadQueries]) {
    const Floats vector = *reinterpret_cast<const Floats*>(from);
    to[0] = vector.x;
    to[1] = vector.y;
    if constexpr (kThreadQueries == 4) {
      to[2] = vector.z;
      to[3] = vector.w;
    }
  };
  float weight[kDecodeWarps][kThreadQueries], max[kThreadQueries];
  float sum[kThreadQueries] = {}, p_sum[kThreadQueries] = {}, value[kThreadQueries] = {};
#pragma unroll
  for (int w = 0; w < kDecodeWarps; w++) {
    load(parts + w * Shape::kPartBytes + Shape::kSumsBytes, weight[w]);
#pragma unroll
    for (int q = 0; q < kThreadQueries; q++) {
      max[q] = w == 0 ? weight[w][q] : fmaxf(max[q], weight[w][q]);
    }
  }
#pragma unroll
  for (int w = 0; w < kDecodeWarps; w++) {
    float of_sum[kThreadQueries], of_p[kThreadQueries];
    load(parts + w * Shape::kPartBytes + Shape::kSumsBytes + 16, of_sum);
    load(parts + w * Shape::kPartBytes + Shape::kSumsBytes + 32, of_p);
#pragma unroll
    for (int q = 0; q < kThreadQueries; q++) {
      weight[w][q] = exp2_approx(weight[w][q] - max[q]);  // every warp has tokens of a store's tile
      sum[q] += weight[w][q] * of_sum[q];
      p_sum[q] += weight[w][q] * of_p[q];
    }
  }
  // A set bit counted as 2^(its place in a byte - 24): from the highest bit down, times 256 where a
  // byte ends.
  const CodeDim dim = dims[d];
  uint32_t bit = dim.first_bit() + dim.width();
#pragma unroll 1
  for (; bit > dim.first_bit();) {
    bit--;
    const float above = bit % 8 == 7 ? 256.0f : 1.0f;
#pragma unroll
    for (int q = 0; q < kThreadQueries; q++) value[q] *= above;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; w++) {
      float of_bit[kThreadQueries];
      load(parts + w * Shape::kPartBytes + (bit + bit / 8) * 16, of_bit);
#pragma unroll
      for (int q = 0; q < kThreadQueries; q++) value[q] += weight[w][q] * of_bit[q];
    }
  }
  const float unit = bits_float((127 + 24 - bit % 8) << 23);
  const float middle = 0.5f - 0.5f * static_cast<float>(1u << dim.width());
  float* to = rows.to + first_query * rows.stride;
#pragma unroll
  for (int q = 0; q < kThreadQueries; q++) {
    if (first_query + q < rows.n_queries) {
      to[d] = (value[q] * unit + middle * p_sum[q]) * dim.step;
      if (d == 0) *reinterpret_cast<float2*>(to + Shape::kDim) = {max[q], sum[q]};
    }
    to += rows.stride;
  }
}

// Attends to the store's tiles and finishes the splits that end among them; of one that goes on,
// the block's result is left at `rest`, kPartialFloats a query. shared: the block's; plan: lists
// the tiles' slots once the block has passed a barrier.
template <typename Shape>
__device__ void attend_coded_store(const AttentionArgs& args, const CodeTables& tables, int kv_head,
                                   const TileRun& run, const FirstSlots& first,
                                   const BlockPlan& plan, const BlockQueries<Shape>& queries,
                                   uint8_t* shared, uint8_t* stages, float* rest) {
  const int g = lane_id() >> 2, c = lane_id() & 3;
  const CodedCopier<Shape> copier(args.layout.k);
  const auto copy = [&](const uint8_t* slot, uint8_t* stage) { copier.start(slot, stage); };
  TileStream stream(run, first, plan, stages, Shape::kStageBytes, copy);

  // While the first copies are under way. The queries' place is free until the dense buffer's turn,
  // the merging area until a split's end.
  CodeDim* const dims = reinterpret_cast<CodeDim*>(shared);
  const uint4* const weights = reinterpret_cast<const uint4*>(shared + Shape::kWeightsAt);
  float* const scales = reinterpret_cast<float*>(shared + Shape::kScalesAt);
  weigh_bits<Shape>(code_table(tables, args.layout, args.layer, kv_head, true),
                    code_table(tables, args.layout, args.layer, kv_head, false), queries, dims,
                    reinterpret_cast<float*>(queries.shared),
                    reinterpret_cast<uint16_t*>(shared + Shape::kMergeAt),
                    shared + Shape::kWeightsAt, scales);
  float q_scale[2], q_offset[2];  // of queries 2c % 4 and the next
#pragma unroll
  for (int n = 0; n < 2; n++) {
    q_scale[n] = scales[2 * c % 4 + n];
    q_offset[n] = scales[kSetQueries + 2 * c % 4 + n];
  }

  const int place = kept(g * Shape::kStride + 4 * c);
  Softmax<Shape::kBitTiles + 1> bits;
  const auto attend = [&](const uint8_t* stage, int32_t i) {
    float scores[4], log_scale[2];
    coded_scores<Shape>(stage + place, weights, scores);
    const uint16_t* const row_scales =
        reinterpret_cast<const uint16_t*>(stage + 2 * kDecodeTokens * Shape::kStride);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float k_scale = bf16_float(row_scales[g + 8 * r]);
      const float v_scale = bf16_float(row_scales[kDecodeTokens + g + 8 * r]);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        scores[2 * r + n] = (scores[2 * r + n] * q_scale[n] + q_offset[n]) * k_scale;
      }
      // A row of zeros has scale 0: any small one keeps the logarithm finite.
      log_scale[r] = log2_approx(fmaxf(v_scale, 0x1p-60f));
    }
    uint32_t p[2];
    update_softmax<DType::kF16, true, 1>(scores, log_scale, bits, p,
                                         HiddenTokens{run.hidden_rows, i, g});
    add_coded_values<Shape>(stage + kDecodeTokens * Shape::kStride, p, bits);
  };
  for_splits(plan, run.n, stream, attend, [&](int32_t split, bool whole) {
    PartialRows rows = {rest, kPartialFloats<Shape>, kSetQueries};
    if (whole) {
      rows = {partial_of<Shape>(args, plan, split, 0), args.max_splits * kPartialFloats<Shape>,
              plan.n_heads};
    }
    merge_bits<Shape>(bits, dims, shared + Shape::kMergeAt, rows);
    bits = {};
  });
  cp_async_wait<0>();
}

}  // namespace mustafar::cuda
