// A matrix of random codes, scales and offsets, and what it stands for.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/dtype.h"
#include "format/quantised_matrix.h"

namespace mustafar::testing {

// All bytes of its memory are set, those of rows that fill the last tile too.
struct CodeMatrix {
  QuantisedShape shape;
  std::vector<uint8_t> memory;
  Matrix matrix;
  std::vector<float> weights;  // [rows][cols]

  explicit CodeMatrix(const QuantisedShape& s) : shape(s), memory(s.bytes()) {
    std::mt19937 random(17);
    for (uint8_t& byte : memory) byte = static_cast<uint8_t>(random());
    uint8_t* const scales = memory.data() + shape.scales_at();
    uint8_t* const offsets = memory.data() + shape.offsets_at();
    for (int64_t i = 0; i < shape.n_scales(); i++) {
      if (shape.offset == Offset::kZeros && shape.dtype == DType::kInt4) offsets[i] %= 17;
      const float size = 0.001f + 0.0001f * static_cast<float>(random() % 100);
      store_float(scales, shape.scale_dtype, i, random() % 2 == 0 ? size : -size);
      if (shape.offset == Offset::kMinimums) {
        store_float(offsets, shape.scale_dtype, i,
                    0.01f * static_cast<float>(static_cast<int32_t>(random() % 100) - 50));
      }
    }
    matrix = Matrix::of(shape, memory.data());
    for (int64_t r = 0; r < shape.rows; r++) {
      for (int64_t c = 0; c < shape.cols; c++) {
        const int64_t at = scale_at(shape, r, c);
        const float scale = load_float(scales, shape.scale_dtype, at);
        const int32_t code = code_at(shape, memory.data(), r, c);
        if (shape.offset == Offset::kMinimums) {  // exact in double, then rounded once
          const double minimum = load_float(offsets, shape.scale_dtype, at);
          weights.push_back(static_cast<float>(double{scale} * code + minimum));
        } else {
          const int32_t zero =
              shape.offset == Offset::kZeros ? offsets[at] : middle_code(shape.dtype);
          weights.push_back(scale * static_cast<float>(code - zero));
        }
      }
    }
  }

  std::string name() const {
    return std::string(dtype_name(shape.dtype)) + ":" + std::to_string(shape.group) + " " +
           std::to_string(shape.rows) + "x" + std::to_string(shape.cols) +
           (shape.offset == Offset::kZeros      ? " zeros "
            : shape.offset == Offset::kMinimums ? " minimums "
                                                : " ") +
           dtype_name(shape.scale_dtype);
  }
};

}  // namespace mustafar::testing
