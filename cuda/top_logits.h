// The largest logits of a row: what greedy and top-k sampling need, so that whole rows stay on the
// device.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace mustafar::cuda {

constexpr int32_t kTopChunk = 2048;     // values that one block sorts
constexpr int32_t kMaxTopLogits = 512;  // the largest k: far below kTopChunk, so that chunks shrink

// What is left of a row, before its k pairs.
struct TopSummary {
  float exp_sum;    // of e^(logit - largest) over the row
  int32_t regular;  // 1: no NaN, no +Inf and not all -Inf; else nothing else here says anything
};
struct TopPair {
  float value;
  int32_t id;
};

// Bytes of the scratch that top_logits needs.
int64_t top_logits_scratch_bytes(int64_t n, int64_t vocab, int32_t k);
// Bytes of one row of its result: a TopSummary, then k TopPairs.
constexpr int64_t top_logits_row_bytes(int32_t k) {
  return static_cast<int64_t>(sizeof(TopSummary) + k * sizeof(TopPair));
}

// Of each of the n rows of logits [n][vocab] the k largest, largest first, ties by the lower id; -0
// counts as +0. 1 <= k <= min(kMaxTopLogits, vocab). out: [n][top_logits_row_bytes(k)] on the
// device.
void top_logits(const float* logits, int64_t n, int64_t vocab, int32_t k, void* scratch, void* out,
                Stream stream);

}  // namespace mustafar::cuda
