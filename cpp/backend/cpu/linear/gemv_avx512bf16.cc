// GEMV of bf16 weights with AVX512_BF16's dot product of pairs, of activations split into terms
// (bf16_terms.h): weights are not widened, which leaves the loop bound by memory alone.
#include <immintrin.h>

#include <cstdint>

#include "backend/cpu/kernels.h"
#include "backend/cpu/linear/bf16_terms.h"

namespace mustafar {
namespace {

// How far ahead of the loads weights are asked for, per row, into the L2 cache.
constexpr int64_t kPrefetchColumns = 1024;

// 32 activations.
struct Terms {
  __m512i terms[kTerms];  // of pairs
};

inline Terms split(const float* x, int64_t n) {
  Terms terms;
  split_terms(x, n, terms.terms);
  return terms;
}

// Batch rows from which on their terms are not split anew for every block of weight rows.
constexpr int32_t kSplitBefore = 4;

// Where a step's terms come from: split as they are needed, or before the product.
struct SplitNow {
  const float* x;
  int64_t stride;
  Terms terms(int b, int64_t c, int n) const { return split(x + b * stride + c, n); }
};

struct SplitBefore {
  const Terms* x;  // [batch][steps]
  int64_t steps;
  Terms terms(int b, int64_t c, int) const { return x[b * steps + c / kPairColumns]; }
};

// sums[b * kRows + r] of the step at column c.
template <int kRows, int kBatch, class Input>
inline void step(const uint16_t* w, const Input& x, int64_t w_stride, int64_t c, int n,
                 __m512* sums) {
  Terms terms[kBatch];
#pragma GCC unroll 4
  for (int b = 0; b < kBatch; b++) terms[b] = x.terms(b, c, n);
  const __mmask32 mask = n >= kPairColumns ? 0xffffffffu : (1u << n) - 1;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
    const __m512bh weights =
        n >= kPairColumns
            ? reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + r * w_stride))
            : reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, w + r * w_stride));
#pragma GCC unroll 4
    for (int b = 0; b < kBatch; b++) {
      __m512& sum = sums[b * kRows + r];
#pragma GCC unroll 3
      for (int t = 0; t < kTerms; t++) {
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(terms[b].terms[t]), weights);
      }
    }
  }
}

template <int kRows, int kBatch, class Input>
void tile(const GemvArgs& args, const Input& x, int64_t row, int32_t batch0) {
  const auto* w = static_cast<const uint16_t*>(args.weights) + row * args.cols;
  __m512 sums[kRows * kBatch];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kBatch; i++) sums[i] = _mm512_setzero_ps();
  const int64_t whole = args.cols / kPairColumns * kPairColumns;
  // Towards the end of the rows the next block's beginnings are fetched.
  const int64_t turn = args.cols - kPrefetchColumns;
  for (int64_t c = 0; c < whole; c += kPairColumns) {
    const int64_t ahead = kPrefetchColumns + (c < turn ? 0 : (kRows - 1) * args.cols);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      _mm_prefetch(reinterpret_cast<const char*>(w + r * args.cols + c + ahead), _MM_HINT_T1);
    }
    step<kRows, kBatch>(w + c, x, args.cols, c, kPairColumns, sums);
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
  const int64_t steps = column_steps(args.cols);
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

int64_t gemv_terms_bytes_avx512bf16(int32_t batch, int64_t cols) {
  if (batch < kSplitBefore) return 0;
  return batch * column_steps(cols) * static_cast<int64_t>(sizeof(Terms));
}

void gemv_split_terms_avx512bf16(const float* x, int64_t x_stride, int32_t batch, int64_t cols,
                                 void* terms) {
  auto* out = static_cast<Terms*>(terms);
  for (int32_t b = 0; b < batch; b++) {
    for (int64_t c = 0; c < cols; c += kPairColumns) *out++ = split(x + b * x_stride + c, cols - c);
  }
}

void gemv_bf16_avx512bf16(const GemvArgs& args) {
  const auto* terms = static_cast<const Terms*>(args.terms);
  int64_t row = args.row0;
  if (terms == nullptr) {
    for (; row + 8 <= args.row1; row += 8) block<8>(args, terms, row);
  }
  for (; row + 4 <= args.row1; row += 4) block<4>(args, terms, row);
  for (; row < args.row1; row++) block<1>(args, terms, row);
}

}  // namespace mustafar
