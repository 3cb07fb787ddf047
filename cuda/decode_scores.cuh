// The query side of the decode kernel: queries as B fragments, and the scores S^T = K Q^T of 16
// tokens. decode_attention.cuh says which lane owns what.
#pragma once

#include "cuda/device_ops.cuh"
#include "cuda/matrix_ops.cuh"

namespace mustafar::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kSetQueries = 4;  // query heads in the columns of one product

// The block's queries in shared memory, split into two terms each: per set the eight columns of its
// B operand (first terms of 4 queries, second terms), rows of values of 2 bytes or 1, then the
// scales of all queries. The 16 bytes between rows keep eight of them, and so ldmatrix, free of
// bank conflicts. kBits: 16, or 8 for integers.
template <int kDim, int kBits>
constexpr int kQueryRowBytes = kDim * kBits / 8 + 16;
template <int kDim, int kSets>
constexpr int kQueryBytes = kSets * (8 * kQueryRowBytes<kDim, 16> + 4 * kSetQueries);

// A whole number as 128 * first + second, both signed bytes.
constexpr float kTopWhole = 127 * 128;
struct TwoTerms {
  uint8_t first, second;
};

// x: in [-kTopWhole, kTopWhole] once it is rounded.
__device__ __forceinline__ TwoTerms two_terms(float x) {
  // The sum's lowest bits are the whole number.
  const int whole = static_cast<int>(float_bits(x + 0x1.8p23f)) - 0x4b400000;
  const int high = (whole + 64) >> 7;
  return {static_cast<uint8_t>(high), static_cast<uint8_t>(whole - high * 128)};
}

// from: [n_queries][kDim], f32. The queries are multiplied by the softmax's scale, in base 2. An
// integer query is its own scale times whole numbers (TwoTerms). By the whole block, one warp a
// query, so that its threads share the work; a barrier must follow.
template <DType kType, int kBits, int kDim, int kSets>
__device__ __forceinline__ void split_queries(const float* from, int n_queries, uint8_t* to) {
  constexpr int kLaneDims = kDim / kWarpSize, kStride = kQueryRowBytes<kDim, kBits>;
  static_assert(kLaneDims == 2 || kLaneDims == 4);
  const float softmax_scale = kLog2E / sqrtf(static_cast<float>(kDim));
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = lane_id();
#pragma unroll
  for (int query = warp; query < kSets * kSetQueries; query += kDecodeWarps) {
    float x[kLaneDims];
#pragma unroll
    for (int i = 0; i < kLaneDims; i += 2) {
      const float2 two =
          query < n_queries
              ? *reinterpret_cast<const float2*>(from + query * kDim + lane * kLaneDims + i)
              : float2{0.0f, 0.0f};
      x[i] = two.x * softmax_scale;
      x[i + 1] = two.y * softmax_scale;
    }
    uint8_t* const first = to + (query / kSetQueries * 8 + query % kSetQueries) * kStride +
                           lane * kLaneDims * kBits / 8;
    uint8_t* const second = first + kSetQueries * kStride;
    if constexpr (kBits == 16) {
#pragma unroll
      for (int i = 0; i < kLaneDims; i += 2) {
        const uint32_t word = pack2<kType>(x[i], x[i + 1]);
        const float rest[2] = {x[i] - half_float<kType>(static_cast<uint16_t>(word)),
                               x[i + 1] - half_float<kType>(static_cast<uint16_t>(word >> 16))};
        reinterpret_cast<uint32_t*>(first)[i / 2] = word;
        reinterpret_cast<uint32_t*>(second)[i / 2] = pack2<kType>(rest[0], rest[1]);
      }
    } else {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kLaneDims; i++) largest = fmaxf(largest, fabsf(x[i]));
      largest = warp_max(largest);
      const float inverse = largest > 0.0f ? kTopWhole / largest : 0.0f;
#pragma unroll
      for (int i = 0; i < kLaneDims; i++) {
        const TwoTerms terms = two_terms(x[i] * inverse);
        first[i] = terms.first;
        second[i] = terms.second;
      }
      if (lane == 0) {
        reinterpret_cast<float*>(to + kSets * 8 * kStride)[query] = largest / kTopWhole;
      }
    }
  }
}

// A block's queries: [n][Shape::kDim] f32, and where their terms lie in shared memory.
template <typename Shape>
struct BlockQueries {
  const float* from;
  int n;
  uint8_t* shared;

  template <int kBits>
  __device__ __forceinline__ void split() const {
    split_queries<Shape::kTail, kBits, Shape::kDim, Shape::kSets>(from, n, shared);
  }
};

// B fragments of S^T = K Q^T from split queries, where lane c owns kDim / 4 neighbouring dims of
// a row: step i multiplies the next two words of them.
template <int kBits, int kDim, int kSteps>
__device__ __forceinline__ void load_query(const uint8_t* queries, int set,
                                           uint32_t (&b)[kSteps][2]) {
  constexpr int kRunBytes = kDim / 4 * kBits / 8;
  static_assert(kSteps * 8 == kRunBytes);
  const uint8_t* const run = queries + (set * 8 + (lane_id() >> 2)) * kQueryRowBytes<kDim, kBits> +
                             (lane_id() & 3) * kRunBytes;
#pragma unroll
  for (int i = 0; i < kSteps; i += 2) {
    const uint4 four = *reinterpret_cast<const uint4*>(run + i * 8);
    b[i][0] = four.x;
    b[i][1] = four.y;
    b[i + 1][0] = four.z;
    b[i + 1][1] = four.w;
  }
}

// Scales of queries 2c % 4 and the next of a set, of integer queries.
template <int kDim, int kSets>
__device__ __forceinline__ void load_query_scales(const uint8_t* queries, int set, float unit,
                                                  float (&scales)[2]) {
  const float* const all =
      reinterpret_cast<const float*>(queries + kSets * 8 * kQueryRowBytes<kDim, 8>);
#pragma unroll
  for (int n = 0; n < 2; n++) {
    scales[n] = all[set * kSetQueries + 2 * (lane_id() & 3) % 4 + n] * unit;
  }
}

// Token of the 16 in fragment row g (row g + 8: eight later).
__device__ __forceinline__ int row_token(int g) { return (g >> 1) + 4 * (g & 1); }

// Adds the products of a query's two terms, which lie two lanes apart.
__device__ __forceinline__ void add_terms(float (&s)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) s[i] += shuffle_xor(s[i], 2);
}

// The same of int8 queries, as whole numbers in units of both scales.
__device__ __forceinline__ void add_terms(const int32_t (&acc)[4], float (&s)[4]) {
  const int weight = lane_id() & 2 ? 1 : 128;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int32_t term = acc[i] * weight;
    s[i] = static_cast<float>(term + shuffle_xor(term, 2));
  }
}

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
  add_terms(s);
}

// The same for int8 codes.
template <int kDims>
__device__ __forceinline__ void scores_int8(const uint32_t (&rows)[2][kDims / 4],
                                            const uint32_t (&b)[kDims / 8][2], float (&s)[4]) {
  int32_t acc[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kDims / 8; i++) {
    const uint32_t a[4] = {rows[0][2 * i], rows[1][2 * i], rows[0][2 * i + 1], rows[1][2 * i + 1]};
    mma_16x8x32_s8(acc, a, b[i]);
  }
  add_terms(acc, s);
}

// Scores of codes in their scales: k_scale and v_scale of the lane's two tokens, q_scale of its two
// queries. log_scale: of v_scale, in base 2.
template <int kSets>
__device__ __forceinline__ void scale_scores(const float (&k_scale)[2], const float (&v_scale)[2],
                                             const float (&q_scale)[kSets][2],
                                             float (&scores)[kSets][4], float (&log_scale)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int set = 0; set < kSets; set++) {
      scores[set][2 * r] *= k_scale[r] * q_scale[set][0];
      scores[set][2 * r + 1] *= k_scale[r] * q_scale[set][1];
    }
    // A row of zeros has scale 0: any small one keeps the logarithm finite.
    log_scale[r] = log2_approx(fmaxf(v_scale[r], 0x1p-60f));
  }
}

}  // namespace mustafar::cuda
