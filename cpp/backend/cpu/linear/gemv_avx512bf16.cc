// GEMV of bf16 weights with AVX512_BF16's dot product of pairs. An f32 activation is the sum of
// three bf16 terms of 8 bits each, so that the products are exact; a weight is used as it lies in
// memory, without being widened, which leaves the loop bound by memory alone.
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>

#include "backend/cpu/kernels.h"

namespace mustafar {
namespace {

constexpr int kStep = 32;  // columns at a time: one line of weights

// How far ahead of the loads weights are asked for, per row, into the L2 cache.
constexpr int64_t kPrefetchColumns = 1024;

// 32 activations as pairs of bf16, x = high + middle + low.
struct Terms {
  __m512bh high, middle, low;
};

inline __mmask16 first_mask(int n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1);
}

inline Terms split(const float* x, int n) {
  const __m512i low_half = _mm512_set1_epi32(0xffff);
  const __m512i first = _mm512_castps_si512(_mm512_maskz_loadu_ps(first_mask(n), x));
  const __m512i second = _mm512_castps_si512(_mm512_maskz_loadu_ps(first_mask(n - 16), x + 16));
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  __m512 e = _mm512_castsi512_ps(_mm512_permutex2var_epi32(first, even, second));
  __m512 o = _mm512_castsi512_ps(_mm512_permutex2var_epi32(first, odd, second));
  __m512bh terms[3];
  for (int t = 0; t < 3; t++) {
    // The upper halves: x truncated to bf16, whose rest is exact.
    const __m512i e_top = _mm512_andnot_si512(low_half, _mm512_castps_si512(e));
    const __m512i o_top = _mm512_andnot_si512(low_half, _mm512_castps_si512(o));
    terms[t] = reinterpret_cast<__m512bh>(_mm512_or_si512(_mm512_srli_epi32(e_top, 16), o_top));
    e = _mm512_sub_ps(e, _mm512_castsi512_ps(e_top));
    o = _mm512_sub_ps(o, _mm512_castsi512_ps(o_top));
  }
  return {terms[0], terms[1], terms[2]};
}

// Where a step's terms come from: split as they are needed, or, where many batch rows would repeat
// that for every block of weight rows, split once for the whole call.
struct SplitNow {
  const float* x;
  int64_t stride;
  Terms terms(int b, int64_t c, int n) const { return split(x + b * stride + c, n); }
};

struct SplitBefore {
  const Terms* x;  // [batch][steps]
  int64_t steps;
  Terms terms(int b, int64_t c, int) const { return x[b * steps + c / kStep]; }
};

// A thread's room for SplitBefore.
struct TermsBuffer {
  Terms* data = nullptr;
  int64_t capacity = 0;
  ~TermsBuffer() { std::free(data); }

  Terms* ensure(int64_t n) {  // null where there is no memory
    if (n > capacity) {
      std::free(data);
      data = static_cast<Terms*>(std::aligned_alloc(alignof(Terms), n * sizeof(Terms)));
      capacity = data != nullptr ? n : 0;
    }
    return data;
  }
};

// sums[b * kRows + r] of the step at column c.
template <int kRows, int kBatch, class Input>
inline void step(const uint16_t* w, const Input& x, int64_t w_stride, int64_t c, int n,
                 __m512* sums) {
  Terms terms[kBatch];
#pragma GCC unroll 4
  for (int b = 0; b < kBatch; b++) terms[b] = x.terms(b, c, n);
  const __mmask32 mask = n >= kStep ? 0xffffffffu : (1u << n) - 1;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
    const __m512bh weights =
        n >= kStep ? reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + r * w_stride))
                   : reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, w + r * w_stride));
#pragma GCC unroll 4
    for (int b = 0; b < kBatch; b++) {
      __m512& sum = sums[b * kRows + r];
      sum = _mm512_dpbf16_ps(sum, terms[b].high, weights);
      sum = _mm512_dpbf16_ps(sum, terms[b].middle, weights);
      sum = _mm512_dpbf16_ps(sum, terms[b].low, weights);
    }
  }
}

template <int kRows, int kBatch, class Input>
void tile(const GemvArgs& args, const Input& x, int64_t row, int32_t batch0) {
  const auto* w = static_cast<const uint16_t*>(args.weights) + row * args.cols;
  __m512 sums[kRows * kBatch];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kBatch; i++) sums[i] = _mm512_setzero_ps();
  const int64_t whole = args.cols / kStep * kStep;
  // Towards the end of the rows the next block's beginnings are fetched.
  const int64_t turn = args.cols - kPrefetchColumns;
  for (int64_t c = 0; c < whole; c += kStep) {
    const int64_t ahead = kPrefetchColumns + (c < turn ? 0 : (kRows - 1) * args.cols);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      _mm_prefetch(reinterpret_cast<const char*>(w + r * args.cols + c + ahead), _MM_HINT_T1);
    }
    step<kRows, kBatch>(w + c, x, args.cols, c, kStep, sums);
  }
  if (whole < args.cols) {
    step<kRows, kBatch>(w + whole, x, args.cols, whole, static_cast<int>(args.cols - whole), sums);
  }
#pragma GCC unroll 4
  for (int b = 0; b < kBatch; b++) {
    float* y = args.y + (batch0 + b) * args.y_stride + (row - args.row0);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      float sum = _mm512_reduce_add_ps(sums[b * kRows + r]);
      if (args.bias != nullptr) sum += args.bias[row + r];
      y[r] = args.add ? y[r] + sum : sum;
    }
  }
}

// All batch rows of one block of weight rows, which stays in the cache meanwhile.
template <int kRows>
void block(const GemvArgs& args, const Terms* terms, int64_t row) {
  const int64_t steps = (args.cols + kStep - 1) / kStep;
  int32_t b = 0;
  if constexpr (kRows <= 4) {
    for (; b + 4 <= args.batch && terms != nullptr; b += 4) {
      tile<kRows, 4>(args, SplitBefore{terms + b * steps, steps}, row, b);
    }
  }
  for (; b < args.batch; b += 2) {
    const SplitNow x{args.x + b * args.x_stride, args.x_stride};
    b + 2 <= args.batch ? tile<kRows, 2>(args, x, row, b) : tile<kRows, 1>(args, x, row, b);
  }
}

}  // namespace

void gemv_bf16_avx512bf16(const GemvArgs& args) {
  static thread_local TermsBuffer buffer;
  Terms* terms = nullptr;
  if (args.batch >= 4) {
    const int64_t steps = (args.cols + kStep - 1) / kStep;
    terms = buffer.ensure(args.batch * steps);
    for (int64_t i = 0; terms != nullptr && i < args.batch * steps; i++) {
      const int64_t b = i / steps, c = i % steps * kStep;
      const int64_t left = args.cols - c;
      terms[i] =
          split(args.x + b * args.x_stride + c, left < kStep ? static_cast<int>(left) : kStep);
    }
  }
  int64_t row = args.row0;
  if (args.batch < 4) {
    for (; row + 8 <= args.row1; row += 8) block<8>(args, terms, row);
  }
  for (; row + 4 <= args.row1; row += 4) block<4>(args, terms, row);
  for (; row < args.row1; row++) block<1>(args, terms, row);
}

}  // namespace mustafar
