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
//                 g + 8) of unit g of a row's n-th 16 bytes; one tile more sums P. They become
//                 dims when the store is done.
//
// Rows lie in a stage an odd number of 16 bytes apart: free of bank conflicts.
#pragma once

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
  // Shared memory: tables of dims, K and V; bit weights of the queries; their scales and offsets;
  // then as in DecodeShape.
  static constexpr int kWeightsAt = 2 * kDim * static_cast<int>(sizeof(CodeDim));
  static constexpr int kScalesAt = kWeightsAt + kChunks * 2 * kWarpSize * 16;
  static constexpr int kTable = kScalesAt + 2 * kSetQueries * 4;
  static constexpr int kQueriesAt = kTable + kPlanBytes;
  static constexpr int kStagesAt = kQueriesAt + cuda::kQueryBytes<kDim, kSets>;
  // As many as registers allow without spilling.
  static constexpr int kBlocksPerMultiprocessor = kChunks <= 2                          ? 4
                                                  : kChunks == 3 && kRowBytes % 16 == 0 ? 3
                                                                                        : 2;
  // What attend_tail takes for the dense buffer's rows.
  static constexpr int kBits = 16;
  static constexpr bool kDense = false;
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
          cp_async8(to + to_[i], from + i * kWarpSize * kUnit);
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

// Byte of the first term of a bit's weight for query `query` among the weights, which lane (g, c)
// reads 16 bytes at a time: of its n-th word the bits 0 and 1 of every byte's half, then 2 and 3,
// four bytes' weights in a word. The second term is kSecondTerm further on.
__device__ __forceinline__ uint32_t weight_place(uint32_t bit, uint32_t query) {
  const uint32_t word = bit / 32, byte = bit % 32 / 8, half = bit % 8 / 4, j = bit % 4;
  const uint32_t n = word / 4, c = word % 4;
  return ((2 * n + j / 2) * kWarpSize + 4 * query + c) * 16 + (j % 2 * 2 + half) * 4 + byte;
}
constexpr uint32_t kSecondTerm = 4 * kSetQueries * 16;

// Weights, scale and offset of query `warp`, by its warp; weights were zero. A score is (scale * 8
// times the weighted sum of bits + offset) * the key's scale.
template <typename Shape>
__device__ void weigh_bits(const float* query, const CodeDim* dims, uint8_t* weights,
                           float* scales) {
  constexpr int kLaneDims = Shape::kDim / kWarpSize;
  const float softmax_scale = kLog2E / sqrtf(static_cast<float>(Shape::kDim));
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = lane_id();
  float x[kLaneDims], largest = 0.0f, offset = 0.0f;  // x: weights of the lowest bits
#pragma unroll
  for (int i = 0; i < kLaneDims; i++) {
    const int d = i * kWarpSize + lane;
    x[i] = query == nullptr ? 0.0f : query[d] * softmax_scale * dims[d].step;
    const float half = 0.5f * static_cast<float>(1u << dims[d].width());
    largest = fmaxf(largest, fabsf(x[i]) * half);
    offset += x[i] * (0.5f - half);
  }
  largest = warp_max(largest);
  offset = warp_sum(offset);
  const float inverse = largest > 0.0f ? kTopWhole / largest : 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneDims; i++) {
    const CodeDim& dim = dims[i * kWarpSize + lane];
    float weight = x[i] * inverse;
#pragma unroll 1
    for (uint32_t b = 0; b < dim.width(); b++, weight *= 2.0f) {
      const TwoTerms terms = two_terms(weight);
      uint8_t* const at = weights + weight_place(dim.first_bit() + b, static_cast<uint32_t>(warp));
      at[0] = terms.first;
      at[kSecondTerm] = terms.second;
    }
  }
  if (lane == 0) {
    scales[warp] = 0.125f * largest / kTopWhole;
    scales[kSetQueries + warp] = offset;
  }
}

// Eight times the sums of bits' weights over 16 staged K rows.
template <typename Shape>
__device__ __forceinline__ void coded_scores(const uint8_t* stage, const uint4* weights,
                                             float (&scores)[4]) {
  const int lane = lane_id(), g = lane >> 2, c = lane & 3;
  const uint8_t* const rows = stage + g * Shape::kStride + 4 * c;
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

// The sums of bits as those of dims, in the order of output_dim. memory: of this warp, [2][16 *
// kBitTiles] f32.
template <typename Shape>
__device__ void bits_to_dims(const Softmax<Shape::kBitTiles + 1>& bits, const CodeDim* dims,
                             float* memory, Softmax<Shape::kTiles>& softmax) {
  constexpr int kBits = 16 * Shape::kBitTiles;
  const int lane = lane_id(), g = lane >> 2, c = lane & 3;
  // Of the two lanes that have a query, c < 2 takes the even tiles of dims, the other the odd ones.
  const int odd = c >> 1;
  float* const mine = memory + (c & 1) * kBits;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const auto both_terms = [](float x) { return x + shuffle_xor(x, 2); };
    sync_warp();
#pragma unroll
    for (int t = 0; t < Shape::kBitTiles; t++) {
      // The products were of subnormals: a set bit counted as 2^(t % 8 - 24).
      const float unit = static_cast<float>(1 << (24 - t % 8));
      const float low = both_terms(bits.out[t][n]), high = both_terms(bits.out[t][2 + n]);
      mine[16 * t + 8 * odd + g] = (odd == 0 ? low : high) * unit;
    }
    const float p_sum = both_terms(bits.out[Shape::kBitTiles][n]);
    sync_warp();
#pragma unroll
    for (int t = 0; t < Shape::kTiles; t += 2) {
      float value[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const CodeDim dim = dims[g * Shape::kVDims + 2 * (t + odd) + h];
        float sum = (0.5f - 0.5f * static_cast<float>(1u << dim.width())) * p_sum;
        float weight = 1.0f;
#pragma unroll 1
        for (uint32_t bit = dim.first_bit(); bit < dim.first_bit() + dim.width(); bit++) {
          const uint32_t tile = bit / 128 * 8 + bit % 8;
          sum += weight * mine[16 * tile + (bit & 8) + bit / 16 % 8];
          weight *= 2.0f;
        }
        value[h] = sum * dim.step;
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        softmax.out[t][2 * h + n] = odd == 0 ? value[h] : 0.0f;
        softmax.out[t + 1][2 * h + n] = odd == 0 ? 0.0f : value[h];
      }
    }
    softmax.max[n] = bits.max[n];
    softmax.sum[n] = bits.sum[n];
  }
}

// Attends to the store's tiles. table: Shape::kTable bytes; plan: lists their slots once the block
// has passed a barrier.
template <typename Shape>
__device__ void attend_coded_store(const AttentionArgs& args, const CodeTables& tables, int kv_head,
                                   const TileRun& run, const BlockPlan& plan,
                                   const BlockQueries<Shape>& queries, uint8_t* table,
                                   uint8_t* stages, Softmax<Shape::kTiles>& softmax) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
  const int lane = lane_id(), g = lane >> 2, c = lane & 3;
  const CodedCopier<Shape> copier(args.layout.k);
  const auto copy = [&](const uint8_t* slot, uint8_t* stage) { copier.start(slot, stage); };
  TileStream stream(run, plan, stages, Shape::kStageBytes, copy);

  // While the first copies are under way.
  CodeDim* const dims = reinterpret_cast<CodeDim*>(table);
  uint4* const weights = reinterpret_cast<uint4*>(table + Shape::kWeightsAt);
  float* const scales = reinterpret_cast<float*>(table + Shape::kScalesAt);
  if (warp < 2) {
    load_code_dims(code_table(tables, args.layout, args.layer, kv_head, warp == 0), Shape::kDim,
                   dims + warp * Shape::kDim);
  } else {
    for (int i = thread - 2 * kWarpSize; i < Shape::kChunks * 2 * kWarpSize; i += 2 * kWarpSize) {
      weights[i] = {0u, 0u, 0u, 0u};
    }
  }
  sync_block();
  weigh_bits<Shape>(warp < queries.n ? queries.from + warp * Shape::kDim : nullptr, dims,
                    table + Shape::kWeightsAt, scales);
  sync_block();
  float q_scale[2], q_offset[2];  // of queries 2c % 4 and the next
#pragma unroll
  for (int n = 0; n < 2; n++) {
    q_scale[n] = scales[2 * c % 4 + n];
    q_offset[n] = scales[kSetQueries + 2 * c % 4 + n];
  }

  Softmax<Shape::kBitTiles + 1> bits;
  for (int32_t i = 0; i < run.n; i++) {
    const uint8_t* const stage = stream.next(i);
    float scores[4], log_scale[2];
    coded_scores<Shape>(stage, weights, scores);
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
    update_softmax<DType::kF16, true>(scores, log_scale, bits, p,
                                      HiddenTokens{run.hidden_rows, i, g});
    add_coded_values<Shape>(stage + kDecodeTokens * Shape::kStride, p, bits);
  }
  cp_async_wait<0>();
  static_assert(2 * 16 * Shape::kBitTiles * 4 <= kStages * Shape::kStageBytes);
  bits_to_dims<Shape>(bits, dims + Shape::kDim, reinterpret_cast<float*>(stages), softmax);
}

}  // namespace mustafar::cuda
