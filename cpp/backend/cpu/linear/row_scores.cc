#include "backend/cpu/linear/row_scores.h"

#include <cmath>

namespace mustafar {

void score_host_rows(ThreadPool& pool, const Kernels& kernels, const float* logits, int64_t vocab,
                     std::span<RowScore> rows) {
  pool.parallel_for(static_cast<int64_t>(rows.size()), [&](int64_t i, int) {
    RowScore& row = rows[i];
    const float* x = logits + i * vocab;
    float most = 0;
    int64_t top = 0;
    kernels.row_max(x, vocab, &most, &top);
    const float log_sum = static_cast<float>(most + std::log(kernels.exp_sum(x, most, vocab)));
    row.top = static_cast<int32_t>(top);
    row.log_prob = x[row.target] - log_sum;
    if (row.reference != nullptr) {
      // Rounding can leave a distribution next to itself a little below zero; NaN stays.
      const double divergence = kernels.divergence(row.reference, x, log_sum, vocab);
      row.divergence = divergence < 0 ? 0 : divergence;
    }
    if (row.log_probs != nullptr) {
      for (int64_t c = 0; c < vocab; c++) row.log_probs[c] = x[c] - log_sum;
    }
  });
}

}  // namespace mustafar
