// Matrix products and the small operations against plain references.
#include "cuda/linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "cuda/elementwise.h"
#include "device_memory.h"
#include "kv_test_util.h"

namespace mustafar::cuda {
namespace {

using testing::random_normal;
using testing::rounded;

constexpr DType kF32 = DType::kF32, kF16 = DType::kF16, kBF16 = DType::kBF16;

// Random numbers of any type on the device, with a mirror to read.
class Values : public DeviceMemory {
 public:
  Values(int64_t count, DType dtype, uint32_t seed, float scale = 1.0f)
      : DeviceMemory(dtype_bytes(dtype, count), "values"), dtype_(dtype) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < count; i++) {
      store_float(host(), dtype, i, random_normal(random) * scale);
    }
    upload();
  }
  float operator[](int64_t i) const { return load_float(host(), dtype_, i); }
  float* floats() { return reinterpret_cast<float*>(device()); }

 private:
  DType dtype_;
};

struct Shape {
  DType dtype;
  int32_t n;
  int64_t rows, second_rows, cols;
  bool accumulate, bias;
};

// Two matrices in one call. Relative error of every sum against double precision; x rounded to the
// weights' type where the kernel does that.
void check_linear(const Shape& s, bool tensor_cores) {
  Values w0(s.rows * s.cols, s.dtype, 1), w1(s.second_rows * s.cols, s.dtype, 2);
  Values x(s.n * s.cols, kF32, 3), bias(s.rows, kF32, 4);
  Values y0(s.n * s.rows, kF32, 5), y1(s.n * s.second_rows, kF32, 6);
  const Values before(s.n * s.rows, kF32, 5);
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
  if (tensor_cores) {
    ASSERT_TRUE(gemm_takes(args));
    Values packed(s.n * s.cols, s.dtype, 7);
    gemm(args, packed.device(), nullptr);
  } else {
    gemv(args, nullptr);
  }
  y0.download();
  y1.download();
  for (int part = 0; part < 2; part++) {
    const Values& w = part == 0 ? w0 : w1;
    const Values& y = part == 0 ? y0 : y1;
    const int64_t rows = part == 0 ? s.rows : s.second_rows;
    for (int32_t i = 0; i < s.n; i++) {
      for (int64_t row = 0; row < rows; row++) {
        double want = 0, size = 1;
        for (int64_t j = 0; j < s.cols; j++) {
          const float value =
              tensor_cores ? rounded(x[i * s.cols + j], s.dtype) : x[i * s.cols + j];
          want += double{value} * w[row * s.cols + j];
          size += std::fabs(double{value} * w[row * s.cols + j]);
        }
        if (part == 0 && s.bias) want += bias[row];
        if (part == 0 && s.accumulate) want += before[i * rows + row];
        ASSERT_NEAR(y[i * rows + row], want, 1e-6 * size)
            << "part " << part << " row " << row << " of batch row " << i;
      }
    }
  }
}

TEST(Gemv, EqualsThePlainProduct) {
  check_linear({kF32, 1, 37, 5, 64, false, true}, false);
  check_linear({kF32, 3, 16, 17, 43, true, false}, false);  // columns that fill no vector
  check_linear({kF16, 11, 18, 3, 72, false, true}, false);  // two passes
  check_linear({kBF16, 8, 9, 33, 264, true, true}, false);
  check_linear({kBF16, 2, 4, 4, 84, false, false}, false);
}

TEST(Gemv, ARowDoesNotDependOnTheBatch) {
  const int64_t rows = 24, cols = 200;
  Values w(rows * cols, kF32, 1), x(9 * cols, kF32, 2), alone(rows, kF32, 3),
      all(9 * rows, kF32, 4);
  LinearArgs args;
  args.parts[0] = {w.device(), kF32, rows, nullptr, all.floats(), rows, false};
  args.n_parts = 1;
  args.cols = cols;
  args.x = x.floats();
  args.n = 9;
  gemv(args, nullptr);
  all.download();
  for (const int i : {0, 6, 8}) {
    args.n = 1;
    args.x = x.floats() + i * cols;
    args.parts[0].y = alone.floats();
    gemv(args, nullptr);
    alone.download();
    EXPECT_EQ(std::memcmp(alone.host(), all.host() + i * rows * 4, rows * 4), 0) << i;
  }
}

// RMSNorm before and SiLU after, in one launch.
void check_fused(DType dtype, int32_t n, int64_t rows, int64_t cols, bool gated) {
  Values gate(rows * cols, dtype, 1, 0.3f), up(rows * cols, dtype, 2, 0.3f);
  Values x(n * cols, kF32, 3), norm(cols, kF32, 4), bias(rows, kF32, 5);
  Values y(n * rows, kF32, 6), rest(n * rows, kF32, 7);
  y.poison();
  LinearArgs args;
  args.parts[0] = {gate.device(), dtype, rows, bias.floats(), y.floats(), rows, false};
  args.parts[1] = {up.device(), dtype, rows, nullptr, rest.floats(), rows, false};
  args.n_parts = gated ? 2 : 1;
  args.gated = gated;
  args.cols = cols;
  args.x = x.floats();
  args.n = n;
  args.norm = norm.floats();
  args.eps = 1e-2f;
  gemv(args, nullptr);
  y.download();
  for (int32_t i = 0; i < n; i++) {
    double squares = 0;
    for (int64_t j = 0; j < cols; j++) squares += double{x[i * cols + j]} * x[i * cols + j];
    const double scale = 1 / std::sqrt(squares / static_cast<double>(cols) + 1e-2);
    for (int64_t row = 0; row < rows; row++) {
      double g = bias[row], u = 0;
      for (int64_t j = 0; j < cols; j++) {
        const double value = x[i * cols + j] * scale * norm[j];
        g += value * gate[row * cols + j];
        u += value * up[row * cols + j];
      }
      const double want = gated ? g / (1 + std::exp(-g)) * u : g;
      ASSERT_NEAR(y[i * rows + row], want, 1e-5 * (1 + std::fabs(want)) * (1 + std::fabs(u)))
          << "row " << row << " of batch row " << i;
    }
  }
}

TEST(Gemv, NormAndGateInPassing) {
  check_fused(kBF16, 1, 18, 264, true);
  check_fused(kF16, 5, 7, 72, true);
  check_fused(kF32, 2, 9, 43, true);  // columns that fill no vector, half a group
  check_fused(kBF16, 11, 33, 520, false);
  check_fused(kF32, 1, 5, 2100, false);
}

TEST(Gemm, EqualsThePlainProduct) {
  check_linear({kF16, 70, 65, 3, 72, false, true}, true);
  check_linear({kBF16, 64, 64, 40, 64, true, false}, true);
  check_linear({kBF16, 2, 130, 8, 8, false, true}, true);
}

TEST(Gemm, RefusesWhatItCannotTake) {
  Values w(64, kF32, 1);
  LinearArgs args;
  args.n_parts = 1;
  args.cols = 12;
  args.parts[0].weights = w.device();
  args.parts[0].dtype = kBF16;
  EXPECT_FALSE(gemm_takes(args));
  args.cols = 16;
  EXPECT_TRUE(gemm_takes(args));
  args.parts[0].dtype = kF32;
  EXPECT_FALSE(gemm_takes(args));
}

TEST(Elementwise, RmsNormOfChosenRows) {
  const int64_t hidden = 300;
  Values x(5 * hidden, kF32, 1), weight(hidden, kF32, 2), out(2 * hidden, kF32, 3);
  const std::vector<int32_t> rows = {4, 1};
  const DeviceArray<int32_t> rows_copy(rows);
  rms_norm(x.floats(), rows_copy.device(), weight.floats(), 1e-5f, 2, hidden, out.floats(),
           nullptr);
  out.download();
  for (int i = 0; i < 2; i++) {
    double squares = 0;
    for (int64_t j = 0; j < hidden; j++)
      squares += double{x[rows[i] * hidden + j]} * x[rows[i] * hidden + j];
    for (int64_t j = 0; j < hidden; j++) {
      const double want = x[rows[i] * hidden + j] / std::sqrt(squares / hidden + 1e-5) * weight[j];
      ASSERT_NEAR(out[i * hidden + j], want, 1e-5);
    }
  }
}

TEST(Elementwise, EmbedAndSilu) {
  Values table(7 * 50, kBF16, 1), out(2 * 50, kF32, 2);
  const std::vector<int32_t> ids = {6, 2};
  const DeviceArray<int32_t> ids_copy(ids);
  embed(table.device(), kBF16, ids_copy.device(), 2, 50, out.floats(), nullptr);
  out.download();
  for (int i = 0; i < 100; i++) ASSERT_EQ(out[i], table[ids[i / 50] * 50 + i % 50]);

  Values gate(300, kF32, 3, 3.0f), up(300, kF32, 4);
  const Values before(300, kF32, 3, 3.0f);
  silu_multiply(gate.floats(), up.floats(), 300, nullptr);
  gate.download();
  for (int i = 0; i < 300; i++) {
    ASSERT_NEAR(gate[i], before[i] / (1 + std::exp(-double{before[i]})) * up[i], 1e-5);
  }
}

}  // namespace
}  // namespace mustafar::cuda
