// Element-wise kernels and norms over Simd. Included by kernels_*.cc after simd/math_impl.h.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace mustafar {
namespace {

// e^x to about 2e-7; x below -87.3 or above 88.3 is taken as that limit. NaN stays NaN.
inline Simd::F exp(Simd::F x) {
  x = Simd::max(Simd::set1(-87.3f), Simd::min(Simd::set1(88.3f), x));
  const Simd::F n = Simd::round(Simd::mul(x, Simd::set1(1.44269504f)));
  Simd::F r = Simd::fma(n, Simd::set1(-0.693359375f), x);
  r = Simd::fma(n, Simd::set1(2.12194440e-4f), r);
  return Simd::scale2(exp2_fraction(Simd::mul(r, Simd::set1(1.44269504f))), n);
}

inline Simd::F silu(Simd::F x) {
  return Simd::div(x, Simd::add(Simd::set1(1.0f), exp(Simd::sub(Simd::zero(), x))));
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  Simd::F a = Simd::zero(), b = Simd::zero();
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const Simd::F u = Simd::load(x + i), v = Simd::load(x + i + kWidth);
    a = Simd::fma(u, u, a);
    b = Simd::fma(v, v, b);
  }
  for (; i < n; i += kWidth) {
    const int count = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    const Simd::F u = Simd::load_partial(x + i, count);
    a = Simd::fma(u, u, a);
  }
  const float mean = Simd::reduce_add(Simd::add(a, b)) / static_cast<float>(n);
  const float scale = 1.0f / __builtin_sqrtf(mean + eps);
  const Simd::F s = Simd::set1(scale);
  for (i = 0; i + kWidth <= n; i += kWidth) {
    Simd::store(out + i, Simd::mul(Simd::mul(Simd::load(x + i), s), Simd::load(weight + i)));
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    const Simd::F y = Simd::mul(Simd::load_partial(x + i, rest), s);
    Simd::store_partial(out + i, Simd::mul(y, Simd::load_partial(weight + i, rest)), rest);
  }
}

void silu_mul(const float* gate, const float* up, const float* gate_bias, const float* up_bias,
              int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int count = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    Simd::F g = Simd::load_partial(gate + i, count), u = Simd::load_partial(up + i, count);
    if (gate_bias != nullptr) g = Simd::add(g, Simd::load_partial(gate_bias + i, count));
    if (up_bias != nullptr) u = Simd::add(u, Simd::load_partial(up_bias + i, count));
    Simd::store_partial(out + i, Simd::mul(silu(g), u), count);
  }
}

void store(const float* x, const float* bias, int64_t n, bool add, float* out) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int count = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    Simd::F v = Simd::load_partial(x + i, count);
    if (bias != nullptr) v = Simd::add(v, Simd::load_partial(bias + i, count));
    if (add) v = Simd::add(Simd::load_partial(out + i, count), v);
    Simd::store_partial(out + i, v, count);
  }
}

void scale(const float* x, float factor, int64_t n, float* out) {
  const Simd::F f = Simd::set1(factor);
  for (int64_t i = 0; i < n; i += kWidth) {
    const int count = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    Simd::store_partial(out + i, Simd::mul(Simd::load_partial(x + i, count), f), count);
  }
}

void rope(float* x, const float* cos, const float* sin, int32_t n) {
  const int32_t half = n / 2;
  float* y = x + half;
  for (int32_t i = 0; i < half; i += Simd::kWidth) {
    const int count = half - i < Simd::kWidth ? half - i : Simd::kWidth;
    const Simd::F a = Simd::load_partial(x + i, count), b = Simd::load_partial(y + i, count);
    const Simd::F c = Simd::load_partial(cos + i, count), s = Simd::load_partial(sin + i, count);
    Simd::store_partial(x + i, Simd::sub(Simd::mul(a, c), Simd::mul(b, s)), count);
    Simd::store_partial(y + i, Simd::add(Simd::mul(b, c), Simd::mul(a, s)), count);
  }
}

void multiply_row(const float* x, const float* m, int32_t n, float* out) {
  int32_t j = 0;
  for (; j + 4 * Simd::kWidth <= n; j += 4 * Simd::kWidth) {
    Simd::F sum[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
    for (int32_t i = 0; i < n; i++) {
      const Simd::F factor = Simd::set1(x[i]);
      const float* row = m + int64_t{i} * n + j;
      for (int k = 0; k < 4; k++) {
        sum[k] = Simd::fma(factor, Simd::load(row + k * Simd::kWidth), sum[k]);
      }
    }
    for (int k = 0; k < 4; k++) Simd::store(out + j + k * Simd::kWidth, sum[k]);
  }
  for (; j < n; j += Simd::kWidth) {
    const int count = n - j < Simd::kWidth ? n - j : Simd::kWidth;
    Simd::F sum = Simd::zero();
    for (int32_t i = 0; i < n; i++) {
      sum = Simd::fma(Simd::set1(x[i]), Simd::load_partial(m + int64_t{i} * n + j, count), sum);
    }
    Simd::store_partial(out + j, sum, count);
  }
}

template <class Load>
void convert_to_f32(const typename Load::Element* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Simd::store(out + i, Load::load(x + i));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    Simd::store_partial(out + i, Load::load_partial(x + i, rest), rest);
  }
}

void to_f32(const void* x, DType dtype, int64_t n, float* out) {
  switch (dtype) {
    case DType::kF32:
      return convert_to_f32<LoadF32>(static_cast<const float*>(x), n, out);
    case DType::kF16:
      return convert_to_f32<LoadF16>(static_cast<const uint16_t*>(x), n, out);
    default:
      return convert_to_f32<LoadBF16>(static_cast<const uint16_t*>(x), n, out);
  }
}

void from_f32(const float* x, int64_t n, DType dtype, void* out) {
  int64_t i = 0;
  if (dtype == DType::kF32) {
    float* y = static_cast<float*>(out);
    for (; i + kWidth <= n; i += kWidth) Simd::store(y + i, Simd::load(x + i));
  } else {
    uint16_t* y = static_cast<uint16_t*>(out);
    for (; i + kWidth <= n; i += kWidth) {
      const Simd::F v = Simd::load(x + i);
      dtype == DType::kF16 ? Simd::store_f16(y + i, v) : Simd::store_bf16(y + i, v);
    }
  }
  for (; i < n; i++) store_float(out, dtype, i, x[i]);
}

}  // namespace
}  // namespace mustafar
