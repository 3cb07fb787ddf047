// A group is fitted by trying steps: with the weights rounded at one of them, the best scale for
// the codes is a least-squares fit, s = sum h v w / sum h v^2 over v = code - zero, and explains
// (sum h v w)^2 / sum h v^2 of the energy. The step that explains most wins; rounding at its scale
// and fitting once more can only lose less. The scale is then rounded as it will be stored, and
// codes are chosen for that one.
#include "model/group_fit.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace mustafar {
namespace {

// Steps tried, as parts of what the largest weight would need; of 8 bits the first alone.
constexpr float kShrinks[] = {1.0f, 0.96f, 0.92f, 0.88f, 0.84f, 0.8f, 0.76f, 0.7f};
constexpr int kRefinements = 2;

using Lanes = float[kFitRows];

// Sums over a group's weights at the codes that a scale and a zero give.
struct Moments {
  Lanes vw = {}, vv = {};
};

void moments(const float* x, const float* importance, int64_t n, float top, const Lanes& scale,
             const Lanes& zero, Moments& sums) {
  sums = {};
  Lanes inverse;
  for (int r = 0; r < kFitRows; r++) inverse[r] = 1.0f / scale[r];
  for (int64_t c = 0; c < n; c++) {
    const float* w = x + c * kFitRows;
    const float h = importance != nullptr ? importance[c] : 1.0f;
    for (int r = 0; r < kFitRows; r++) {
      constexpr float kMagic = 12582912.0f;
      float level = w[r] * inverse[r] + zero[r];
      level = level < 0.0f ? 0.0f : level;
      level = level > top ? top : level;
      const float v = ((level + kMagic) - kMagic) - zero[r];
      sums.vw[r] += h * v * w[r];
      sums.vv[r] += h * v * v;
    }
  }
}

}  // namespace

GroupScales fit_group(const GroupFormat& format, const float* x, const float* importance,
                      int64_t n) {
  const float top = static_cast<float>(format.top());
  Lanes low = {}, high = {}, bad = {};  // ranges hold 0
  for (int64_t c = 0; c < n; c++) {
    for (int r = 0; r < kFitRows; r++) {
      const float w = x[c * kFitRows + r];
      low[r] = w < low[r] ? w : low[r];
      high[r] = w > high[r] ? w : high[r];
      bad[r] += w * 0.0f;  // NaN where it is not finite
    }
  }
  Lanes step, first_zero;
  for (int r = 0; r < kFitRows; r++) {
    if (format.symmetric) {
      first_zero[r] = static_cast<float>(format.middle());
      step[r] = std::max(-low[r], high[r]) / (static_cast<float>(format.middle()) - 0.5f);
    } else {
      step[r] = (high[r] - low[r]) / top;
      first_zero[r] = step[r] > 0.0f ? std::nearbyint(-low[r] / step[r]) : 0.0f;
    }
    if (!(step[r] > 0.0f)) step[r] = 1.0f;
  }

  GroupScales best;
  Lanes explained;
  for (int r = 0; r < kFitRows; r++) {
    best.scale[r] = step[r];
    best.zero[r] = first_zero[r];
    explained[r] = -1.0f;
  }
  const int n_shrinks = format.bits == 4 ? static_cast<int>(std::size(kShrinks)) : 1;
  const int reach = format.symmetric || format.bits == 8 ? 0 : 1;
  Moments sums;
  for (int move = -reach; move <= reach; move++) {
    Lanes zero, scale;
    for (int r = 0; r < kFitRows; r++) {
      zero[r] = std::clamp(first_zero[r] + static_cast<float>(move), 0.0f, top);
    }
    for (int k = 0; k < n_shrinks; k++) {
      for (int r = 0; r < kFitRows; r++) scale[r] = step[r] * kShrinks[k];
      moments(x, importance, n, top, scale, zero, sums);
      for (int r = 0; r < kFitRows; r++) {
        const float score =
            sums.vv[r] > 0.0f && sums.vw[r] > 0.0f ? sums.vw[r] * (sums.vw[r] / sums.vv[r]) : 0.0f;
        if (score <= explained[r]) continue;
        explained[r] = score;
        best.zero[r] = zero[r];
        best.scale[r] = score > 0.0f ? sums.vw[r] / sums.vv[r] : step[r];
      }
    }
  }
  for (int i = 0; i < kRefinements; i++) {
    moments(x, importance, n, top, best.scale, best.zero, sums);
    for (int r = 0; r < kFitRows; r++) {
      if (sums.vv[r] > 0.0f && sums.vw[r] > 0.0f) best.scale[r] = sums.vw[r] / sums.vv[r];
    }
  }
  for (int r = 0; r < kFitRows; r++) {
    const bool is_f16 = format.scale_dtype == DType::kF16;
    best.scale[r] =
        is_f16 ? f16_to_f32(f32_to_f16(best.scale[r])) : bf16_to_f32(f32_to_bf16(best.scale[r]));
    if (best.scale[r] == 0.0f) best.scale[r] = 1.0f;  // weights this small are zeros
    best.scale[r] += bad[r];
  }
  return best;
}

void load_rows(const Matrix& stored, int64_t row0, float* out) {
  for (int64_t r = 0; r < kFitRows; r++) {
    const int64_t row = row0 + r;
    for (int64_t c = 0; c < stored.cols; c++) {
      out[c * kFitRows + r] =
          row < stored.rows ? load_float(stored.data, stored.dtype, row * stored.cols + c) : 0.0f;
    }
  }
}

void store_group(const GroupScales& scales, const float* q, int64_t row0, int64_t col, int64_t n,
                 GroupCodes& out) {
  const int64_t rows = std::min<int64_t>(kFitRows, out.rows - row0);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t at = (row0 + r) * out.n_groups() + col / out.format.group;
    store_float(out.scales.data(), out.format.scale_dtype, at, scales.scale[r]);
    out.zeros[at] = static_cast<uint8_t>(scales.zero[r]);
    uint8_t* codes = out.codes.data() + (row0 + r) * out.cols + col;
    for (int64_t c = 0; c < n; c++) codes[c] = static_cast<uint8_t>(q[c * kFitRows + r]);
  }
}

bool round_matrix(const Matrix& stored, ThreadPool& pool, GroupCodes& out) {
  const int64_t group = out.format.group;
  const float top = static_cast<float>(out.format.top());
  std::vector<std::vector<float>> rows(pool.size()), codes(pool.size());
  for (auto& x : rows) x.resize(out.cols * kFitRows);
  for (auto& q : codes) q.resize(group * kFitRows);
  std::atomic<bool> fine = true;
  pool.parallel_for((out.rows + kFitRows - 1) / kFitRows, [&](int64_t tile, int worker) {
    float* const all = rows[worker].data();
    float* const q = codes[worker].data();
    load_rows(stored, tile * kFitRows, all);
    for (int64_t col = 0; col < out.cols; col += group) {
      const float* x = all + col * kFitRows;
      const GroupScales scales = fit_group(out.format, x, nullptr, group);
      for (int r = 0; r < kFitRows; r++) {
        if (!std::isfinite(scales.scale[r])) fine = false;
      }
      if (!fine) return;
      for (int64_t c = 0; c < group; c++) {
        for (int r = 0; r < kFitRows; r++) {
          q[c * kFitRows + r] =
              nearest_code(x[c * kFitRows + r], scales.scale[r], scales.zero[r], top);
        }
      }
      store_group(scales, q, tile * kFitRows, col, group, out);
    }
  });
  return fine;
}

}  // namespace mustafar
