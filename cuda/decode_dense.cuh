// Dense slots (every value stored, no masks) in the decode kernel: rows go to shared memory by
// cp.async with their 16-byte chunks swizzled, and from there into fragments by ldmatrix.
//
// One load takes the same two neighbouring chunks of all 16 rows. K as stored is the A operand of
// S^T = K Q^T; V transposed by the load, in units of 2 bytes, that of O^T = V^T P^T. Fragment row g
// is token g. Dims follow from the loads (g = lane / 4, c = lane % 4):
//   2-byte  K step i: dims from 16 i + 2c on. V tile t: row g is dim 16 t + g, row g + 8 is eight
//           dims later.
//   int8    K step i: dims from 32 i + 4c on. A unit is 2 dims, so row g of V's tile t is dim
//           16 t + 2g, row g + 8 is the next dim.
//   int4    K step i: dims from 32 i + 8c on, even ones in the first half of the step, odd ones in
//           the second. A unit is 4 dims, so row g of V's tile t is dim 32 (t / 2) + 4g + 2 (t %
//           2), row g + 8 is the next dim.
//
// Bank conflicts: none. Chunk x of row r lies in place x ^ (r / n) of its row, modulo the chunks of
// a row (8 at most), where n is the rows of a line of 128 bytes (1 for longer rows). ldmatrix reads
// eight rows' chunks x at once: rows of 256 and 128 bytes put them into places x ^ r, r = 0 .. 7,
// of eight lines: eight different groups of four banks. Rows of 64 bytes: (r % 2) * 4 + (x ^ r / 2
// % 4); of 32 bytes: (r % 4) * 2 + (x ^ r / 4 % 2): eight again. A copy's quarter of a warp fills
// one line.
#pragma once

#include <type_traits>

#include "cuda/async_copy.cuh"
#include "cuda/decode_scores.cuh"
#include "cuda/decode_softmax.cuh"
#include "cuda/decode_stages.cuh"
#include "cuda/device_ops.cuh"
#include "cuda/matrix_ops.cuh"

namespace mustafar::cuda {

// Byte of chunk `chunk` of row `row` in a stage of rows of kRowBytes.
template <int kRowBytes>
__device__ __forceinline__ int32_t swizzled(int row, int chunk) {
  constexpr int kChunks = kRowBytes / 16;
  constexpr int kRowsPerLine = kRowBytes < 128 ? 128 / kRowBytes : 1;
  return row * kRowBytes + (chunk ^ row / kRowsPerLine % (kChunks < 8 ? kChunks : 8)) * 16;
}

// Starts the copy of 16 rows. source(n): where chunk n of them, in order, comes from.
template <int kRowBytes, typename Source>
__device__ __forceinline__ void copy_rows(uint8_t* to, Source&& source) {
  constexpr int kChunks = kRowBytes / 16;
#pragma unroll
  for (int i = 0; i < kDecodeTokens * kChunks / kWarpSize; i++) {
    const int n = i * kWarpSize + lane_id();
    cp_async16(to + swizzled<kRowBytes>(n / kChunks, n % kChunks), source(n));
  }
}

// Sizes of dense slots, which Shape compiles in.
template <typename Shape>
struct DenseSlots {
  static constexpr int kRowBytes = Shape::kDim * Shape::kBits / 8;
  static constexpr int kRowsBytes = kDecodeTokens * kRowBytes;  // of a warp's rows of a tile
  static constexpr int kLoads = kRowBytes / 32;
  static constexpr bool kCodes = Shape::kBits != 16;
  static constexpr int kSteps = Shape::kBits == 4 ? 2 * kLoads : kLoads;
  static constexpr DType kProduct = kCodes ? DType::kF16 : Shape::kTail;
  static constexpr float kKeyUnit = Shape::kBits == 4 ? 0.0625f : 1.0f;
  // A stage: K rows, V rows, K scales, V scales.
  static constexpr int kStageBytes = 2 * kRowsBytes + (kCodes ? 4 * kDecodeTokens : 0);

  // The dim of row g of output tile t, and how far that of row g + 8 lies from it.
  static constexpr int kPairStep = kCodes ? 1 : 8;
  static __device__ __forceinline__ int output_dim(int t, int g) {
    if constexpr (Shape::kBits == 16) return 16 * t + g;
    if constexpr (Shape::kBits == 8) return 16 * t + 2 * g;
    return 32 * (t / 2) + 4 * g + 2 * (t % 2);
  }
};

// The queries of all sets as B fragments, in the order of dense slots. queries: split_queries'.
template <typename Shape>
struct DenseQueries {
  using Slots = DenseSlots<Shape>;
  uint32_t b[Shape::kSets][Slots::kSteps][2];
  float scale[Shape::kSets][2];  // of codes: of queries 2c % 4 and the next

  __device__ __forceinline__ explicit DenseQueries(const uint8_t* queries) {
    constexpr int kStride = kQueryRowBytes < Shape::kDim, Slots::kCodes ? 8 : 16 > ;
    const int lane = lane_id();
#pragma unroll
    for (int set = 0; set < Shape::kSets; set++) {
      const uint8_t* const columns = queries + set * 8 * kStride;
      if constexpr (Shape::kBits == 4) {
        const uint8_t* const dims = columns + (lane >> 2) * kStride + (lane & 3) * 8;
#pragma unroll
        for (int i = 0; i < Slots::kSteps; i++) {
          const uint2 eight = *reinterpret_cast<const uint2*>(dims + i * 32);
          b[set][i][0] = byte_permute(eight.x, eight.y, 0x6420);
          b[set][i][1] = byte_permute(eight.x, eight.y, 0x7531);
        }
      } else {
#pragma unroll
        for (int i = 0; i < Slots::kSteps; i += 2) {  // four chunks of 16 bytes, two of a step
          uint32_t m[4];
          load_matrices<false>(m, columns + (lane & 7) * kStride + (2 * i + (lane >> 3)) * 16);
          b[set][i][0] = m[0];
          b[set][i][1] = m[1];
          b[set][i + 1][0] = m[2];
          b[set][i + 1][1] = m[3];
        }
      }
      if constexpr (Slots::kCodes) {
        load_query_scales<Shape::kDim, Shape::kSets>(queries, set, Slots::kKeyUnit, scale[set]);
      }
    }
  }
};

// This lane's place in load 0 of a stage's rows: that of load i is the same ^ 32 i.
template <int kRowBytes>
__device__ __forceinline__ int32_t load_place() {
  return swizzled<kRowBytes>(lane_id() & 15, lane_id() >> 4);
}

// Scores of 16 staged rows. place: load_place.
template <typename Shape>
__device__ __forceinline__ void dense_scores(const uint8_t* rows, int32_t place,
                                             const DenseQueries<Shape>& q,
                                             float (&scores)[Shape::kSets][4]) {
  using Slots = DenseSlots<Shape>;
  std::conditional_t<Slots::kCodes, int32_t, float> acc[Shape::kSets][4] = {};
#pragma unroll
  for (int i = 0; i < Slots::kLoads; i++) {
    uint32_t m[4];  // rows 0-7 and 8-15 of the first chunk, then of the second
    load_matrices<false>(m, rows + (place ^ 32 * i));
#pragma unroll
    for (int set = 0; set < Shape::kSets; set++) {
      if constexpr (Shape::kBits == 16) {
        mma_16x8x16<Shape::kTail>(acc[set], m, q.b[set][i]);
      } else if constexpr (Shape::kBits == 8) {
        mma_16x8x32_s8(acc[set], m, q.b[set][i]);
      } else {
#pragma unroll
        for (int h = 0; h < 2; h++) {  // codes times 16, as bytes
          constexpr uint32_t kHigh = 0xf0f0f0f0u;
          const uint32_t a[4] = {m[2 * h] << 4 & kHigh, m[2 * h + 1] << 4 & kHigh, m[2 * h] & kHigh,
                                 m[2 * h + 1] & kHigh};
          mma_16x8x32_s8(acc[set], a, q.b[set][2 * i + h]);
        }
      }
    }
  }
#pragma unroll
  for (int set = 0; set < Shape::kSets; set++) {
    if constexpr (Slots::kCodes) {
      add_terms(acc[set], scores[set]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) scores[set][i] = acc[set][i];
      add_terms(scores[set]);
    }
  }
}

// Nibbles 0 and 4 of a word (kNibble 0) or 1 and 5 (1), signed, as f16 values: 0x6400 | u is
// 1024 + u, u the nibble plus 8.
template <int kNibble>
__device__ __forceinline__ uint32_t nibbles_to_f16(uint32_t word) {
  if constexpr (kNibble == 0) {
    return subtract_f16x2((word & 0x000f000fu) ^ 0x64086408u, 0x64086408u);  // less 1032
  } else {
    // 1024 + 16 u: times 1/16 (0x2c00), less 72 (0xd480).
    return multiply_add_f16x2((word & 0x00f000f0u) ^ 0x64806480u, 0x2c002c00u, 0xd480d480u);
  }
}

// O^T += V^T P^T of 16 staged rows.
template <typename Shape>
__device__ __forceinline__ void add_dense_values(const uint8_t* rows, int32_t place,
                                                 const uint32_t (&p)[Shape::kSets][2],
                                                 Softmax<Shape::kTiles> (&softmax)[Shape::kSets]) {
  using Slots = DenseSlots<Shape>;
  const auto add = [&](int tile, const uint32_t(&a)[4]) {
#pragma unroll
    for (int set = 0; set < Shape::kSets; set++) {
      mma_16x8x16<Slots::kProduct>(softmax[set].out[tile], a, p[set]);
    }
  };
#pragma unroll
  for (int i = 0; i < Slots::kLoads; i++) {
    uint32_t m[4];  // tokens 0-7 and 8-15 of the first chunk, then of the second
    load_matrices<true>(m, rows + (place ^ 32 * i));
    if constexpr (Shape::kBits == 16) {
      add(i, {m[0], m[2], m[1], m[3]});
    } else if constexpr (Shape::kBits == 8) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 2; j++) {  // 0x6400 | u is 1024 + u, u the code plus 128
          const uint32_t biased = m[2 * h + j] ^ 0x80808080u;
          constexpr uint32_t k1152 = 0x64806480u;
          a[2 * j] = subtract_f16x2(byte_permute(biased, 0x64646464u, 0x4240), k1152);
          a[2 * j + 1] = subtract_f16x2(byte_permute(biased, 0x64646464u, 0x4341), k1152);
        }
        add(2 * i + h, a);
      }
    } else {
#pragma unroll
      for (int h = 0; h < 4; h++) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const uint32_t word = m[h / 2 * 2 + j] >> (h % 2 * 8);
          a[2 * j] = nibbles_to_f16<0>(word);
          a[2 * j + 1] = nibbles_to_f16<1>(word);
        }
        add(4 * i + h, a);
      }
    }
  }
}

// One staged tile: 16 tokens of which the first n_tokens count, but for those hidden.
template <typename Shape, typename Hidden = NoneHidden>
__device__ __forceinline__ void attend_dense_tile(const uint8_t* stage, int32_t place, int n_tokens,
                                                  const DenseQueries<Shape>& q,
                                                  Softmax<Shape::kTiles> (&softmax)[Shape::kSets],
                                                  const Hidden& hidden = {}) {
  using Slots = DenseSlots<Shape>;
  const int g = lane_id() >> 2;
  float scores[Shape::kSets][4];
  dense_scores<Shape>(stage, place, q, scores);
  float log_scale[2] = {0.0f, 0.0f};
  if constexpr (Slots::kCodes) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(stage + 2 * Slots::kRowsBytes);
    const float k_scale[2] = {bf16_float(scales[g]), bf16_float(scales[g + 8])};
    const float v_scale[2] = {bf16_float(scales[g + 16]), bf16_float(scales[g + 24])};
    scale_scores(k_scale, v_scale, q.scale, scores, log_scale);
  }
  uint32_t p[Shape::kSets][2];
#pragma unroll
  for (int set = 0; set < Shape::kSets; set++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (g + i / 2 * 8 >= n_tokens) scores[set][i] = -INFINITY;
    }
    update_softmax<Slots::kProduct, Slots::kCodes>(scores[set], log_scale, softmax[set], p[set],
                                                   hidden);
  }
  add_dense_values<Shape>(stage + Slots::kRowsBytes, place, p, softmax);
}

// Attends to the store's tiles, dense slots; finish(split, used stage) at the end of a split there.
// plan: lists the tiles' slots once the block has passed a barrier.
template <typename Shape, typename Finish>
__device__ __forceinline__ void attend_dense_store(const TileRun& run, const FirstSlots& first,
                                                   const BlockPlan& plan, int32_t slot_bytes,
                                                   const BlockQueries<Shape>& queries,
                                                   uint8_t* stages,
                                                   Softmax<Shape::kTiles> (&softmax)[Shape::kSets],
                                                   Finish&& finish) {
  using Slots = DenseSlots<Shape>;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = lane_id();
  // Of the four chunks of scales, two of K and two of V.
  const int32_t scales = kBlockTokens * Slots::kRowBytes - warp * Slots::kRowsBytes +
                         (lane >> 1) * slot_bytes + warp * kDecodeTokens * 2 + (lane & 1) * 16;
  const auto copy = [&](const uint8_t* slot, uint8_t* stage) {
    const uint8_t* const k = slot + warp * Slots::kRowsBytes;
    copy_rows<Slots::kRowBytes>(stage, [&](int n) { return k + n * 16; });
    const uint8_t* const v = k + slot_bytes;
    copy_rows<Slots::kRowBytes>(stage + Slots::kRowsBytes, [&](int n) { return v + n * 16; });
    if constexpr (Slots::kCodes) {
      if (lane < 4) cp_async16(stage + 2 * Slots::kRowsBytes + lane * 16, k + scales);
    }
  };
  TileStream stream(run, first, plan, stages, Slots::kStageBytes, copy);
  queries.template split<Slots::kCodes ? 8 : 16>();
  sync_block();
  const DenseQueries<Shape> q(queries.shared);
  if constexpr (Shape::kQueriesInStage) {
    static_assert(kQueryBytes<Shape::kDim, Shape::kSets> <= Slots::kStageBytes);
    sync_block();
  }
  const int32_t place = load_place<Slots::kRowBytes>();
  for_splits(
      plan, run.n,
      [&](int32_t i) {
        attend_dense_tile<Shape>(stream.next(i), place, kDecodeTokens, q, softmax,
                                 HiddenTokens{run.hidden_rows, i, lane >> 2});
      },
      [&](int32_t split, bool whole) {
        if (whole) finish(split, stream.used());
      });
  cp_async_wait<0>();
}

// Rows [first, n_rows) of the dense buffer of which this warp has 16, under slots of its own type:
// staged like a tile. queries: split. stage: as many bytes as a tile's.
template <typename Shape>
__device__ __forceinline__ void attend_dense_tail(const uint8_t* keys, const uint8_t* values,
                                                  int32_t first, int32_t n_rows,
                                                  const uint8_t* queries, uint8_t* stage,
                                                  Softmax<Shape::kTiles> (&softmax)[Shape::kSets]) {
  using Slots = DenseSlots<Shape>;
  constexpr int kChunks = Slots::kRowBytes / 16;
  const auto source = [&](const uint8_t* base, int n) {
    const int32_t row = first + n / kChunks < n_rows ? first + n / kChunks : n_rows - 1;
    return base + int64_t{row} * Slots::kRowBytes + n % kChunks * 16;
  };
  sync_warp();  // all lanes are done with the stage
  copy_rows<Slots::kRowBytes>(stage, [&](int n) { return source(keys, n); });
  copy_rows<Slots::kRowBytes>(stage + Slots::kRowsBytes, [&](int n) { return source(values, n); });
  cp_async_commit();
  const DenseQueries<Shape> q(queries);
  cp_async_wait<0>();
  sync_warp();
  attend_dense_tile<Shape>(stage, load_place<Slots::kRowBytes>(), n_rows - first, q, softmax);
}

}  // namespace mustafar::cuda
