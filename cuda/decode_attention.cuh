// The tensor-core decode kernel: one query row per sequence over compressed blocks and dense tail.
//
// Grid: x split, y (chunk of 4 query heads, KV head), z sequence; 4 warps. Every warp takes 16 of
// each tile's 64 tokens and keeps its own online softmax; nothing is shared between warps before
// the end, so the loop has no block barrier. With g = lane / 4, c = lane % 4:
//   S^T = K Q^T   K rows are the A operand. A dot product ignores the order of dims, so lane (g, c)
//                 owns dims [c D/4, (c+1) D/4) of two tokens: one contiguous run of kept values
//                 each, expanded in registers. B holds 4 queries in columns 0-3 and, because a
//                 query is split into two terms (2-byte or 1-byte), the second terms in columns
//                 4-7.
//   O^T = V^T P^T lane (g, c) owns dims [g D/8, (g+1) D/8) of four tokens; S^T becomes P^T by one
//                 8 x 8 transpose, columns 4-7 holding what rounding took from columns 0-3.
// Rows are dealt to lanes so that K's fragment rows are V's: fragment row g is token g/2 + 4 (g %
// 2) of the 16, row g + 8 eight later; V's four tokens are c, c + 4, c + 8, c + 12, free of bank
// conflicts in shared memory.
// Integer values: K codes meet int8 queries in an integer product; V codes become f16, exact, and
// their scale enters P as an exponent, so that P stays in [0, 1].
// Compressed tiles arrive by cp.async, kStages deep per warp; the dense buffer (sinks, tail, the
// new token: a few tiles in all) is read directly.
//
// Shared: expansion table 2 KiB; per warp kStages stages of 16 K rows and 16 V rows as stored; at
// the end the warps' results over them.
#pragma once

#include "cuda/attention.h"
#include "cuda/device_ops.cuh"
#include "cuda/expand.cuh"
#include "cuda/launch.cuh"

namespace mustafar::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeTokens = 16;  // of a tile, per warp
constexpr int kDecodeQueries = 4;  // query heads of a block
constexpr int kStages = 3;
constexpr int kStageSlack = 16;  // bytes that a run of any length may read past its row

// kTail: kF16 or kBF16. kBits: of stored values; 16: of the tail's type. kKeepK, kKeepV: kept
// values of a 32-dim K group and a 16-dim V group at head_dim 128 when compiled in, 0: any layout.
template <DType kTailType, int kValueBits, int kHeadDim, int kKeepK, int kKeepV>
struct DecodeShape {
  static constexpr DType kTail = kTailType;
  static constexpr int kBits = kValueBits;
  static constexpr int kDim = kHeadDim;
  static constexpr int kKDims = kDim / 4;  // a lane's dims of a K row
  static constexpr int kVDims = kDim / 8;  // and of a V row
  static constexpr int kKRunWords = kKeepK * kBits / 32;
  static constexpr int kVRunWords = kKeepV * kBits / 32;
  static constexpr bool kFixed = kKeepK != 0;
  // Of a warp's 16 rows of K and V when compiled in: masks, values, scales.
  static constexpr int kStageBytes =
      16 * (2 * kDim / 8 + (4 * kKRunWords + 8 * kVRunWords) * 4 + (kBits == 16 ? 0 : 4));
  static constexpr int kTiles = kDim / 16;  // 16-dim output tiles
};

// One warp's running softmax of 4 queries: lane (g, c) has queries 2c % 4 and 2c % 4 + 1.
template <int kTiles>
struct Softmax {
  float max[2] = {-INFINITY, -INFINITY};  // over all lanes
  float sum[2] = {0.0f, 0.0f};            // this lane's tokens
  float out[kTiles][4] = {};              // O^T fragments, columns 4-7 to be added to 0-3
};

// The columns of a lane's query: hi terms in 0-3, lo terms in 4-7.
struct Query {
  const float* values;  // [head_dim] of the query of column g, or null past the last query
  bool low;             // second term
  float scale;          // of the softmax, in base 2

  __device__ __forceinline__ float at(int dim) const {
    return values != nullptr ? values[dim] * scale : 0.0f;
  }
};

// B fragments of S^T = K Q^T, 2-byte: step i multiplies dims c D/4 + 4i .. + 3.
template <DType kType, int kDims>
__device__ __forceinline__ void load_query(const Query& q, int first_dim,
                                           uint32_t (&b)[kDims / 4][2]) {
#pragma unroll
  for (int i = 0; i < kDims / 4; i++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float term[2];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float x = q.at(first_dim + 4 * i + 2 * j + n);
        const float high = half_float<kType>(static_cast<uint16_t>(pack2<kType>(x, 0.0f)));
        term[n] = q.low ? x - high : high;
      }
      b[i][j] = pack2<kType>(term[0], term[1]);
    }
  }
}

// The same in int8: step i multiplies dims c D/4 + 8i .. + 7. A query is scale * (128 high + low).
// Returns the scale of column g's query.
template <int kDims>
__device__ __forceinline__ float load_query_int8(const Query& q, int first_dim,
                                                 uint32_t (&b)[kDims / 8][2]) {
  float largest = 0.0f;
  for (int d = 0; d < kDims; d++) largest = fmaxf(largest, fabsf(q.at(first_dim + d)));
  largest = fmaxf(largest, shuffle_xor(largest, 1));
  largest = fmaxf(largest, shuffle_xor(largest, 2));
  const float scale = largest / 16256.0f;  // 127 * 128
  const float inverse = largest > 0.0f ? 16256.0f / largest : 0.0f;
#pragma unroll
  for (int i = 0; i < kDims / 8; i++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      uint32_t word = 0;
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const float x =
            fminf(fmaxf(rintf(q.at(first_dim + 8 * i + 4 * j + n) * inverse), -16256.0f), 16256.0f);
        const int whole = static_cast<int>(x);
        const int high = (whole + 64) >> 7;
        const int term = q.low ? whole - high * 128 : high;
        word |= (static_cast<uint32_t>(term) & 0xffu) << (8 * n);
      }
      b[i][j] = word;
    }
  }
  return scale;
}

// Token of the 16 in fragment row g (row g + 8: eight later).
__device__ __forceinline__ int row_token(int g) { return (g >> 1) + 4 * (g & 1); }

// Scores of a lane's two tokens: [2 j + n] is token row_token(g) + 8 j, query 2c % 4 + n.
template <DType kType, int kDims>
__device__ __forceinline__ void scores_2byte(const uint32_t (&rows)[2][kDims / 2],
                                             const uint32_t (&b)[kDims / 4][2], float (&s)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) s[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kDims / 4; i++) {
    const uint32_t a[4] = {rows[0][2 * i], rows[1][2 * i], rows[0][2 * i + 1], rows[1][2 * i + 1]};
    mma_16x8x16<kType>(s, a, b[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) s[i] += shuffle_xor(s[i], 2);
}

// The same for int8 codes, as whole numbers in units of both scales.
template <int kDims>
__device__ __forceinline__ void scores_int8(const uint32_t (&rows)[2][kDims / 4],
                                            const uint32_t (&b)[kDims / 8][2], float (&s)[4]) {
  int32_t acc[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kDims / 8; i++) {
    const uint32_t a[4] = {rows[0][2 * i], rows[1][2 * i], rows[0][2 * i + 1], rows[1][2 * i + 1]};
    mma_16x8x32_s8(acc, a, b[i]);
  }
  const int weight = lane_id() & 2 ? 1 : 128;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    acc[i] *= weight;
    s[i] = static_cast<float>(acc[i] + shuffle_xor(acc[i], 2));
  }
}

// Folds 16 tokens into the softmax and leaves P^T as B fragments of kType. log_scale: of V's scale
// per token where kScaled, else 0: P carries it.
template <DType kType, bool kScaled, int kTiles>
__device__ __forceinline__ void update_softmax(const float (&s)[4], const float (&log_scale)[2],
                                               Softmax<kTiles>& softmax, uint32_t (&b)[2]) {
  float p[4], rescale[2];
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const float scaled[2] = {s[n] + log_scale[0], s[2 + n] + log_scale[1]};
    float max = fmaxf(scaled[0], scaled[1]);
#pragma unroll
    for (int m = 4; m <= 16; m *= 2) max = fmaxf(max, shuffle_xor(max, m));
    max = fmaxf(max, softmax.max[n]);
    rescale[n] = exp2_approx(softmax.max[n] - max);
    softmax.max[n] = max;
    p[n] = exp2_approx(scaled[0] - max);
    p[2 + n] = exp2_approx(scaled[1] - max);
    const float sum =
        kScaled ? exp2_approx(s[n] - max) + exp2_approx(s[2 + n] - max) : p[n] + p[2 + n];
    softmax.sum[n] = softmax.sum[n] * rescale[n] + sum;
  }
  // Once a maximum has settled, most tiles leave it.
  if (ballot(rescale[0] != 1.0f || rescale[1] != 1.0f) != 0) {
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++) softmax.out[t][i] *= rescale[i & 1];
    }
  }
  const bool low = (lane_id() & 2) != 0;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    uint32_t word = pack2<kType>(p[2 * j], p[2 * j + 1]);
    const float high[2] = {half_float<kType>(static_cast<uint16_t>(word)),
                           half_float<kType>(static_cast<uint16_t>(word >> 16))};
    if (low) word = pack2<kType>(p[2 * j] - high[0], p[2 * j + 1] - high[1]);
    b[j] = transpose_8x8(word);
  }
}

// O^T += V^T P^T: words[t][i] holds dims 2i, 2i + 1 of the
// lane's token t.
template <DType kType, int kTiles>
__device__ __forceinline__ void add_values(const uint32_t (&words)[4][kTiles],
                                           const uint32_t (&b)[2], Softmax<kTiles>& softmax) {
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
    const uint32_t a[4] = {byte_permute(words[0][i], words[1][i], 0x5410),
                           byte_permute(words[0][i], words[1][i], 0x7632),
                           byte_permute(words[2][i], words[3][i], 0x5410),
                           byte_permute(words[2][i], words[3][i], 0x7632)};
    mma_16x8x16<kType>(softmax.out[i], a, b);
  }
}

// Biased codes (code + 128, a byte each) as f16 values: 0x6400 | u is 1024 + u.
template <int kWords>
__device__ __forceinline__ void codes_to_f16(const uint32_t (&bytes)[kWords],
                                             uint32_t (&halves)[2 * kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; i++) {
    constexpr uint32_t k1152 = 0x64806480u;
    halves[2 * i] = subtract_f16x2(byte_permute(bytes[i], 0x64646464u, 0x4140), k1152);
    halves[2 * i + 1] = subtract_f16x2(byte_permute(bytes[i], 0x64646464u, 0x4342), k1152);
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
  __device__ __forceinline__ int32_t source(int32_t at) const {
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
  int32_t source_[kChunks];
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

// The tiles [first, last) of the store, pages[tile].
template <typename Shape>
__device__ void attend_store(const AttentionArgs& args, const SequenceView& s, int kv_head,
                             int32_t first, int32_t last, const Query& query,
                             const uint8_t* lane_table, uint8_t* stages, int32_t stage_bytes,
                             Softmax<Shape::kTiles>& softmax) {
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane >> 2, c = lane & 3;
  const SlotLayout& k_slot = args.layout.k;
  const SlotLayout& v_slot = args.layout.v;
  const Piece k_piece =
      Shape::kFixed ? fixed_piece<Shape>(Shape::kKRunWords * 16) : piece_of(k_slot);
  const Piece v_piece =
      Shape::kFixed ? fixed_piece<Shape>(Shape::kVRunWords * 32) : piece_of(v_slot);
  if constexpr (Shape::kFixed) stage_bytes = Shape::kStageBytes;
  const int64_t k_at = k_slot_offset(args.layout, args.layer, kv_head);
  const StageCopier<Shape> copier({k_piece, v_piece, k_slot.values_offset, k_slot.scales_offset,
                                   k_slot.slot_bytes, v_slot.values_offset, v_slot.scales_offset,
                                   warp});
  uint8_t* const stages_end = stages + kStages * stage_bytes;
  uint8_t* fill = stages;           // the stage that the next copy goes to
  const uint8_t* k_stage = stages;  // the stage of the tile at hand
  const auto start = [&](int32_t tile) {
    if (tile < last) copier.start(s.pages[tile] + k_at, fill);
    fill = fill + stage_bytes == stages_end ? stages : fill + stage_bytes;
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) start(first + i);

  constexpr bool kCodes = Shape::kBits != 16;
  constexpr float kCodeUnit = Shape::kBits == 4 ? 0.0625f : 1.0f;
  constexpr int kSteps = kCodes ? Shape::kKDims / 8 : Shape::kKDims / 4;
  uint32_t q[kSteps][2];
  float q_scale[2] = {1.0f, 1.0f};  // of queries 2c % 4 and the next
  if constexpr (kCodes) {
    const float scale = load_query_int8<Shape::kKDims>(query, c * Shape::kKDims, q) * kCodeUnit;
#pragma unroll
    for (int n = 0; n < 2; n++) q_scale[n] = shuffle(scale, (2 * c % 4 + n) * 4);
  } else {
    load_query<Shape::kTail, Shape::kKDims>(query, c * Shape::kKDims, q);
  }

  for (int32_t tile = first; tile < last; tile++) {
    cp_async_wait<kStages - 2>();
    sync_warp();  // the copies of all lanes are here, and all are done with the stage to refill
    start(tile + kStages - 1);
    const uint8_t* v_stage = k_stage + k_piece.bytes();

    float scores[4];
    {
      uint32_t rows[2][kExpandedWords<Shape::kBits, Shape::kKDims>];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        expand_row<Shape::kBits, Shape::kKDims, Shape::kKRunWords>(
            k_slot, k_piece, k_stage, row_token(g) + 8 * r, c, lane_table, 0u, rows[r]);
      }
      if constexpr (kCodes) {
        scores_int8<Shape::kKDims>(rows, q, scores);
      } else {
        scores_2byte<Shape::kTail, Shape::kKDims>(rows, q, scores);
      }
    }
    float log_scale[2] = {0.0f, 0.0f};
    if constexpr (kCodes) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int token = row_token(g) + 8 * r;
        const float k_scale = row_scale(k_piece, k_stage, token);
        scores[2 * r] *= k_scale * q_scale[0];
        scores[2 * r + 1] *= k_scale * q_scale[1];
        // A row of zeros has scale 0: any small one keeps the logarithm finite.
        log_scale[r] = log2_approx(fmaxf(row_scale(v_piece, v_stage, token) * kCodeUnit, 0x1p-60f));
      }
    }

    constexpr DType kProduct = kCodes ? DType::kF16 : Shape::kTail;
    uint32_t p[2];
    update_softmax<kProduct, kCodes>(scores, log_scale, softmax, p);
    uint32_t words[4][Shape::kTiles];
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const int token = c + 4 * t;
      if constexpr (kCodes) {
        uint32_t bytes[Shape::kVDims / 4];
        expand_row<Shape::kBits, Shape::kVDims, Shape::kVRunWords>(
            v_slot, v_piece, v_stage, token, g, lane_table, 0x80808080u, bytes);
        codes_to_f16(bytes, words[t]);
      } else {
        expand_row<Shape::kBits, Shape::kVDims, Shape::kVRunWords>(v_slot, v_piece, v_stage, token,
                                                                   g, lane_table, 0u, words[t]);
      }
    }
    add_values<kProduct>(words, p, softmax);
    k_stage = k_stage + stage_bytes == stages_end ? stages : k_stage + stage_bytes;
  }
  cp_async_wait<0>();
}

// Rows [first, n_rows) of the dense buffer of which this warp has 16; the rest is masked.
template <typename Shape>
__device__ void attend_dense(const uint8_t* keys, const uint8_t* values, int32_t first,
                             int32_t n_rows, const Query& query, Softmax<Shape::kTiles>& softmax) {
  const int lane = lane_id(), g = lane >> 2, c = lane & 3;
  constexpr int64_t kRowBytes = Shape::kDim * 2;
  const auto row = [&](const uint8_t* base, int token) {
    const int32_t i = first + token < n_rows ? first + token : n_rows - 1;
    return base + i * kRowBytes;
  };
  uint32_t q[Shape::kKDims / 4][2];
  load_query<Shape::kTail, Shape::kKDims>(query, c * Shape::kKDims, q);
  uint32_t rows[2][Shape::kKDims / 2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    load_dense<16, Shape::kKDims>(row(keys, row_token(g) + 8 * r), c * Shape::kKDims, 0u, rows[r]);
  }
  float scores[4];
  scores_2byte<Shape::kTail, Shape::kKDims>(rows, q, scores);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (first + row_token(g) + 8 * r >= n_rows) scores[2 * r] = scores[2 * r + 1] = -INFINITY;
  }
  const float log_scale[2] = {0.0f, 0.0f};
  uint32_t p[2];
  update_softmax<Shape::kTail, false>(scores, log_scale, softmax, p);
  uint32_t words[4][Shape::kTiles];
#pragma unroll
  for (int t = 0; t < 4; t++) {
    load_dense<16, Shape::kVDims>(row(values, c + 4 * t), g * Shape::kVDims, 0u, words[t]);
  }
  add_values<Shape::kTail>(words, p, softmax);
}

// Merges the warps and writes the partials of this block's queries. merged: shared, [warp][query]
// [head_dim + 2] f32.
template <typename Shape>
__device__ void write_partials(const AttentionArgs& args, int32_t row, int kv_head, int first_query,
                               int n_queries, int32_t split, Softmax<Shape::kTiles>& softmax,
                               float* merged) {
  constexpr int kStride = Shape::kDim + 2;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane >> 2, c = lane & 3;
#pragma unroll
  for (int n = 0; n < 2; n++) {
#pragma unroll
    for (int m = 4; m <= 16; m *= 2) softmax.sum[n] += shuffle_xor(softmax.sum[n], m);
  }
#pragma unroll
  for (int t = 0; t < Shape::kTiles; t++) {
#pragma unroll
    for (int i = 0; i < 4; i++) softmax.out[t][i] += shuffle_xor(softmax.out[t][i], 2);
  }
  sync_block();  // every warp is done with its stages
  if (c < 2) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      float* mine = merged + (warp * kDecodeQueries + 2 * c + n) * kStride;
#pragma unroll
      for (int t = 0; t < Shape::kTiles; t++) {
        mine[g * Shape::kVDims + 2 * t] = softmax.out[t][n];
        mine[g * Shape::kVDims + 2 * t + 1] = softmax.out[t][2 + n];
      }
      if (g == 0) {
        mine[Shape::kDim] = softmax.max[n];
        mine[Shape::kDim + 1] = softmax.sum[n];
      }
    }
  }
  sync_block();
  const int heads_per_kv = args.n_heads / args.n_kv_heads;
  for (int i = static_cast<int>(threadIdx.x); i < n_queries * kStride;
       i += static_cast<int>(blockDim.x)) {
    const int query = i / kStride, d = i % kStride;
    float max = -INFINITY;
    for (int w = 0; w < kDecodeWarps; w++) {
      max = fmaxf(max, merged[(w * kDecodeQueries + query) * kStride + Shape::kDim]);
    }
    float value = 0.0f;
    for (int w = 0; w < kDecodeWarps; w++) {
      const float* part = merged + (w * kDecodeQueries + query) * kStride;
      if (part[Shape::kDim] == -INFINITY) continue;  // a warp without tokens
      value += exp2_approx(part[Shape::kDim] - max) * part[d];
    }
    const int head = kv_head * heads_per_kv + first_query + query;
    args.partials[((int64_t{row} * args.n_heads + head) * args.max_splits + split) * kStride + d] =
        d == Shape::kDim ? max : value;
  }
}

// Blocks per multiprocessor are stated: left to choose, ptxas aims higher on sm_100 and spills.
template <typename Shape>
__global__ void __launch_bounds__(kDecodeWarps* kWarpSize, Shape::kDim == 64 ? 6 : 4)
    decode_attention_kernel(AttentionArgs args, int32_t stage_bytes) {
  const SequenceView& s = args.sequences[blockIdx.z];
  const int32_t split = static_cast<int32_t>(blockIdx.x);
  const int32_t n_tiles = n_decode_tiles(s.n_blocks, s.dense_tokens);
  const int32_t per_split = tiles_per_split(n_tiles);
  const int32_t first = split * per_split;
  if (first >= n_tiles) return;
  const int32_t last = first + per_split < n_tiles ? first + per_split : n_tiles;
  const int kv_head = static_cast<int>(blockIdx.y) % args.n_kv_heads;
  const int first_query = static_cast<int>(blockIdx.y) / args.n_kv_heads * kDecodeQueries;
  const int heads_per_kv = args.n_heads / args.n_kv_heads;
  const int n_queries =
      heads_per_kv - first_query < kDecodeQueries ? heads_per_kv - first_query : kDecodeQueries;

  uint8_t* table = shared_memory();
  fill_expand_table(table);
  sync_block();
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int column = lane >> 2;
  Query query;
  query.low = column >= kDecodeQueries;
  query.values = column % kDecodeQueries < n_queries
                     ? args.q + (int64_t{s.row0} * args.n_heads + kv_head * heads_per_kv +
                                 first_query + column % kDecodeQueries) *
                                    Shape::kDim
                     : nullptr;
  query.scale = 1.44269504f / sqrtf(static_cast<float>(Shape::kDim));

  Softmax<Shape::kTiles> softmax;
  uint8_t* stages = table + kTableBytes + warp * (kStages * stage_bytes + kStageSlack);
  if (first < s.n_blocks) {
    attend_store<Shape>(args, s, kv_head, first, last < s.n_blocks ? last : s.n_blocks, query,
                        table + lane * 4, stages, stage_bytes, softmax);
  }
  constexpr int64_t kRowBytes = Shape::kDim * 2;
  const uint8_t* keys =
      s.dense + dense_offset(s, args.layer, 0, args.n_kv_heads, kv_head, kRowBytes);
  const uint8_t* values =
      s.dense + dense_offset(s, args.layer, 1, args.n_kv_heads, kv_head, kRowBytes);
  for (int32_t tile = first > s.n_blocks ? first : s.n_blocks; tile < last; tile++) {
    const int32_t row = (tile - s.n_blocks) * kBlockTokens + warp * kDecodeTokens;
    if (row > s.dense_tokens) continue;
    attend_dense<Shape>(keys, values, row, s.dense_tokens + 1, query, softmax);
  }
  write_partials<Shape>(args, s.row0, kv_head, first_query, n_queries, split, softmax,
                        reinterpret_cast<float*>(table + kTableBytes));
}

template <typename Shape>
void launch_decode(const AttentionArgs& args, Stream stream) {
  const auto piece_bytes = [](const SlotLayout& slot) {
    return kDecodeTokens * (slot.mask_words * 4 + slot.row_bytes) +
           (has_scales(slot.dtype) ? kDecodeTokens * 2 : 0);
  };
  const int32_t stage_bytes = piece_bytes(args.layout.k) + piece_bytes(args.layout.v);
  const int64_t staging = int64_t{kDecodeWarps} * (kStages * stage_bytes + kStageSlack);
  const int64_t merging = int64_t{kDecodeWarps} * kDecodeQueries * (Shape::kDim + 2) * 4;
  const int64_t heads_per_kv = args.n_heads / args.n_kv_heads;
  const int64_t chunks = (heads_per_kv + kDecodeQueries - 1) / kDecodeQueries;
  launch("decode_attention", decode_attention_kernel<Shape>,
         {args.max_splits, args.n_kv_heads * chunks, args.n_sequences}, kDecodeWarps * kWarpSize,
         kTableBytes + (staging > merging ? staging : merging), stream, args, stage_bytes);
}

// The instances of one kind of values, one per source file; false where there is none.
bool decode_attention_f16(const AttentionArgs& args, Stream stream);
bool decode_attention_bf16(const AttentionArgs& args, Stream stream);
bool decode_attention_int8(const AttentionArgs& args, Stream stream);
bool decode_attention_int4(const AttentionArgs& args, Stream stream);

}  // namespace mustafar::cuda
