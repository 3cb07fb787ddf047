#include "io/quantised/stored_matrix.h"

#include <limits>

namespace mustafar {

std::string StoredMatrix::description() const {
  std::string text = is_float ? "fp8" : "int" + std::to_string(bits);
  if (scales.block_rows > 1) {
    text += ", blocks of " + std::to_string(scales.block_rows) + " x " + std::to_string(group);
  } else if (group > 0) {
    text += ", groups of " + std::to_string(group);
  } else {
    text += scales.row_stride > 0 ? ", a scale per row" : ", one scale";
  }
  if (has_zeros) text += ", zero points";
  if (!input_groups.empty()) text += ", inputs in the order of g_idx";
  return text;
}

float e4m3_to_f32(uint8_t code) {
  const uint32_t sign = uint32_t{code & 0x80u} << 24;
  const uint32_t exponent = (code >> 3) & 15u, mantissa = code & 7u;
  if ((code & 0x7fu) == 0x7fu) return std::numeric_limits<float>::quiet_NaN();
  if (exponent == 0) {  // subnormal or zero
    return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-9f));
  }
  constexpr uint32_t kRebias = 127 - 7;
  return float_of(sign | (exponent + kRebias) << 23 | mantissa << 20);
}

}  // namespace mustafar
