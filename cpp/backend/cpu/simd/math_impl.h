// Loads of every stored type and 2^x over Simd. Included by kernels_*.cc right after one of simd/.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace mustafar {
namespace {

constexpr int64_t kWidth = Simd::kWidth;

// Loads widened to f32; a partial one has zeros in the lanes from n on.
struct LoadF32 {
  using Element = float;
  static constexpr bool kIsBF16 = false;
  static Simd::F load(const float* p) { return Simd::load(p); }
  static Simd::F load_partial(const float* p, int n) { return Simd::load_partial(p, n); }
};
struct LoadF16 {
  using Element = uint16_t;
  static constexpr bool kIsBF16 = false;
  static Simd::F load(const uint16_t* p) { return Simd::load_f16(p); }
  static Simd::F load_partial(const uint16_t* p, int n) {
    uint16_t lanes[Simd::kWidth] = {};
    for (int i = 0; i < n; i++) lanes[i] = p[i];
    return Simd::load_f16(lanes);
  }
};
struct LoadBF16 {
  using Element = uint16_t;
  static constexpr bool kIsBF16 = true;
  static Simd::F load(const uint16_t* p) { return Simd::load_bf16(p); }
  static Simd::F load_partial(const uint16_t* p, int n) {
    uint16_t lanes[Simd::kWidth] = {};
    for (int i = 0; i < n; i++) lanes[i] = p[i];
    return Simd::load_bf16(lanes);
  }
};

// 2^r for r in [-0.5, 0.5]: relative error 8e-8, least squares on Chebyshev nodes.
inline Simd::F exp2_fraction(Simd::F r) {
  Simd::F p = Simd::set1(0.0013266970f);
  p = Simd::fma(p, r, Simd::set1(0.0096754597f));
  p = Simd::fma(p, r, Simd::set1(0.0555074262f));
  p = Simd::fma(p, r, Simd::set1(0.2402212175f));
  p = Simd::fma(p, r, Simd::set1(0.6931469492f));
  return Simd::fma(p, r, Simd::set1(1.0000000710f));
}

// The same to 3e-6, enough for results that are rounded to bf16.
inline Simd::F exp2_fraction_coarse(Simd::F r) {
  Simd::F p = Simd::set1(0.0095605102f);
  p = Simd::fma(p, r, Simd::set1(0.0559170392f));
  p = Simd::fma(p, r, Simd::set1(0.2402498111f));
  p = Simd::fma(p, r, Simd::set1(0.6931219677f));
  return Simd::fma(p, r, Simd::set1(0.9999991909f));
}

}  // namespace
}  // namespace mustafar
