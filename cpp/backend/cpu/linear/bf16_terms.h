// An f32 activation as the sum of three bf16 terms of 8 bits each, so that its products with bf16
// weights are exact in f32 and a weight is used as it lies in memory. Included by the GEMV files
// whose instructions multiply pairs of bf16.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mustafar {
namespace {

constexpr int kTerms = 3;
constexpr int kPairColumns = 32;  // columns of a vector of pairs: one line of weights

inline int64_t column_steps(int64_t cols) { return (cols + kPairColumns - 1) / kPairColumns; }

inline __mmask16 first_mask(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1);
}

// The first n <= 32 activations at x, zeros after them, as pairs of neighbours:
// x = terms[0] + terms[1] + terms[2], largest first.
inline void split_terms(const float* x, int64_t n, __m512i* terms) {
  const __m512i low_half = _mm512_set1_epi32(0xffff);
  const __m512i first = _mm512_castps_si512(_mm512_maskz_loadu_ps(first_mask(n), x));
  const __m512i second = _mm512_castps_si512(_mm512_maskz_loadu_ps(first_mask(n - 16), x + 16));
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  __m512 e = _mm512_castsi512_ps(_mm512_permutex2var_epi32(first, even, second));
  __m512 o = _mm512_castsi512_ps(_mm512_permutex2var_epi32(first, odd, second));
  for (int t = 0; t < kTerms; t++) {
    // The upper halves: x truncated to bf16, whose rest is exact.
    const __m512i e_top = _mm512_andnot_si512(low_half, _mm512_castps_si512(e));
    const __m512i o_top = _mm512_andnot_si512(low_half, _mm512_castps_si512(o));
    terms[t] = _mm512_or_si512(_mm512_srli_epi32(e_top, 16), o_top);
    e = _mm512_sub_ps(e, _mm512_castsi512_ps(e_top));
    o = _mm512_sub_ps(o, _mm512_castsi512_ps(o_top));
  }
}

}  // namespace
}  // namespace mustafar
