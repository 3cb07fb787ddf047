// Matrix products on the device against double precision.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/linear.h"
#include "device_memory.h"
#include "support/kv_test_util.h"

namespace mustafar::cuda {

// Random numbers of any type on the device, with a mirror to read.
class Values : public DeviceMemory {
 public:
  Values(int64_t count, DType dtype, uint32_t seed, float scale = 1.0f)
      : DeviceMemory(dtype_bytes(dtype, count), "values"), dtype_(dtype) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < count; i++) {
      store_float(host(), dtype, i, testing::random_normal(random) * scale);
    }
    upload();
  }
  float operator[](int64_t i) const { return load_float(host(), dtype_, i); }
  float* floats() { return reinterpret_cast<float*>(device()); }

 private:
  DType dtype_;
};

struct LinearShape {
  DType dtype;
  int32_t n;
  int64_t rows, second_rows, cols;
  bool accumulate, bias;
};

inline std::string name_of(const LinearShape& s) {
  return std::string(dtype_name(s.dtype)) + "_" + std::to_string(s.n) + "x" +
         std::to_string(s.rows) + "x" + std::to_string(s.cols) + (s.accumulate ? "_add" : "") +
         (s.bias ? "_bias" : "");
}

// Tensor cores of a device add with less care than f32 rounds: they cut off bits below the largest
// of the terms that they add at once.
constexpr double kTensorCoreError = kOnDevice ? 4e-6 : 1e-6;

// Two matrices in one call of `run`. Error of every sum, relative to the sum of the terms' sizes,
// against double precision. rounds: x is first rounded to the weights' type.
inline void check_linear(const LinearShape& s, bool rounds, double error,
                         const std::function<void(const LinearArgs&)>& run) {
  SCOPED_TRACE(name_of(s));
  Values w0(s.rows * s.cols, s.dtype, 1), w1(s.second_rows * s.cols, s.dtype, 2);
  Values x(s.n * s.cols, DType::kF32, 3), bias(s.rows, DType::kF32, 4);
  Values y0(s.n * s.rows, DType::kF32, 5), y1(s.n * s.second_rows, DType::kF32, 6);
  const Values before(s.n * s.rows, DType::kF32, 5);
  if (!s.accumulate) y0.poison();
  y1.poison();
  LinearArgs args;
  args.parts[0] = {w0.device(), s.dtype, s.rows,      s.bias ? bias.floats() : nullptr,
                   y0.floats(), s.rows,  s.accumulate};
  args.parts[1] = {w1.device(), s.dtype, s.second_rows, nullptr, y1.floats(), s.second_rows, false};
  args.n_parts = 2;
  args.cols = s.cols;
  args.x = x.floats();
  args.n = s.n;
  run(args);
  y0.download();
  y1.download();
  std::vector<double> factors(s.n * s.cols);
  for (int64_t i = 0; i < s.n * s.cols; i++) {
    factors[i] = rounds ? testing::rounded(x[i], s.dtype) : x[i];
  }
  for (int part = 0; part < 2; part++) {
    const Values& w = part == 0 ? w0 : w1;
    const Values& y = part == 0 ? y0 : y1;
    const int64_t rows = part == 0 ? s.rows : s.second_rows;
    std::vector<float> row_w(s.cols);
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t j = 0; j < s.cols; j++) row_w[j] = w[row * s.cols + j];
      for (int32_t i = 0; i < s.n; i++) {
        double want = 0, size = 1;
        for (int64_t j = 0; j < s.cols; j++) {
          const double term = factors[i * s.cols + j] * row_w[j];
          want += term;
          size += std::fabs(term);
        }
        if (part == 0 && s.bias) want += bias[row];
        if (part == 0 && s.accumulate) want += before[i * rows + row];
        ASSERT_NEAR(y[i * rows + row], want, error * size)
            << "part " << part << " row " << row << " of batch row " << i;
      }
    }
  }
}

// Two matrices of one shape, of which a launch may make gate and up: their parts without results,
// and what they are.
struct GatedMatrices {
  LinearPart gate, up;
  int64_t cols;
  std::function<double(int64_t row, int64_t col)> gate_weight, up_weight;
  std::function<double(int64_t row, int64_t col)> gate_size, up_size;  // of a weight's terms
};

// RMSNorm before and, where it is gated, SiLU after, in one launch. error: of a sum, relative to
// its terms' sizes.
inline void check_fused(const GatedMatrices& m, int32_t n, bool gated, double error,
                        const std::function<void(const LinearArgs&)>& run) {
  const int64_t rows = m.gate.rows, cols = m.cols;
  Values x(n * cols, DType::kF32, 3), norm(cols, DType::kF32, 4), bias(rows, DType::kF32, 5);
  Values y(n * rows, DType::kF32, 6), rest(n * rows, DType::kF32, 7);
  y.poison();
  LinearArgs args;
  args.parts[0] = m.gate;
  args.parts[0].bias = bias.floats();
  args.parts[0].y = y.floats();
  args.parts[1] = m.up;
  args.parts[1].y = rest.floats();
  args.n_parts = gated ? 2 : 1;
  args.gated = gated;
  args.cols = cols;
  args.x = x.floats();
  args.n = n;
  args.norm = norm.floats();
  args.eps = 1e-2f;
  run(args);
  y.download();
  for (int32_t i = 0; i < n; i++) {
    double squares = 0;
    for (int64_t j = 0; j < cols; j++) squares += double{x[i * cols + j]} * x[i * cols + j];
    const double scale = 1 / std::sqrt(squares / static_cast<double>(cols) + 1e-2);
    for (int64_t row = 0; row < rows; row++) {
      double g = bias[row], u = 0, g_size = 1, u_size = 1;
      for (int64_t j = 0; j < cols; j++) {
        const double value = x[i * cols + j] * scale * norm[j];
        g += value * m.gate_weight(row, j);
        u += value * m.up_weight(row, j);
        g_size += std::fabs(value) * m.gate_size(row, j);
        u_size += std::fabs(value) * m.up_size(row, j);
      }
      const double silu = g / (1 + std::exp(-g));
      const double want = gated ? silu * u : g;
      // SiLU's slope is below 1.1.
      const double size =
          gated ? 1.1 * g_size * std::fabs(u) + u_size * std::fabs(silu) + std::fabs(want) : g_size;
      ASSERT_NEAR(y[i * rows + row], want, error * (1 + size))
          << "row " << row << " of batch row " << i;
    }
  }
}

}  // namespace mustafar::cuda
