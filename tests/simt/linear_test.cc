// Matrix products of ours against plain references.
#include "cuda/linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "linear_fixture.h"

namespace mustafar::cuda {
namespace {

constexpr DType kF32 = DType::kF32, kF16 = DType::kF16, kBF16 = DType::kBF16;

void check_gemv(const LinearShape& shape) {
  check_linear(shape, false, 1e-6, [](const LinearArgs& args) { gemv(args, nullptr); });
}

void check_gemm(const LinearShape& shape) {
  check_linear(shape, true, kTensorCoreError, [&](const LinearArgs& args) {
    ASSERT_TRUE(gemm_takes(args));
    DeviceMemory packed(dtype_bytes(shape.dtype, shape.n * shape.cols), "packed x");
    round_to(shape.dtype, args.x, shape.n * shape.cols, packed.device(), nullptr);
    LinearArgs rounded = args;
    rounded.rounded = packed.device();
    gemm(rounded, nullptr);
    packed.download();
  });
}

std::string name_of_shape(const ::testing::TestParamInfo<LinearShape>& info) {
  return name_of(info.param);
}

class GemvTest : public ::testing::TestWithParam<LinearShape> {};

TEST_P(GemvTest, EqualsThePlainProduct) { check_gemv(GetParam()); }

INSTANTIATE_TEST_SUITE_P(Shapes, GemvTest,
                         ::testing::Values(LinearShape{kF32, 1, 37, 5, 64, false, true},
                                           // Columns that fill no vector.
                                           LinearShape{kF32, 3, 16, 17, 43, true, false},
                                           // Two tiles of rows of x.
                                           LinearShape{kF16, 11, 18, 3, 72, false, true},
                                           LinearShape{kBF16, 8, 9, 33, 264, true, true},
                                           LinearShape{kBF16, 2, 4, 4, 84, false, false}),
                         name_of_shape);

// Every number of rows that a pass takes, of every type, and one more.
std::vector<LinearShape> every_batch() {
  std::vector<LinearShape> shapes;
  for (const DType dtype : {kF32, kF16, kBF16}) {
    for (int32_t n = 1; n <= kGemvRows + 1; n++) {
      shapes.push_back({dtype, n, 13, 6, n % 3 == 0 ? 200 : 520, n % 2 == 0, n % 4 == 1});
    }
  }
  return shapes;
}
INSTANTIATE_TEST_SUITE_P(Batches, GemvTest, ::testing::ValuesIn(every_batch()), name_of_shape);

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

void check_fused_values(DType dtype, int32_t n, int64_t rows, int64_t cols, bool gated) {
  Values gate(rows * cols, dtype, 1, 0.3f), up(rows * cols, dtype, 2, 0.3f);
  const auto weight_of = [cols](const Values& w) {
    return [&w, cols](int64_t row, int64_t col) { return double{w[row * cols + col]}; };
  };
  const auto size_of = [cols](const Values& w) {
    return [&w, cols](int64_t row, int64_t col) { return std::fabs(double{w[row * cols + col]}); };
  };
  const auto part_of = [rows, dtype](Values& w) {
    return LinearPart{w.device(), dtype, rows, nullptr, nullptr, rows, false};
  };
  check_fused({part_of(gate), part_of(up), cols, weight_of(gate), weight_of(up), size_of(gate),
               size_of(up)},
              n, gated, 1e-6, [](const LinearArgs& args) { gemv(args, nullptr); });
}

TEST(Gemv, NormAndGateInPassing) {
  check_fused_values(kBF16, 1, 18, 264, true);
  check_fused_values(kF16, 5, 7, 72, true);
  check_fused_values(kF32, 2, 9, 43, true);  // columns that fill no vector, half a group
  check_fused_values(kBF16, 11, 33, 520, false);
  check_fused_values(kF32, 1, 5, 2100, false);
  if (kOnDevice) check_fused_values(kBF16, 1, 2000, 4096, true);
}

class GemmTest : public ::testing::TestWithParam<LinearShape> {};

TEST_P(GemmTest, EqualsThePlainProduct) { check_gemm(GetParam()); }

INSTANTIATE_TEST_SUITE_P(Shapes, GemmTest,
                         ::testing::Values(LinearShape{kF16, 70, 65, 3, 72, false, true},
                                           LinearShape{kBF16, 64, 64, 40, 64, true, false},
                                           LinearShape{kBF16, 2, 130, 8, 8, false, true},
                                           LinearShape{kF16, 33, 20, 70, 136, true, true}),
                         name_of_shape);

#if !defined(MUSTAFAR_SIMT)
// Shapes as models have them: long columns, and more blocks than multiprocessors.
INSTANTIATE_TEST_SUITE_P(Large, GemvTest,
                         ::testing::Values(LinearShape{kBF16, 1, 4096, 1024, 4096, true, false},
                                           LinearShape{kBF16, 8, 512, 64, 14336, true, false},
                                           LinearShape{kF16, 5, 512, 512, 4096, false, true},
                                           LinearShape{kF32, 4, 300, 100, 2048, false, true}),
                         name_of_shape);
INSTANTIATE_TEST_SUITE_P(Large, GemmTest,
                         ::testing::Values(LinearShape{kBF16, 200, 260, 72, 4096, true, false},
                                           LinearShape{kF16, 513, 260, 8, 2048, false, true},
                                           LinearShape{kBF16, 16, 300, 100, 14336, false, true}),
                         name_of_shape);
#endif

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

TEST(Linear, RoundsAndAddsBias) {
  for (const DType dtype : {kF16, kBF16}) {
    Values x(777, kF32, 1, 3.0f);
    DeviceMemory packed(dtype_bytes(dtype, 777), "packed");
    round_to(dtype, x.floats(), 777, packed.device(), nullptr);
    packed.download();
    for (int i = 0; i < 777; i++) {
      ASSERT_EQ(load_float(packed.host(), dtype, i), testing::rounded(x[i], dtype)) << i;
    }
  }
  Values bias(300, kF32, 2), y(3 * 310, kF32, 3);
  const Values before(3 * 310, kF32, 3);
  add_bias(bias.floats(), 300, 3, y.floats(), 310, nullptr);
  y.download();
  for (int i = 0; i < 3 * 310; i++) {
    ASSERT_EQ(y[i], i % 310 < 300 ? before[i] + bias[i % 310] : before[i]) << i;
  }
}

}  // namespace
}  // namespace mustafar::cuda
