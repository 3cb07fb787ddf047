// Four floats as a vector of the compiler: the reference, and what runs where nothing better is
// known. Like every simd/*.h it is included by one kernels_*.cc, and all it defines is internal to
// that file.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace mustafar {
namespace {

struct Simd {
  static constexpr int kWidth = 4;
  static constexpr int kGemmRows = 4;   // of a GEMM tile, which is two vectors wide
  static constexpr int kGemvBatch = 2;  // batch rows of a GEMV tile, which is four rows high
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));

  static F zero() { return F{0, 0, 0, 0}; }
  static F set1(float x) { return F{x, x, x, x}; }
  static F load(const float* p) { return F{p[0], p[1], p[2], p[3]}; }
  static F load_partial(const float* p, int n) {
    F v = zero();
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
  }
  static void store(float* p, F v) {
    for (int i = 0; i < kWidth; i++) p[i] = v[i];
  }
  static void store_partial(float* p, F v, int n) {
    for (int i = 0; i < n; i++) p[i] = v[i];
  }
  static F load_f16(const uint16_t* p) {
    return F{f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
  }
  static F load_bf16(const uint16_t* p) {
    return F{bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])};
  }
  static void store_f16(uint16_t* p, F v) {
    for (int i = 0; i < kWidth; i++) p[i] = f32_to_f16(v[i]);
  }
  static void store_bf16(uint16_t* p, F v) {
    for (int i = 0; i < kWidth; i++) p[i] = f32_to_bf16(v[i]);
  }

  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F max(F a, F b) { return a > b ? a : b; }  // b where either is NaN
  static F min(F a, F b) { return a < b ? a : b; }
  // To the nearest integer; |x| < 2^22.
  static F round(F x) {
    const F shift = set1(12582912.0f);  // 1.5 * 2^23: a sum with it has no bits below 1
    return (x + shift) - shift;
  }
  // x * 2^n for integral n in [-126, 127].
  static F scale2(F x, F n) {
    const I exponent = (__builtin_convertvector(n, I) + 127) << 23;
    return x * reinterpret_cast<F>(exponent);
  }
  // Lanes below n from x, the others from y.
  static F first_lanes(F x, int n, F y) {
    for (int i = n < 0 ? 0 : n; i < kWidth; i++) x[i] = y[i];
    return x;
  }
  static float reduce_add(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static float reduce_max(F v) {
    const float a = v[0] > v[2] ? v[0] : v[2];
    const float b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
  }
  static void transpose(F* rows) {
    for (int i = 0; i < kWidth; i++) {
      for (int j = 0; j < i; j++) {
        const float x = rows[i][j];
        rows[i][j] = rows[j][i];
        rows[j][i] = x;
      }
    }
  }
};

}  // namespace
}  // namespace mustafar
