// Element types and the conversions between them. Plain functions, usable from every ISA's files:
// all are internal to the translation unit, so that no copy compiled for a wider ISA is shared.
#pragma once

#include <cstdint>
#include <cstring>

namespace mustafar {

// kCoded is of stored rows alone: a row's bits are dealt to its dims by a table (format/coded.h).
enum class DType : uint8_t { kF32, kF16, kBF16, kInt8, kInt4, kCoded };

// Bytes of n elements; int4 packs two to a byte. Those of coded rows are the layout's to say.
[[maybe_unused]] static inline int64_t dtype_bytes(DType dtype, int64_t n) {
  switch (dtype) {
    case DType::kF32:
      return 4 * n;
    case DType::kF16:
    case DType::kBF16:
      return 2 * n;
    case DType::kInt8:
      return n;
    case DType::kInt4:
      return (n + 1) / 2;
    case DType::kCoded:
      break;
  }
  return 0;
}

[[maybe_unused]] static inline bool is_float(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16;
}

[[maybe_unused]] static inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF16:
      return "f16";
    case DType::kBF16:
      return "bf16";
    case DType::kInt8:
      return "int8";
    case DType::kInt4:
      return "int4";
    case DType::kCoded:
      return "coded";
  }
  return "?";
}

[[maybe_unused]] static inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

[[maybe_unused]] static inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

[[maybe_unused]] static inline float bf16_to_f32(uint16_t h) { return float_of(uint32_t{h} << 16); }

// Round to nearest even; NaN stays NaN (quiet).
[[maybe_unused]] static inline uint16_t f32_to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

[[maybe_unused]] static inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t{static_cast<uint16_t>(h & 0x8000u)} << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  uint32_t mantissa = h & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
  constexpr uint32_t kRebias = 127 - 15;  // from the exponent's bias in f16 to that in f32
  if (exponent != 0) return float_of(sign | ((exponent + kRebias) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal or zero: exact
  return float_of(sign | bits_of(magnitude));
}

// Round to nearest even; overflow becomes infinity, NaN stays NaN (quiet).
[[maybe_unused]] static inline uint16_t f32_to_f16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((a >> 13) & 0x1ffu));
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65520 rounds to Inf
  if (a >= 0x38800000u) {                                              // normal
    const uint32_t rounded = a + 0xfffu + ((a >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
  // Subnormal: adding 0.5 aligns the units of the last place with 2^-24 and rounds to even.
  const float shifted = float_of(a) + 0.5f;
  return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
}

[[maybe_unused]] static inline float load_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<const float*>(data)[i];
    case DType::kF16:
      return f16_to_f32(static_cast<const uint16_t*>(data)[i]);
    default:
      return bf16_to_f32(static_cast<const uint16_t*>(data)[i]);
  }
}

[[maybe_unused]] static inline void store_float(void* data, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::kF32:
      static_cast<float*>(data)[i] = x;
      break;
    case DType::kF16:
      static_cast<uint16_t*>(data)[i] = f32_to_f16(x);
      break;
    default:
      static_cast<uint16_t*>(data)[i] = f32_to_bf16(x);
      break;
  }
}

}  // namespace mustafar
