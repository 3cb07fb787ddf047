// The query side of the decode kernel: queries as B fragments, and the scores S^T = K Q^T of 16
// tokens. decode_attention.cuh says which lane owns what.
#pragma once

#include "cuda/device_ops.cuh"

namespace mustafar::cuda {

constexpr int kSetQueries = 4;  // query heads in the columns of one product

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

}  // namespace mustafar::cuda
