// GEMM micro-kernels and the flash-attention panel built of them, over Simd and a Step, which says
// what one 32-bit word of a packed operand is, how many rows a result tile has and how it is
// computed. A tile is two vectors wide; here inputs are broadcast and weights are vectors of
// outputs. Included by kernels_*.cc after simd/math_impl.h.
#pragma once

#include <cstdint>

#include "backend/cpu/kernels.h"
#include "backend/cpu/linear/quantised_codes_impl.h"

namespace mustafar {
namespace {

constexpr int kTileCols = 2 * Simd::kWidth;

// What kernels that multiply in vector registers have in common.
struct StepInRegisters {
  static constexpr int kRows = Simd::kGemmRows;
  static constexpr int kBestSteps = kGemmSteps;
  static constexpr int kTaskCols = 128;
  static constexpr int kDepth = 1;  // attention pads its inner dimensions to a multiple of it
  static constexpr void (*kEnter)() = nullptr;
  static constexpr void (*kLeave)() = nullptr;
};

// A word is one f32.
struct StepF32 : StepInRegisters {
  static constexpr int kUnit = 1;
  static Simd::F multiply_add(Simd::F input, Simd::F weight, Simd::F sum) {
    return Simd::fma(input, weight, sum);
  }
  static Simd::F exp2_fraction(Simd::F r) { return mustafar::exp2_fraction(r); }
  // One vector of words from kUnit vectors of elements.
  static Simd::F words(const Simd::F* x) { return x[0]; }
  // The same of kUnit elements a lane: vector i has every lane's element i.
  static Simd::F words_across(const Simd::F* x) { return x[0]; }
  // One vector of words made of the n <= kWidth * kUnit first elements at p, zeros after them.
  template <class Load>
  static Simd::F load(const typename Load::Element* p, int n) {
    return n >= Simd::kWidth ? Load::load(p) : n <= 0 ? Simd::zero() : Load::load_partial(p, n);
  }
  // One vector of words along the outputs: element j of p (and of the row after it), j < n.
  template <class Load>
  static Simd::F load_across(const typename Load::Element* p, const typename Load::Element*,
                             int n) {
    return load<Load>(p, n);
  }
};

template <class Step, int kRows>
void tile_rows(int32_t steps, const float* input, const float* weights, float* c, int64_t c_stride,
               bool add) {
  Simd::F s[kRows][2];
#pragma GCC unroll 14
  for (int r = 0; r < kRows; r++) s[r][0] = s[r][1] = Simd::zero();
  // The next input panel is prefetched, a line a step: it may lie in a cache that cores share.
  const char* ahead = reinterpret_cast<const char*>(input + Step::kRows * kGemmStride);
  for (int32_t i = 0; i < steps; i++) {
    __builtin_prefetch(ahead + int64_t{i} * 64);
    const Simd::F w0 = Simd::load(weights), w1 = Simd::load(weights + Simd::kWidth);
    weights += kTileCols;
#pragma GCC unroll 14
    for (int r = 0; r < kRows; r++) {
      const Simd::F x = Simd::set1(input[r * kGemmStride + i]);
      s[r][0] = Step::multiply_add(x, w0, s[r][0]);
      s[r][1] = Step::multiply_add(x, w1, s[r][1]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < kRows; r++) {
    float* y = c + r * c_stride;
    if (add) {
      s[r][0] = Simd::add(Simd::load(y), s[r][0]);
      s[r][1] = Simd::add(Simd::load(y + Simd::kWidth), s[r][1]);
    }
    Simd::store(y, s[r][0]);
    Simd::store(y + Simd::kWidth, s[r][1]);
  }
}

// The smallest even height that holds n_rows.
template <class Step, int kRows = Simd::kGemmRows>
void tile_in_registers(int32_t steps, const float* input, const float* weights, int32_t n_rows,
                       float* c, int64_t c_stride, bool add) {
  if constexpr (kRows > 2) {
    if (n_rows <= kRows - 2) {
      return tile_in_registers<Step, kRows - 2>(steps, input, weights, n_rows, c, c_stride, add);
    }
  } else {
    if (n_rows == 1) return tile_rows<Step, 1>(steps, input, weights, c, c_stride, add);
  }
  tile_rows<Step, kRows>(steps, input, weights, c, c_stride, add);
}

template <class Step>
void tile(int32_t steps, const float* input, const float* weights, int32_t n_rows, float* c,
          int64_t c_stride, bool add) {
  if constexpr (requires { Step::tile(steps, input, weights, n_rows, c, c_stride, add); }) {
    Step::tile(steps, input, weights, n_rows, c, c_stride, add);
  } else {
    tile_in_registers<Step>(steps, input, weights, n_rows, c, c_stride, add);
  }
}

template <class Step>
void pack_input(const float* x, int64_t stride, int32_t n_rows, int32_t n, float factor,
                float* out) {
  constexpr int kElements = Simd::kWidth * Step::kUnit;
  const Simd::F f = Simd::set1(factor);
  for (int32_t r = 0; r < n_rows; r++) {
    const float* row = x + r * stride;
    float* y = out + r * kGemmStride;
    for (int32_t i = 0; i < n; i += kElements) {
      Simd::F v[Step::kUnit];
      for (int k = 0; k < Step::kUnit; k++) {
        const int at = i + k * Simd::kWidth;
        v[k] = at < n ? Simd::mul(StepF32::load<LoadF32>(row + at, n - at), f) : Simd::zero();
      }
      Simd::store(y + i / Step::kUnit, Step::words(v));
    }
  }
}

template <class Step, class Load>
void pack_weights_as(const typename Load::Element* w, int64_t stride, int32_t n_rows, int32_t n,
                     float* out) {
  constexpr int kElements = Simd::kWidth * Step::kUnit;
  const int32_t steps = (n + Step::kUnit - 1) / Step::kUnit;
  for (int32_t i = 0; i < n; i += kElements) {
    const int32_t step0 = i / Step::kUnit;
    const int32_t count = steps - step0 < Simd::kWidth ? steps - step0 : Simd::kWidth;
    for (int half = 0; half < 2; half++) {
      Simd::F rows[Simd::kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < Simd::kWidth; r++) {
        const int32_t row = half * Simd::kWidth + r;
        const typename Load::Element* p = w + row * stride + i;
        if (row < n_rows) {
          __builtin_prefetch(p + 4 * kElements);
          rows[r] = Step::template load<Load>(p, n - i);
        } else {
          rows[r] = Simd::zero();
        }
      }
      Simd::transpose(rows);
      float* y = out + int64_t{step0} * kTileCols + half * Simd::kWidth;
      if (count == Simd::kWidth) {
#pragma GCC unroll 16
        for (int r = 0; r < Simd::kWidth; r++) Simd::store(y + r * kTileCols, rows[r]);
      } else {
        for (int r = 0; r < count; r++) Simd::store(y + r * kTileCols, rows[r]);
      }
    }
  }
}

template <class Step>
void pack_weights(const void* w, DType dtype, int64_t stride, int32_t n_rows, int32_t n,
                  float* out) {
  switch (dtype) {
    case DType::kF32:
      return pack_weights_as<Step, LoadF32>(static_cast<const float*>(w), stride, n_rows, n, out);
    case DType::kF16:
      return pack_weights_as<Step, LoadF16>(static_cast<const uint16_t*>(w), stride, n_rows, n,
                                            out);
    default:
      return pack_weights_as<Step, LoadBF16>(static_cast<const uint16_t*>(w), stride, n_rows, n,
                                             out);
  }
}

// Lanes of codes are outputs already, as those of a panel.
template <class Step, bool kMinimums>
void pack_codes(const Matrix& w, int64_t row, int32_t n_rows, int64_t col, int32_t n, float* out) {
  for (int half = 0; half < 2; half++) {
    float* y = out + half * Simd::kWidth;
    if (half * Simd::kWidth >= n_rows) {
      for (int32_t i = 0; i < n; i += Step::kUnit, y += kTileCols) Simd::store(y, Simd::zero());
      continue;
    }
    const CodeRows rows(w, row + half * Simd::kWidth);
    for (int64_t c = col; c < col + n;) {
      const int64_t group = c / w.group;
      const int64_t end = (group + 1) * w.group < col + n ? (group + 1) * w.group : col + n;
      const Simd::F scale = rows.scale(group), offset = rows.offset(group);
      for (; c < end; c += 4) {  // past n there is room, and what the product does not read
        const Words word = rows.word(c);
        Simd::F x[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          x[i] = CodeRows::weight<kMinimums>(CodeRows::code(word, i), scale, offset);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i += Step::kUnit, y += kTileCols) {
          Simd::store(y, Step::words_across(x + i));
        }
      }
    }
  }
}

template <class Step>
void pack_quantised(const Matrix& w, int64_t row, int32_t n_rows, int64_t col, int32_t n,
                    float* out) {
  w.offset == Offset::kMinimums ? pack_codes<Step, true>(w, row, n_rows, col, n, out)
                                : pack_codes<Step, false>(w, row, n_rows, col, n, out);
}

template <class Step, class Load>
void pack_values_as(const typename Load::Element* w, int64_t stride, int32_t n_rows, int32_t n_cols,
                    float* out) {
  int32_t i = 0;
  for (; i < n_rows; i += Step::kUnit) {
    const typename Load::Element* p = w + i * stride;
    const bool pair = i + 1 < n_rows;
    for (int half = 0; half < 2; half++) {
      const int at = half * Simd::kWidth;
      const Simd::F v = Step::template load_across<Load>(
          p + (at < n_cols ? at : 0), pair ? p + stride + (at < n_cols ? at : 0) : nullptr,
          n_cols - at);
      Simd::store(out, v);
      out += Simd::kWidth;
    }
  }
  for (int32_t step = i / Step::kUnit; step % Step::kDepth != 0; step++) {
    Simd::store(out, Simd::zero());
    Simd::store(out + Simd::kWidth, Simd::zero());
    out += kTileCols;
  }
}

template <class Step>
void pack_values(const void* w, DType dtype, int64_t stride, int32_t n_rows, int32_t n_cols,
                 float* out) {
  switch (dtype) {
    case DType::kF32:
      return pack_values_as<Step, LoadF32>(static_cast<const float*>(w), stride, n_rows, n_cols,
                                           out);
    case DType::kF16:
      return pack_values_as<Step, LoadF16>(static_cast<const uint16_t*>(w), stride, n_rows, n_cols,
                                           out);
    default:
      return pack_values_as<Step, LoadBF16>(static_cast<const uint16_t*>(w), stride, n_rows, n_cols,
                                            out);
  }
}

inline int lanes_of(int32_t n) { return n < Simd::kWidth ? n : Simd::kWidth; }

// One row of scores becomes packed probabilities [steps * kUnit], those from `visible` on zero,
// and so the first `hidden` where kHides. Returns the factor for what was summed before.
template <class Step, bool kHides>
float softmax_row(const float* scores, int32_t visible, [[maybe_unused]] int32_t hidden,
                  int32_t steps, float& max, float& sum, float* words) {
  const Simd::F lowest = Simd::set1(-__builtin_inff());
  Simd::F top = lowest;
  int32_t i = 0;
  for (; i + Simd::kWidth <= visible; i += Simd::kWidth) {
    Simd::F x = Simd::load(scores + i);
    if constexpr (kHides) {
      if (i < hidden) x = Simd::first_lanes(lowest, lanes_of(hidden - i), x);
    }
    top = Simd::max(x, top);
  }
  if (i < visible) {
    Simd::F x = Simd::first_lanes(Simd::load(scores + i), visible - i, lowest);
    if constexpr (kHides) {
      if (i < hidden) x = Simd::first_lanes(lowest, lanes_of(hidden - i), x);
    }
    top = Simd::max(x, top);
  }
  const float tile_max = Simd::reduce_max(top);
  const float new_max = tile_max > max ? tile_max : max;
  // Nothing visible so far: any finite number will do.
  const float shift = new_max == -__builtin_inff() ? 0.0f : new_max;

  const Simd::F m = Simd::set1(shift);
  const Simd::F floor = Simd::set1(-126.0f);
  Simd::F total = Simd::zero();
  constexpr int kElements = Simd::kWidth * Step::kUnit;
  const int32_t n = steps * Step::kUnit;
  for (i = 0; i < n; i += kElements) {
    Simd::F p[Step::kUnit];
    for (int k = 0; k < Step::kUnit; k++) {
      const int32_t at = i + k * Simd::kWidth;
      if (at >= visible) {
        p[k] = Simd::zero();
        continue;
      }
      // NaN scores stay NaN: max returns its second argument.
      const Simd::F x = Simd::max(floor, Simd::sub(Simd::load(scores + at), m));
      const Simd::F whole = Simd::round(x);
      p[k] = Simd::scale2(Step::exp2_fraction(Simd::sub(x, whole)), whole);
      if (at + Simd::kWidth > visible) p[k] = Simd::first_lanes(p[k], visible - at, Simd::zero());
      if constexpr (kHides) {
        if (at < hidden) p[k] = Simd::first_lanes(Simd::zero(), lanes_of(hidden - at), p[k]);
      }
      total = Simd::add(total, p[k]);
    }
    Simd::store(words + i / Step::kUnit, Step::words(p));
  }
  const float before = max == -__builtin_inff() ? 0.0f : __builtin_exp2f(max - shift);
  sum = sum * before + Simd::reduce_add(total);
  max = new_max;
  return before;
}

template <class Step>
void attend(const AttendPanel& panel) {
  constexpr int32_t kScoreStride = kKeyTile + 16;
  float* scores = panel.scratch;
  float* words = scores + Step::kRows * kScoreStride;
  int32_t n_keys = 0;
  for (int32_t r = 0; r < panel.n_rows; r++) {
    if (panel.visible[r] > n_keys) n_keys = panel.visible[r];
  }
  if (n_keys <= 0) return;

  const int32_t depth = (panel.head_dim + Step::kUnit - 1) / Step::kUnit;
  const float* k = panel.k;
  for (int32_t key = 0; key < n_keys; key += kTileCols) {
    const float* q = panel.q;
    for (int32_t at = 0; at < depth; at += kGemmSteps) {
      const int32_t steps = depth - at < kGemmSteps ? depth - at : kGemmSteps;
      tile<Step>(steps, q, k, panel.n_rows, scores + key, kScoreStride, at > 0);
      q += Step::kRows * kGemmStride;
      k += steps * kTileCols;
    }
  }

  constexpr int32_t kPadded = Step::kUnit * Step::kDepth;
  const int32_t steps = (n_keys + kPadded - 1) / kPadded * Step::kDepth;
  const int32_t out_stride = (panel.head_dim + kTileCols - 1) / kTileCols * kTileCols;
  for (int32_t r = 0; r < panel.n_rows; r++) {
    const float* from = scores + r * kScoreStride;
    float* to = words + r * kGemmStride;
    const float before = panel.hidden == nullptr
                             ? softmax_row<Step, false>(from, panel.visible[r], 0, steps,
                                                        panel.max[r], panel.sum[r], to)
                             : softmax_row<Step, true>(from, panel.visible[r], panel.hidden[r],
                                                       steps, panel.max[r], panel.sum[r], to);
    if (before == 1.0f) continue;
    float* out = panel.out + r * out_stride;
    for (int32_t d = 0; d < out_stride; d += Simd::kWidth) {
      Simd::store(out + d, Simd::mul(Simd::load(out + d), Simd::set1(before)));
    }
  }
  for (int32_t d = 0; d < out_stride; d += kTileCols) {
    tile<Step>(steps, words, panel.v + d / kTileCols * int64_t{panel.v_panel}, panel.n_rows,
               panel.out + d, out_stride, true);
  }
}

template <class Step>
GemmKernels make_gemm_kernels() {
  GemmKernels g;
  g.rows = Step::kRows;
  g.cols = kTileCols;
  g.unit = Step::kUnit;
  g.depth = Step::kBestSteps;
  g.task_cols = Step::kTaskCols / kTileCols * kTileCols;
  g.pack_input = pack_input<Step>;
  g.pack_weights = pack_weights<Step>;
  g.pack_quantised = pack_quantised<Step>;
  g.pack_values = pack_values<Step>;
  g.tile = tile<Step>;
  g.attend = attend<Step>;
  g.enter = Step::kEnter;
  g.leave = Step::kLeave;
  return g;
}

}  // namespace
}  // namespace mustafar
