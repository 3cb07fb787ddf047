// How a weight matrix of 8- or 4-bit codes lies in memory. Every group of neighbouring inputs of a
// row has a scale and, if the matrix has zero points, one of those:
//
//   W[r][c] = scale[r][c / group] * (code[r][c] - zero[r][c / group])
//
// Codes are unsigned, 0 to 255 or 0 to 15; without zero points zero is 128 or 8 (symmetric). The
// difference is exact in f32, so that a weight is one rounded product. `group` is a multiple of 32,
// and may be as large as a row (one scale per row); the last group of a row may be shorter. This
// holds what GPTQ, AWQ and compressed-tensors folders have: int4 or int8, with or without zero
// points (those of GPTQ reach 16), scales of f16, bf16 or f32.
//
// Sixteen rows are a tile, and four inputs of each a line of 64 bytes: as a vector it is what an
// 8-bit dot product takes with four activations broadcast, and lane r sums row r. A line of 4-bit
// codes holds eight inputs, the first four in the low halves of its bytes.
//
//   codes   8 bits: [tile][inner / 4][16 rows][4 inputs], byte i of a lane is input 4 line + i
//           4 bits: [tile][inner / 8][16 rows][4 bytes], input 8 line + i low, 8 line + 4 + i high
//   scales  [tile][group][16 rows] f16, bf16 or f32
//   zeros   [tile][group][16 rows] uint8, or none
//
// inner is cols rounded up to 32. The inputs that this adds have any code: activations are zero
// there. Rows that fill the last tile have any code and finite scales.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/dtype.h"

namespace mustafar {

inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kLineBytes = 64;
inline constexpr int64_t kInnerStep = 32;  // inputs; also of a group of int8 activations

struct QuantisedShape {
  DType dtype = DType::kInt8;       // of the codes: kInt8 or kInt4
  DType scale_dtype = DType::kF16;  // f16, bf16 or f32
  bool has_zeros = false;
  int32_t group = 32;  // inputs
  int64_t rows = 0;    // outputs
  int64_t cols = 0;    // inputs

  int64_t inner() const { return (cols + kInnerStep - 1) / kInnerStep * kInnerStep; }
  int64_t n_tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  int64_t n_groups() const { return (cols + group - 1) / group; }
  int64_t line_inputs() const { return dtype == DType::kInt4 ? 8 : 4; }
  int64_t tile_code_bytes() const { return inner() / line_inputs() * kLineBytes; }
  int64_t tile_scales() const { return n_groups() * kTileRows; }

  // One allocation holds codes, scales and zeros in this order, each from a multiple of 64 bytes.
  int64_t scales_at() const { return n_tiles() * tile_code_bytes(); }
  int64_t zeros_at() const {
    const int64_t bytes = dtype_bytes(scale_dtype, n_tiles() * tile_scales());
    return scales_at() + (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
  }
  int64_t bytes() const { return zeros_at() + (has_zeros ? n_tiles() * tile_scales() : 0); }
};

// The code of row r and input c of a matrix's codes.
[[maybe_unused]] static inline int32_t code_at(const QuantisedShape& shape, const uint8_t* codes,
                                               int64_t r, int64_t c) {
  const uint8_t* tile = codes + r / kTileRows * shape.tile_code_bytes();
  const int64_t lane = r % kTileRows * 4 + c % 4;
  if (shape.dtype == DType::kInt8) return tile[c / 4 * kLineBytes + lane];
  const uint8_t byte = tile[c / 8 * kLineBytes + lane];
  return c / 4 % 2 == 0 ? byte & 15 : byte >> 4;
}

// Sets it. 4-bit codes share bytes: one thread per tile.
[[maybe_unused]] static inline void set_code(const QuantisedShape& shape, uint8_t* codes, int64_t r,
                                             int64_t c, int32_t code) {
  uint8_t* tile = codes + r / kTileRows * shape.tile_code_bytes();
  const int64_t lane = r % kTileRows * 4 + c % 4;
  if (shape.dtype == DType::kInt8) {
    tile[c / 4 * kLineBytes + lane] = static_cast<uint8_t>(code);
    return;
  }
  uint8_t& byte = tile[c / 8 * kLineBytes + lane];
  byte = static_cast<uint8_t>(c / 4 % 2 == 0 ? (byte & 0xf0) | code : (byte & 0x0f) | code << 4);
}

// Where the scale (and zero) of row r and input c is.
[[maybe_unused]] static inline int64_t scale_at(const QuantisedShape& shape, int64_t r, int64_t c) {
  return r / kTileRows * shape.tile_scales() + c / shape.group * kTileRows + r % kTileRows;
}

// The zero of a matrix without zero points.
[[maybe_unused]] static inline int32_t middle_code(DType dtype) {
  return dtype == DType::kInt4 ? 8 : 128;
}

}  // namespace mustafar
