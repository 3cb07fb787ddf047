// Products of a quantised matrix with a few rows of f32 activations, and the rounding of those to
// int8, over Simd. Lanes are rows of a tile, so that a sum has the order of the inputs whatever the
// batch. Included by kernels_*.cc after simd/math_impl.h.
#pragma once

#include <cstdint>
#include <limits>

#include "backend/cpu/kernels.h"
#include "backend/cpu/linear/quantised_codes_impl.h"

namespace mustafar {
namespace {

template <int kBatch>
void gemv_quantised_rows(const QuantisedGemvArgs& args, int64_t row, int32_t batch0) {
  const Matrix& w = *args.weights;
  const CodeRows rows(w, row);
  const float* x = args.x + batch0 * args.x_stride;
  Simd::F sums[kBatch];
  for (Simd::F& sum : sums) sum = Simd::zero();
  for (int64_t c = 0, group = 0; c < w.cols; group++) {
    const int64_t end = c + w.group < w.cols ? c + w.group : w.cols;
    const Simd::F zero = rows.zero(group);
    Simd::F parts[kBatch];
    for (Simd::F& part : parts) part = Simd::zero();
    for (; c < end; c += 4) {
      const Words word = rows.word(c);
      const int n = end - c < 4 ? static_cast<int>(end - c) : 4;
      for (int i = 0; i < n; i++) {
        const Simd::F weight = Simd::sub(CodeRows::code(word, i), zero);
        for (int b = 0; b < kBatch; b++) {
          parts[b] = Simd::fma(weight, Simd::set1(x[b * args.x_stride + c + i]), parts[b]);
        }
      }
    }
    c = end;
    const Simd::F scale = rows.scale(group);
    for (int b = 0; b < kBatch; b++) sums[b] = Simd::fma(parts[b], scale, sums[b]);
  }
  for (int b = 0; b < kBatch; b++) {
    float lanes[Simd::kWidth];
    Simd::store(lanes, sums[b]);
    for (int i = 0; i < Simd::kWidth; i++) args.store(row + i, batch0 + b, lanes[i]);
  }
}

void gemv_quantised(const QuantisedGemvArgs& args) {
  for (int64_t row = args.row0; row < args.row1; row += Simd::kWidth) {
    int32_t b = 0;
    for (; b + 4 <= args.batch; b += 4) gemv_quantised_rows<4>(args, row, b);
    for (; b < args.batch; b++) gemv_quantised_rows<1>(args, row, b);
  }
}

void quantise_input(const float* x, int64_t cols, int32_t i, int32_t n, const Int8Input& block) {
  int64_t group = 0;
  for (int64_t c0 = 0; c0 < cols; c0 += kInnerStep, group++) {
    float values[kInnerStep];
    const int64_t left = cols - c0 < kInnerStep ? cols - c0 : kInnerStep;
    for (int64_t c = 0; c < kInnerStep; c++) values[c] = c < left ? x[c0 + c] : 0.0f;
    Simd::F most = Simd::zero(), finite = Simd::zero();
    for (int64_t c = 0; c < kInnerStep; c += Simd::kWidth) {
      const Simd::F v = Simd::load(values + c);
      most = Simd::max(Simd::max(v, Simd::sub(Simd::zero(), v)), most);
      finite = Simd::fma(v, Simd::zero(), finite);  // NaN where v is not finite
    }
    const float largest = Simd::reduce_max(most);
    const bool is_finite = Simd::reduce_add(finite) == 0.0f;
    float factor = 127.0f / largest;
    if (!is_finite || !(factor <= std::numeric_limits<float>::max())) factor = 0.0f;
    for (int64_t c = 0; c < kInnerStep; c += Simd::kWidth) {
      const Simd::F v = Simd::mul(Simd::load(values + c), Simd::set1(factor));
      Simd::store(values + c, is_finite ? Simd::round(v) : Simd::zero());
    }
    int32_t sum = 0;
    for (int64_t c = 0; c < kInnerStep; c++) {
      const int32_t code = static_cast<int32_t>(values[c]);
      block.codes[((c0 + c) / 4 * n + i) * 4 + c % 4] = static_cast<int8_t>(code);
      sum += code;
    }
    block.scales[group * n + i] =
        is_finite && factor != 0.0f ? largest / 127.0f
                                    : (is_finite ? 0.0f : std::numeric_limits<float>::quiet_NaN());
    block.sums[group * n + i] = sum;
  }
}

}  // namespace
}  // namespace mustafar
