// A weight matrix as folders of quantised models hold it: codes of 8 or 4 bits, with a scale and a
// zero for every group of neighbouring inputs of a row:
//
//   W[r][c] = scale[r][c / group] * (code[r][c] - zero[r][c / group])
//
// Codes and zeros are unsigned, 0 to 255 or 0 to 15. Symmetric matrices have the zero 128 or 8.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace mustafar {

// What the matrices of a folder are to be.
struct GroupFormat {
  int32_t bits = 4;    // of a code: 4 or 8
  int32_t group = 32;  // inputs that share a scale
  bool symmetric = false;
  DType scale_dtype = DType::kBF16;  // f16 or bf16

  int32_t top() const { return (1 << bits) - 1; }  // the largest code
  int32_t middle() const { return 1 << (bits - 1); }
};

struct GroupCodes {
  GroupFormat format;
  int64_t rows = 0;              // outputs
  int64_t cols = 0;              // inputs, a multiple of format.group
  std::vector<uint8_t> codes;    // [rows][cols]
  std::vector<uint16_t> scales;  // [rows][cols / group] of format.scale_dtype
  std::vector<uint8_t> zeros;    // [rows][cols / group]

  GroupCodes(const GroupFormat& f, int64_t n_rows, int64_t n_cols)
      : format(f),
        rows(n_rows),
        cols(n_cols),
        codes(n_rows * n_cols),
        scales(n_rows * (n_cols / f.group)),
        zeros(n_rows * (n_cols / f.group)) {}

  int64_t n_groups() const { return cols / format.group; }  // of a row
  // Exact in f32: a scale has 11 bits at most, the difference 9.
  float weight(int64_t r, int64_t c) const {
    const int64_t at = r * n_groups() + c / format.group;
    return load_float(scales.data(), format.scale_dtype, at) *
           static_cast<float>(int32_t{codes[r * cols + c]} - int32_t{zeros[at]});
  }
};

}  // namespace mustafar
