// Codes, scales and zeros of a quantised matrix as vectors of rows, over Simd.
#pragma once

#include <cstdint>
#include <cstring>

#include "backend/backend.h"

namespace mustafar {
namespace {

typedef float Floats __attribute__((vector_size(4 * Simd::kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * Simd::kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * Simd::kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(Simd::kWidth)));

inline Words load_words(const uint8_t* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

// kWidth rows of a tile from row `lane` on.
class CodeRows {
 public:
  CodeRows(const Matrix& w, int64_t row) : w_(w), shape_(w.shape()) {
    const int64_t tile = row / kTileRows, lane = row % kTileRows;
    codes_ = static_cast<const uint8_t*>(w.data) + tile * shape_.tile_code_bytes() + lane * 4;
    at_ = tile * shape_.tile_scales() + lane;
  }

  // Inputs c to c + 3, c a multiple of 4: the codes are bits [0, 8), [8, 16) ... of the words.
  Words word(int64_t c) const {
    if (w_.dtype == DType::kInt8) return load_words(codes_ + c / 4 * kLineBytes);
    const Words both = load_words(codes_ + c / 8 * kLineBytes);
    return (c / 4 % 2 == 0 ? both : both >> 4) & 0x0f0f0f0fu;
  }
  static Simd::F code(Words word, int i) {
    return (Simd::F) __builtin_convertvector((Ints)((word >> (8 * i)) & 0xffu), Floats);
  }
  Simd::F scale(int64_t group) const { return floats(w_.scales, group); }
  // The zero of a group or, of a matrix that has those, its minimum.
  Simd::F offset(int64_t group) const {
    switch (w_.offset) {
      case Offset::kMinimums:
        return floats(w_.offsets, group);
      case Offset::kZeros: {
        Bytes bytes;
        std::memcpy(&bytes, static_cast<const uint8_t*>(w_.offsets) + at_ + group * kTileRows,
                    sizeof bytes);
        return (Simd::F) __builtin_convertvector(bytes, Floats);
      }
      default:
        return Simd::set1(static_cast<float>(middle_code(w_.dtype)));
    }
  }
  // A weight from its code and what its group has.
  template <bool kMinimums>
  static Simd::F weight(Simd::F code, Simd::F scale, Simd::F offset) {
    return kMinimums ? Simd::fma(code, scale, offset) : Simd::mul(Simd::sub(code, offset), scale);
  }

 private:
  Simd::F floats(const void* values, int64_t group) const {
    const int64_t i = at_ + group * kTileRows;
    switch (w_.scale_dtype) {
      case DType::kF32:
        return Simd::load(static_cast<const float*>(values) + i);
      case DType::kF16:
        return Simd::load_f16(static_cast<const uint16_t*>(values) + i);
      default:
        return Simd::load_bf16(static_cast<const uint16_t*>(values) + i);
    }
  }

  const Matrix& w_;
  QuantisedShape shape_;
  const uint8_t* codes_;
  int64_t at_;
};

}  // namespace
}  // namespace mustafar
