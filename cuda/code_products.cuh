// What the tensor-core products with codes share (gemv_quantised.cu, gemm_quantised.cu): codes to
// the bf16 operands of a product, scales to f32, and which scale is whose.
#pragma once

#include "cuda/device_ops.cuh"
#include "cuda/linear.h"

namespace mustafar::cuda {

constexpr int kTile = static_cast<int>(kTileRows);
constexpr int kPiece = 32;  // columns of two products
static_assert(kPiece == kInnerStep);

// code - zero of 8 codes as four words of two bf16: columns (0, 2), (1, 3), (4, 6), (5, 7).
__device__ __forceinline__ void unpack(uint32_t word, uint32_t zero, uint32_t (&out)[4]) {
  // A code below 128 in the low bits of the bf16 128 is 128 + code.
  constexpr uint32_t k128 = 0x43004300u, kOne = 0x3f803f80u;
  const uint32_t minus = (zero * 0x10001u | k128) ^ 0x80008000u;
  const uint32_t pairs[4] = {word, word >> 8, word >> 4, word >> 12};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out[i] = multiply_add_bf16x2(and_or(pairs[i], 0x000f000fu, k128), kOne, minus);
  }
}
__device__ __forceinline__ void unpack(uint32_t low, uint32_t high, uint32_t zero,
                                       uint32_t (&out)[4]) {
  // A byte in the low bits of the f32 2^23 is 2^23 + byte.
  constexpr uint32_t k2To23 = 0x4b000000u;
  const float minus = -bits_float(k2To23 | zero);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float code[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      code[j] = bits_float(byte_permute(i == 0 ? low : high, k2To23, 0x7440u | j)) + minus;
    }
    out[2 * i] = pack2<DType::kBF16>(code[0], code[2]);
    out[2 * i + 1] = pack2<DType::kBF16>(code[1], code[3]);
  }
}

__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// code - zero of a lane's neighbouring rows 2 pair and 2 pair + 1, as unpack has them. codes: of
// four rows; zeros: a byte for each of those, looked at where the matrix has zeros.
template <int kBits, Offset kOffset>
__device__ __forceinline__ void unpack_pair(const uint4 (&codes)[kBits / 4], uint32_t zeros,
                                            int pair, uint32_t (&rows)[2][4]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int r = 2 * pair + i;
    uint32_t zero = kOffset == Offset::kMinimums ? 0u : 1u << (kBits - 1);
    if constexpr (kOffset == Offset::kZeros) zero = zeros >> (8 * r) & 255u;
    if constexpr (kBits == 4) {
      unpack(word_of(codes[0], r), zero, rows[i]);
    } else {
      unpack(word_of(codes[0], r), word_of(codes[1], r), zero, rows[i]);
    }
  }
}

__device__ __forceinline__ void floats_of(const uint2& words, bool f16, float (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint16_t bits = static_cast<uint16_t>((i < 2 ? words.x : words.y) >> (16 * (i % 2)));
    out[i] = f16 ? f16_float(bits) : bf16_float(bits);
  }
}
__device__ __forceinline__ void floats_of(const uint4& words, bool, float (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = bits_float(word_of(words, i));
}

// Groups of scales of each matrix of a launch: how many a row has, and how many a piece times 2^31,
// rounded up, which is exact while pieces times pieces a group are below 2^31.
struct ScaleGroups {
  uint32_t count[kMaxFused], rate[kMaxFused];
};

inline ScaleGroups scale_groups(const LinearArgs& args) {
  ScaleGroups groups = {};
  for (int i = 0; i < args.n_parts; i++) {
    const uint32_t cols = static_cast<uint32_t>(args.cols), group = args.parts[i].group;
    groups.count[i] = (cols + group - 1) / group;
    groups.rate[i] = groups.count[i] == 1 ? 0 : (0x80000000u - 1) / (group / kPiece) + 1;
  }
  return groups;
}

// The group of scales of a piece.
__device__ __forceinline__ uint32_t scale_group(int32_t piece, uint32_t rate) {
  return multiply_high(2 * static_cast<uint32_t>(piece), rate);
}

}  // namespace mustafar::cuda
