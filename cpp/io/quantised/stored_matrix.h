// A weight matrix as a quantised checkpoint stores it, whatever the layout:
//
//   W[r][c] = scale[r][g] * (code[r][c] - zero[r][g])     g: the group of input c
//
// Codes are unsigned (0 to 15 or 0 to 255), or fp8 e4m3 without zero points. Nothing is copied: a
// matrix points into the mapped files, whose bytes may lie unaligned, and unpacks rows on demand.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "io/mapped_file.h"

namespace mustafar {

// A tensor of such a matrix.
struct StoredPart {
  std::string name;
  std::string_view dtype;      // as the safetensors format spells it
  std::vector<int64_t> shape;  // outermost first
  const uint8_t* data = nullptr;
  int64_t bytes = 0;
  const MappedFile* file = nullptr;

  // Makes sure that the bytes can be read; throws ModelError where the file lost them.
  void prepare() const {
    const size_t begin = static_cast<size_t>(data - file->data());
    file->prefault(begin, begin + static_cast<size_t>(bytes));
  }
  uint32_t word(int64_t i) const {
    uint32_t word;
    std::memcpy(&word, data + 4 * i, sizeof word);
    return word;
  }
};

// Scales of f16, bf16 or f32: that of row r and group g is number
// r / block_rows * row_stride + g * group_stride.
struct StoredScales {
  const uint8_t* data = nullptr;
  DType dtype = DType::kF16;
  int64_t block_rows = 1;
  int64_t row_stride = 0;
  int64_t group_stride = 0;

  float at(int64_t r, int64_t g) const {
    uint32_t aligned = 0;
    const int64_t bytes = dtype_bytes(dtype, 1);
    std::memcpy(&aligned, data + (r / block_rows * row_stride + g * group_stride) * bytes,
                static_cast<size_t>(bytes));
    return load_float(&aligned, dtype, 0);
  }
};

class StoredMatrix {
 public:
  virtual ~StoredMatrix() = default;

  // Codes of rows [row, row + n) to out, byte c of a row at out + (r - row) * stride + c.
  virtual void read_codes(int64_t row, int64_t n, int64_t stride, uint8_t* out) const = 0;
  // The zero point of a group, where there are zero points.
  virtual int32_t zero(int64_t row, int64_t group) const = 0;
  float scale(int64_t row, int64_t group) const { return scales.at(row, group); }

  int64_t n_groups() const { return group > 0 ? (cols + group - 1) / group : 1; }
  int32_t middle() const { return 1 << (bits - 1); }  // the zero point of symmetric codes
  // As in "int4, groups of 128, zero points".
  std::string description() const;

  int64_t rows = 0;       // outputs
  int64_t cols = 0;       // inputs
  int32_t bits = 0;       // of a code: 4 or 8
  bool is_float = false;  // codes are fp8 e4m3
  int64_t group = 0;      // neighbouring inputs that share a scale; 0: a whole row
  bool has_zeros = false;
  std::vector<int32_t> input_groups;  // [cols] where groups are not of neighbours, else empty
  StoredScales scales;
  // What the matrix becomes where its codes can't be used: the scales' type or, of fp8, the
  // model's.
  DType expanded = DType::kBF16;
  std::vector<StoredPart> parts;
};

// The first n of the codes in a word, from the lowest bits up. n: at most 32 / bits.
inline void unpack_word(uint32_t word, int32_t bits, int64_t n, uint8_t* out) {
  if (bits == 4 && n == 8) {
    const uint64_t both = (word & 0xffffu) | uint64_t{word >> 16} << 32;
    uint64_t bytes = (both | both << 8) & 0x00ff00ff00ff00ffu;
    bytes = (bytes | bytes << 4) & 0x0f0f0f0f0f0f0f0fu;
    std::memcpy(out, &bytes, sizeof bytes);
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    out[i] = static_cast<uint8_t>(word >> (i * bits) & ((1u << bits) - 1));
  }
}

// The value of an fp8 e4m3 code: 4 bits of exponent with bias 7, no infinities; 0x7f and 0xff are
// NaN.
float e4m3_to_f32(uint8_t code);

}  // namespace mustafar
