// Decode's products of a weight matrix with a few activation rows, over Simd. Four weight rows are
// streamed at a time; a batch that does not fit the registers goes over them again while they are
// in the cache. Every sum has one vector of partial sums, whatever the tile, so that a result
// depends on neither the batch nor the split into tasks. Included by kernels_*.cc after
// simd/math_impl.h.
#pragma once

#include <cstdint>

#include "backend/cpu/kernels.h"

namespace mustafar {
namespace {

constexpr int kGemvRows = 4;

// How far ahead of the loads weights are asked for, per row, into the L2 cache. The hardware's own
// prefetch stops at 4 KiB borders and at the end of a row block.
constexpr int64_t kPrefetchBytes = 2048;

template <class Load, int kRows, int kBatch>
inline void gemv_step(const typename Load::Element* w, const float* x, int64_t w_stride,
                      int64_t x_stride, Simd::F* sums) {
  Simd::F weights[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) weights[r] = Load::load(w + r * w_stride);
#pragma GCC unroll 8
  for (int b = 0; b < kBatch; b++) {
    const Simd::F input = Simd::load(x + b * x_stride);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      sums[b * kRows + r] = Simd::fma(weights[r], input, sums[b * kRows + r]);
    }
  }
}

// Adds columns [c0, c1), a multiple of the width in number, to sums[b * kRows + r]. Whole lines of
// weights are prefetched: those `ahead` bytes after the column.
template <class Load, int kRows, int kBatch>
inline void gemv_columns(const typename Load::Element* w, const float* x, int64_t w_stride,
                         int64_t x_stride, int64_t c0, int64_t c1, int64_t ahead, Simd::F* sums) {
  constexpr int64_t kLine = kLineBytes / sizeof(typename Load::Element);
  Simd::F s[kBatch * kRows];
  for (int i = 0; i < kBatch * kRows; i++) s[i] = sums[i];
  int64_t c = c0;
  for (; c + kLine <= c1; c += kLine) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + r * w_stride + c) + ahead, 0, 2);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLine; i += kWidth) {
      gemv_step<Load, kRows, kBatch>(w + c + i, x + c + i, w_stride, x_stride, s);
    }
  }
  for (; c < c1; c += kWidth) {
    gemv_step<Load, kRows, kBatch>(w + c, x + c, w_stride, x_stride, s);
  }
  for (int i = 0; i < kBatch * kRows; i++) sums[i] = s[i];
}

template <class Load, int kRows, int kBatch>
void gemv_tile(const GemvArgs& args, int64_t row, int32_t batch0) {
  const auto* w = static_cast<const typename Load::Element*>(args.weights) + row * args.cols;
  const float* x = args.x + batch0 * args.x_stride;
  Simd::F sums[kBatch * kRows];
  for (int i = 0; i < kBatch * kRows; i++) sums[i] = Simd::zero();

  // Towards the end of the rows the next block's beginnings are fetched.
  const int64_t element = sizeof(typename Load::Element);
  const int64_t whole = args.cols / kWidth * kWidth;
  int64_t turn = args.cols - kPrefetchBytes / element;
  turn = turn < 0 ? 0 : turn / (kLineBytes / element) * (kLineBytes / element);
  gemv_columns<Load, kRows, kBatch>(w, x, args.cols, args.x_stride, 0, turn, kPrefetchBytes, sums);
  gemv_columns<Load, kRows, kBatch>(w, x, args.cols, args.x_stride, turn, whole,
                                    kPrefetchBytes + (kRows - 1) * args.cols * element, sums);
  if (whole < args.cols) {
    const int rest = static_cast<int>(args.cols - whole);
    for (int r = 0; r < kRows; r++) {
      const Simd::F weights = Load::load_partial(w + r * args.cols + whole, rest);
      for (int b = 0; b < kBatch; b++) {
        const Simd::F input = Simd::load_partial(x + b * args.x_stride + whole, rest);
        sums[b * kRows + r] = Simd::fma(weights, input, sums[b * kRows + r]);
      }
    }
  }

  for (int b = 0; b < kBatch; b++) {
    float* y = args.y + (batch0 + b) * args.y_stride + (row - args.row0);
    for (int r = 0; r < kRows; r++) {
      float sum = Simd::reduce_add(sums[b * kRows + r]);
      if (args.bias != nullptr) sum += args.bias[row + r];
      y[r] = args.add ? y[r] + sum : sum;
    }
  }
}

template <class Load, int kRows, int kBatch>
void gemv_batch(const GemvArgs& args, int64_t row, int32_t batch0) {
  int32_t left = args.batch - batch0;
  if constexpr (kBatch == Simd::kGemvBatch) {
    for (; left >= kBatch; left -= kBatch, batch0 += kBatch) {
      gemv_tile<Load, kRows, kBatch>(args, row, batch0);
    }
  } else if (left == kBatch) {
    gemv_tile<Load, kRows, kBatch>(args, row, batch0);
    return;
  }
  if constexpr (kBatch > 1) {
    if (left > 0) gemv_batch<Load, kRows, kBatch - 1>(args, row, batch0);
  }
}

template <class Load>
void gemv_rows(const GemvArgs& args) {
  int64_t row = args.row0;
  for (; row + kGemvRows <= args.row1; row += kGemvRows) {
    gemv_batch<Load, kGemvRows, Simd::kGemvBatch>(args, row, 0);
  }
  for (; row < args.row1; row++) gemv_batch<Load, 1, Simd::kGemvBatch>(args, row, 0);
}

void gemv(const GemvArgs& args) {
  switch (args.dtype) {
    case DType::kF32:
      return gemv_rows<LoadF32>(args);
    case DType::kF16:
      return gemv_rows<LoadF16>(args);
    default:
      return gemv_rows<LoadBF16>(args);
  }
}

}  // namespace
}  // namespace mustafar
