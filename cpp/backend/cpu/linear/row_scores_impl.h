// What scoring needs of a row of logits, over Simd. Included by kernels_*.cc after
// vector_ops_impl.h. Sums are of floats inside a block, of doubles over the blocks.
#pragma once

#include <cstdint>

namespace mustafar {
namespace {

constexpr int64_t kSumBlock = 1024;  // elements, a multiple of four vectors

void row_max(const float* x, int64_t n, float* value, int64_t* index) {
  float best = -__builtin_inff();
  int64_t best_block = 0;
  for (int64_t block = 0; block < n; block += kSumBlock) {
    const int64_t end = n - block < kSumBlock ? n : block + kSumBlock;
    const Simd::F least = Simd::set1(-__builtin_inff());
    Simd::F a = least, b = least;
    int64_t i = block;
    for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
      a = Simd::max(Simd::load(x + i), a);
      b = Simd::max(Simd::load(x + i + kWidth), b);
    }
    for (; i < end; i += kWidth) {
      const int count = static_cast<int>(end - i < kWidth ? end - i : kWidth);
      a = Simd::max(Simd::first_lanes(Simd::load_partial(x + i, count), count, least), a);
    }
    const float most = Simd::reduce_max(Simd::max(a, b));
    if (most > best) {
      best = most;
      best_block = block;
    }
  }
  *value = best;
  int64_t at = best_block;
  while (at < n && x[at] != best) at++;
  *index = at < n ? at : 0;
}

// The sum of term(i, count) over n elements: lanes from count on do not count.
template <class Term>
double block_sum(int64_t n, const Term& term) {
  double total = 0;
  for (int64_t block = 0; block < n; block += kSumBlock) {
    const int64_t end = n - block < kSumBlock ? n : block + kSumBlock;
    Simd::F a = Simd::zero(), b = Simd::zero();
    int64_t i = block;
    for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
      a = Simd::add(a, term(i, kWidth));
      b = Simd::add(b, term(i + kWidth, kWidth));
    }
    for (; i < end; i += kWidth) {
      const int count = static_cast<int>(end - i < kWidth ? end - i : kWidth);
      a = Simd::add(a, Simd::first_lanes(term(i, count), count, Simd::zero()));
    }
    total += Simd::reduce_add(Simd::add(a, b));
  }
  return total;
}

inline Simd::F load_some(const float* x, int64_t count) {
  return count == kWidth ? Simd::load(x) : Simd::load_partial(x, static_cast<int>(count));
}

double exp_sum(const float* x, float shift, int64_t n) {
  const Simd::F s = Simd::set1(shift);
  return block_sum(
      n, [&](int64_t i, int64_t count) { return exp(Simd::sub(load_some(x + i, count), s)); });
}

double divergence(const float* p, const float* x, float shift, int64_t n) {
  const Simd::F s = Simd::set1(shift);
  return block_sum(n, [&](int64_t i, int64_t count) {
    const Simd::F log_p = load_some(p + i, count);
    const Simd::F log_q = Simd::sub(load_some(x + i, count), s);
    return Simd::mul(exp(log_p), Simd::sub(log_p, log_q));
  });
}

}  // namespace
}  // namespace mustafar
