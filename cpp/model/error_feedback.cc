// GPTQ takes inputs one after another and spreads the error of each over those to come, by the
// inverse of H = X^T X. The same codes come from the root of H itself, without an inverse: with
// H = (I + U) D (I + U)^T, U strictly upper triangular, input k is rounded from
//
//   w[k] + sum over j < k of (w[j] - q[j]) U[j][k]
//
// (Chee et al. 2023, arXiv:2307.13304, theorem 6). A group's scale is fitted when the first of its
// inputs is reached, to its weights as they would be with no error from there on: where
// w[j] - q[j] is known before the group and 0 = w[j] - x[j] - ... inside it, x being the same sum.
#include "model/error_feedback.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "core/cholesky.h"
#include "model/group_fit.h"
#include "mustafar/error.h"

namespace mustafar {

InputMoments::InputMoments(int64_t n, const float* sums, double damping, ThreadPool& pool)
    : n_(n), energy_(n), shares_(n * n) {
  std::vector<double> a(n * n);
  double trace = 0;
  for (int64_t i = 0; i < n; i++) trace += sums[i * n + i];
  if (!std::isfinite(trace)) throw Error("activations are not finite on this text");
  // Inputs that are always zero: their weights do not matter, and are rounded by themselves.
  const double added = trace > 0 ? damping * trace / static_cast<double>(n) : 1.0;
  pool.parallel_for(n, [&](int64_t i, int) {
    for (int64_t j = i; j < n; j++) a[i * n + j] = sums[i * n + j];
    a[i * n + i] += added;
    energy_[i] = static_cast<float>(a[i * n + i]);
  });
  if (!upper_root(n, a, pool)) throw Error("activations are not finite on this text");
  pool.parallel_for(n, [&](int64_t k, int) {
    const double pivot = a[k * n + k];
    for (int64_t j = 0; j < k; j++) {
      shares_[k * n + j] = static_cast<float>(a[j * n + k] / pivot);
    }
  });
}

namespace {

// Sixteen rows on their way through the inputs. All arrays are [inputs][kFitRows].
struct RowTile {
  std::vector<float> weights, errors, group, codes;

  RowTile(int64_t cols, int64_t group_cols)
      : weights(cols * kFitRows),
        errors(cols * kFitRows),
        group(group_cols * kFitRows),
        codes(group_cols * kFitRows) {}
};

// x [kFitRows] += sum over j in [first, end) of errors[j] * shares[j].
void add_errors(const float* shares, const float* errors, int64_t first, int64_t end, float* x) {
  float sum[kFitRows];
  std::copy_n(x, kFitRows, sum);
  for (int64_t j = first; j < end; j++) {
    const float* e = errors + j * kFitRows;
    for (int r = 0; r < kFitRows; r++) sum[r] += shares[j] * e[r];
  }
  std::copy_n(sum, kFitRows, x);
}

}  // namespace

bool round_with_feedback(const Matrix& stored, const InputMoments& moments, ThreadPool& pool,
                         GroupCodes& out) {
  const int64_t group = out.format.group;
  const float top = static_cast<float>(out.format.top());
  std::vector<RowTile> tiles(pool.size(), RowTile(out.cols, group));
  std::atomic<bool> fine = true;
  pool.parallel_for((out.rows + kFitRows - 1) / kFitRows, [&](int64_t tile, int worker) {
    RowTile& t = tiles[worker];
    float* const errors = t.errors.data();
    load_rows(stored, tile * kFitRows, t.weights.data());
    for (int64_t col = 0; col < out.cols; col += group) {
      float* const x = t.group.data();
      const float* const w = t.weights.data() + col * kFitRows;
      std::copy_n(w, group * kFitRows, x);
      for (int64_t c = 0; c < group; c++) {
        add_errors(moments.shares(col + c), errors, 0, col, x + c * kFitRows);
      }
      // The group's weights without errors of its own.
      for (int64_t c = 0; c < group; c++) {
        float* const moved = t.codes.data() + c * kFitRows;
        float* const e = errors + (col + c) * kFitRows;
        std::copy_n(x + c * kFitRows, kFitRows, moved);
        add_errors(moments.shares(col + c), errors, col, col + c, moved);
        for (int r = 0; r < kFitRows; r++) e[r] = w[c * kFitRows + r] - moved[r];
      }
      const GroupScales scales =
          fit_group(out.format, t.codes.data(), moments.energy() + col, group);
      for (int r = 0; r < kFitRows; r++) {
        if (!std::isfinite(scales.scale[r])) fine = false;
      }
      if (!fine) return;
      for (int64_t c = 0; c < group; c++) {
        float* const from = x + c * kFitRows;
        float* const e = errors + (col + c) * kFitRows;
        add_errors(moments.shares(col + c), errors, col, col + c, from);
        for (int r = 0; r < kFitRows; r++) {
          const float code = nearest_code(from[r], scales.scale[r], scales.zero[r], top);
          t.codes[c * kFitRows + r] = code;
          e[r] = w[c * kFitRows + r] - scales.scale[r] * (code - scales.zero[r]);
        }
      }
      store_group(scales, t.codes.data(), tile * kFitRows, col, group, out);
    }
  });
  return fine;
}

}  // namespace mustafar
