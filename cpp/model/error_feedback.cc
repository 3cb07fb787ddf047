// GPTQ takes inputs one after another and spreads the error of each over those to come, by the
// inverse of H = X^T X. The same codes come from the root of H itself, without an inverse: with
// H = (I + U) D (I + U)^T, U strictly upper triangular, input k is rounded from
//
//   w[k] + sum over j < k of (w[j] - q[j]) U[j][k]
//
// (Chee et al. 2023, arXiv:2307.13304, theorem 6). Groups are of neighbouring inputs whatever the
// order, so their scales are fitted beforehand, to the weights as they are.
#include "model/error_feedback.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>

#include "core/cholesky.h"
#include "model/group_fit.h"
#include "mustafar/error.h"

namespace mustafar {

InputMoments::InputMoments(int64_t n, const float* sums, double damping, ThreadPool& pool)
    : n_(n), order_(n), energy_(n), shares_(n * n) {
  double trace = 0;
  for (int64_t i = 0; i < n; i++) trace += sums[i * n + i];
  if (!std::isfinite(trace)) throw Error("activations are not finite on this text");
  // Inputs that are always zero: their weights do not matter, and are rounded by themselves.
  const double added = trace > 0 ? damping * trace / static_cast<double>(n) : 1.0;
  for (int64_t i = 0; i < n; i++) energy_[i] = static_cast<float>(sums[i * n + i] + added);
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int64_t i, int64_t j) { return sums[i * n + i] > sums[j * n + j]; });

  std::vector<double> a(n * n);
  pool.parallel_for(n, [&](int64_t k, int) {
    const int64_t i = order_[k];
    for (int64_t l = k; l < n; l++) {
      const int64_t j = order_[l];
      a[k * n + l] = sums[std::min(i, j) * n + std::max(i, j)];
    }
    a[k * n + k] += added;
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

// Sixteen rows on their way through the inputs.
struct RowTile {
  std::vector<float> weights, codes;  // [inputs][kFitRows]
  std::vector<float> errors;          // [inputs][kFitRows], in the order of rounding
  std::vector<GroupScales> scales;    // [groups]

  explicit RowTile(const GroupCodes& matrix)
      : weights(matrix.cols * kFitRows),
        codes(matrix.cols * kFitRows),
        errors(matrix.cols * kFitRows),
        scales(matrix.n_groups()) {}
};

// False where a group has no scale.
bool fit_groups(const GroupFormat& format, const float* importance, RowTile& tile) {
  bool fine = true;
  for (size_t g = 0; g < tile.scales.size(); g++) {
    const int64_t col = static_cast<int64_t>(g) * format.group;
    tile.scales[g] =
        fit_group(format, tile.weights.data() + col * kFitRows, importance + col, format.group);
    for (const float scale : tile.scales[g].scale) fine = fine && std::isfinite(scale);
  }
  return fine;
}

void round_inputs(const GroupFormat& format, const InputMoments& moments, RowTile& tile) {
  const float top = static_cast<float>(format.top());
  for (int64_t k = 0; k < moments.inputs(); k++) {
    const int64_t input = moments.input(k);
    const float* const w = tile.weights.data() + input * kFitRows;
    float* const codes = tile.codes.data() + input * kFitRows;
    const GroupScales& scales = tile.scales[input / format.group];
    const float* const shares = moments.shares(k);
    float sum[kFitRows];
    std::copy_n(w, kFitRows, sum);
    for (int64_t j = 0; j < k; j++) {
      const float* const e = tile.errors.data() + j * kFitRows;
      for (int r = 0; r < kFitRows; r++) sum[r] += shares[j] * e[r];
    }
    float* const errors = tile.errors.data() + k * kFitRows;
    for (int r = 0; r < kFitRows; r++) {
      codes[r] = nearest_code(sum[r], scales.scale[r], scales.zero[r], top);
      errors[r] = w[r] - scales.scale[r] * (codes[r] - scales.zero[r]);
    }
  }
}

}  // namespace

bool round_with_feedback(const Matrix& stored, const InputMoments& moments, ThreadPool& pool,
                         GroupCodes& out) {
  std::vector<RowTile> tiles(pool.size(), RowTile(out));
  std::atomic<bool> fine = true;
  pool.parallel_for((out.rows + kFitRows - 1) / kFitRows, [&](int64_t i, int worker) {
    RowTile& tile = tiles[worker];
    load_rows(stored, i * kFitRows, tile.weights.data());
    if (!fit_groups(out.format, moments.energy(), tile)) {
      fine = false;
      return;
    }
    round_inputs(out.format, moments, tile);
    for (int64_t g = 0; g < out.n_groups(); g++) {
      const int64_t col = g * out.format.group;
      store_group(tile.scales[g], tile.codes.data() + col * kFitRows, i * kFitRows, col,
                  out.format.group, out);
    }
  });
  return fine;
}

}  // namespace mustafar
