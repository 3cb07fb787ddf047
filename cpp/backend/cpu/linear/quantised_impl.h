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

template <int kBatch, bool kMinimums>
void gemv_quantised_rows(const QuantisedGemvArgs& args, int64_t row, int32_t batch0) {
  const Matrix& w = *args.weights;
  const CodeRows rows(w, row);
  const float* x = args.x + batch0 * args.x_stride;
  Simd::F sums[kBatch];
  for (Simd::F& sum : sums) sum = Simd::zero();
  for (int64_t c = 0, group = 0; c < w.cols; group++) {
    const int64_t end = c + w.group < w.cols ? c + w.group : w.cols;
    const Simd::F scale = rows.scale(group), offset = rows.offset(group);
    Simd::F parts[kBatch];
    for (Simd::F& part : parts) part = Simd::zero();
    for (; c < end; c += 4) {
      const Words word = rows.word(c);
      const int n = end - c < 4 ? static_cast<int>(end - c) : 4;
      for (int i = 0; i < n; i++) {
        const Simd::F code = CodeRows::code(word, i);
        const Simd::F weight = kMinimums ? Simd::fma(code, scale, offset) : Simd::sub(code, offset);
        for (int b = 0; b < kBatch; b++) {
          parts[b] = Simd::fma(weight, Simd::set1(x[b * args.x_stride + c + i]), parts[b]);
        }
      }
    }
    c = end;
    for (int b = 0; b < kBatch; b++) {
      sums[b] = kMinimums ? Simd::add(sums[b], parts[b]) : Simd::fma(parts[b], scale, sums[b]);
    }
  }
  for (int b = 0; b < kBatch; b++) {
    float lanes[Simd::kWidth];
    Simd::store(lanes, sums[b]);
    for (int i = 0; i < Simd::kWidth; i++) args.store(row + i, batch0 + b, lanes[i]);
  }
}

template <bool kMinimums>
void gemv_quantised_as(const QuantisedGemvArgs& args) {
  for (int64_t row = args.row0; row < args.row1; row += Simd::kWidth) {
    int32_t b = 0;
    for (; b + 4 <= args.batch; b += 4) gemv_quantised_rows<4, kMinimums>(args, row, b);
    for (; b < args.batch; b++) gemv_quantised_rows<1, kMinimums>(args, row, b);
  }
}

void gemv_quantised(const QuantisedGemvArgs& args) {
  args.weights->offset == Offset::kMinimums ? gemv_quantised_as<true>(args)
                                            : gemv_quantised_as<false>(args);
}

void quantise_input(const float* x, int64_t cols, int32_t i, int32_t n, const Int8Input& block) {
  const bool two = block.planes == 2;
  const float top = two ? Int8Input::kLargestOfTwo : 127.0f;
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
    float factor = top / largest;
    if (!is_finite || !(factor <= std::numeric_limits<float>::max())) factor = 0.0f;
    for (int64_t c = 0; c < kInnerStep; c += Simd::kWidth) {
      const Simd::F v = Simd::mul(Simd::load(values + c), Simd::set1(factor));
      Simd::store(values + c, is_finite ? Simd::round(v) : Simd::zero());
    }
    int32_t sum = 0;
    for (int64_t c = 0; c < kInnerStep; c++) {
      const int32_t v = static_cast<int32_t>(values[c]);
      int8_t* codes = block.codes + ((c0 + c) / 4 * n + i) * block.planes * 4 + c % 4;
      const int32_t high = (v + 64) >> 7;
      codes[0] = static_cast<int8_t>(two ? high : v);
      if (two) codes[4] = static_cast<int8_t>(v - high * 128);
      sum += v;
    }
    block.scales[group * n + i] =
        is_finite && factor != 0.0f ? largest / top
                                    : (is_finite ? 0.0f : std::numeric_limits<float>::quiet_NaN());
    block.sums[group * n + i] = sum;
  }
}

}  // namespace
}  // namespace mustafar
