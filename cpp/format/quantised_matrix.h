// How a weight matrix of 8- or 4-bit codes lies in memory. Every group of neighbouring inputs of a
// row has a scale and, as the matrix's Offset says, a zero point or a minimum:
//
//   W[r][c] = scale[r][c / group] * (code[r][c] - zero[r][c / group])
//   W[r][c] = scale[r][c / group] * code[r][c] + minimum[r][c / group]
//
// Codes are unsigned, 0 to 255 or 0 to 15; symmetric matrices have the zero 128 or 8. A weight is
// rounded once: the difference is exact in f32, and so is the product where there are minimums,
// as scales are f16 or bf16 then.
// `group` is a multiple of 32, and may be as large as a row (one scale per row); the last group of
// a row may be shorter. This holds what GPTQ, AWQ and compressed-tensors folders have: int4 or
// int8, with or without zero points (those of GPTQ reach 16), scales of f16, bf16 or f32; and with
// minimums what rounding on loading makes: no step of the codes is spent on the way from zero to a
// group's range.
//
// Sixteen rows are a tile, and four inputs of each a line of 64 bytes: as a vector it is what an
// 8-bit dot product takes with four activations broadcast, and lane r sums row r. A line of 4-bit
// codes holds eight inputs, the first four in the low halves of its bytes.
//
//   codes   8 bits: [tile][inner / 4][16 rows][4 inputs], byte i of a lane is input 4 line + i
//           4 bits: [tile][inner / 8][16 rows][4 bytes], input 8 line + i low, 8 line + 4 + i high
//   scales  [tile][group][16 rows] f16, bf16 or f32
//   offsets [tile][group][16 rows] zeros: uint8; minimums: f16 or bf16; or none
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

enum class Offset : uint8_t { kNone, kZeros, kMinimums };

struct QuantisedShape {
  DType dtype = DType::kInt8;       // of the codes: kInt8 or kInt4
  DType scale_dtype = DType::kF16;  // f16, bf16 or f32
  Offset offset = Offset::kNone;
  int32_t group = 32;  // inputs
  int64_t rows = 0;    // outputs
  int64_t cols = 0;    // inputs

  int64_t inner() const { return (cols + kInnerStep - 1) / kInnerStep * kInnerStep; }
  int64_t n_tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  int64_t n_groups() const { return (cols + group - 1) / group; }
  int64_t line_inputs() const { return dtype == DType::kInt4 ? 8 : 4; }
  int64_t tile_code_bytes() const { return inner() / line_inputs() * kLineBytes; }
  int64_t tile_scales() const { return n_groups() * kTileRows; }

  int64_t n_scales() const { return n_tiles() * tile_scales(); }
  int64_t offset_bytes() const {
    switch (offset) {
      case Offset::kZeros:
        return n_scales();
      case Offset::kMinimums:
        return dtype_bytes(scale_dtype, n_scales());
      default:
        return 0;
    }
  }

  // One allocation holds codes, scales and offsets in this order, each from a multiple of 64 bytes.
  int64_t scales_at() const { return n_tiles() * tile_code_bytes(); }
  int64_t offsets_at() const {
    const int64_t bytes = dtype_bytes(scale_dtype, n_scales());
    return scales_at() + (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
  }
  int64_t bytes() const { return offsets_at() + offset_bytes(); }
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

// Where the scale (and offset) of row r and input c is.
[[maybe_unused]] static inline int64_t scale_at(const QuantisedShape& shape, int64_t r, int64_t c) {
  return r / kTileRows * shape.tile_scales() + c / shape.group * kTileRows + r % kTileRows;
}

// The zero of a symmetric matrix.
[[maybe_unused]] static inline int32_t middle_code(DType dtype) {
  return dtype == DType::kInt4 ? 8 : 128;
}

}  // namespace mustafar
