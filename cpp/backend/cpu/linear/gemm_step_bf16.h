// The Step of GEMM and prefill attention with AVX512_BF16's dot product of bf16 pairs. It takes
// subnormal inputs as zero and rounds its two products' sum once. Included after gemm_impl.h.
#pragma once

#include "backend/cpu/linear/gemm_impl.h"

namespace mustafar {
namespace {

// A word is two neighbouring bf16, the first in the low half.
struct StepBF16 : StepInRegisters {
  static constexpr int kUnit = 2;
  static Simd::F multiply_add(Simd::F input, Simd::F weight, Simd::F sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(input),
                            reinterpret_cast<__m512bh>(weight));
  }
  static Simd::F exp2_fraction(Simd::F r) { return exp2_fraction_coarse(r); }
  static Simd::F words(const Simd::F* x) {
    return reinterpret_cast<Simd::F>(_mm512_cvtne2ps_pbh(x[1], x[0]));
  }
  static Simd::F words_across(const Simd::F* x) {
    alignas(64) static constexpr uint16_t kPairs[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_castsi512_ps(
        _mm512_permutexvar_epi16(_mm512_load_si512(kPairs), _mm512_castps_si512(words(x))));
  }
  static __mmask32 first_halves(int n) {
    return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1;
  }

  template <class Load>
  static Simd::F load(const typename Load::Element* p, int n) {
    if constexpr (Load::kIsBF16) {
      return reinterpret_cast<Simd::F>(_mm512_maskz_loadu_epi16(first_halves(n), p));
    } else {
      const Simd::F x[2] = {StepF32::load<Load>(p, n),
                            n > 16 ? StepF32::load<Load>(p + 16, n - 16) : Simd::zero()};
      return words(x);
    }
  }

  // Element j of p in the low half, of the row after it in the high half.
  template <class Load>
  static Simd::F load_across(const typename Load::Element* p, const typename Load::Element* next,
                             int n) {
    const __m512i low = bf16_lanes<Load>(p, n);
    const __m512i high = next == nullptr ? _mm512_setzero_si512() : bf16_lanes<Load>(next, n);
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

 private:
  // Sixteen bf16, each in the low half of a word.
  template <class Load>
  static __m512i bf16_lanes(const typename Load::Element* p, int n) {
    if constexpr (Load::kIsBF16) {
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(Simd::first_mask(n), p));
    } else {
      const __m256bh h = _mm512_cvtneps_pbh(StepF32::load<Load>(p, n));
      return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h));
    }
  }
};

}  // namespace
}  // namespace mustafar
