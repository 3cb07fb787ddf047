// The cuBLASLt loader and its argument order, on a library that computes on the host.
#include "cuda/cublaslt.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "mustafar/error.h"

namespace mustafar::cuda {
namespace {

class CublasLtLoader : public ::testing::Test {
 protected:
  void SetUp() override { choose(MUSTAFAR_FAKE_CUBLASLT); }
  void TearDown() override {
    unsetenv("FAKE_CUBLASLT_BROKEN");
    choose("off");
  }
  static void choose(const char* file) { setenv("MUSTAFAR_CUBLASLT", file, 1); }
  static std::string refusal() {
    try {
      CublasLt::open();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }
};

TEST_F(CublasLtLoader, OpensTheChosenFile) {
  const auto library = CublasLt::open();
  ASSERT_NE(library, nullptr);
  EXPECT_EQ(library->version(), "13.2.5");
}

TEST_F(CublasLtLoader, OffOpensNone) {
  choose("off");
  EXPECT_EQ(CublasLt::open(), nullptr);
}

TEST_F(CublasLtLoader, AChosenFileThatCannotBeUsedIsAnError) {
  choose("/nowhere/libcublasLt.so");
  EXPECT_NE(refusal().find("/nowhere/libcublasLt.so"), std::string::npos) << refusal();
  choose("libm.so.6");
  EXPECT_NE(refusal().find("libm.so.6 lacks a function"), std::string::npos) << refusal();
  choose(MUSTAFAR_FAKE_CUBLASLT);
  setenv("FAKE_CUBLASLT_BROKEN", "1", 1);
  EXPECT_NE(refusal().find("cublasLtCreate failed with status 1"), std::string::npos) << refusal();
}

TEST_F(CublasLtLoader, MultipliesByTheTransposedWeights) {
  const auto library = CublasLt::open();
  ASSERT_NE(library, nullptr);
  constexpr int64_t kRows = 5, kCols = 6, kStride = 9;
  constexpr int32_t kN = 3;
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const bool accumulate : {false, true}) {
      std::vector<uint16_t> weights(kRows * kCols), x(kN * kCols);
      for (size_t i = 0; i < weights.size(); i++) {
        store_float(weights.data(), dtype, static_cast<int64_t>(i), static_cast<float>(i % 7) - 3);
      }
      for (size_t i = 0; i < x.size(); i++) {
        store_float(x.data(), dtype, static_cast<int64_t>(i), static_cast<float>(i % 5) - 2);
      }
      // Without accumulation what y holds must not matter.
      const float before = accumulate ? 10.0f : std::numeric_limits<float>::quiet_NaN();
      std::vector<float> y(kN * kStride, before);
      LinearPart part;
      part.weights = weights.data();
      part.dtype = dtype;
      part.rows = kRows;
      part.y = y.data();
      part.y_stride = kStride;
      part.accumulate = accumulate;
      ASSERT_TRUE(library->multiply(part, x.data(), kN, kCols, nullptr, 0, nullptr));
      for (int32_t n = 0; n < kN; n++) {
        for (int64_t row = 0; row < kRows; row++) {
          float expected = accumulate ? 10.0f : 0.0f;
          for (int64_t d = 0; d < kCols; d++) {
            expected += load_float(weights.data(), dtype, row * kCols + d) *
                        load_float(x.data(), dtype, n * kCols + d);
          }
          EXPECT_EQ(y[n * kStride + row], expected) << n << ", " << row;
        }
        const float untouched = y[n * kStride + kRows];  // beyond the part's rows
        EXPECT_TRUE(accumulate ? untouched == 10.0f : std::isnan(untouched));
      }
    }
  }
}

TEST_F(CublasLtLoader, AShapeWithoutAKernelIsLeftToTheCaller) {
  const auto library = CublasLt::open();
  ASSERT_NE(library, nullptr);
  std::vector<uint16_t> weights(7 * 4), x(4);
  std::vector<float> y(7);
  LinearPart part;
  part.weights = weights.data();
  part.dtype = DType::kF16;
  part.rows = 7;
  part.y = y.data();
  part.y_stride = 7;
  EXPECT_FALSE(library->multiply(part, x.data(), 1, 4, nullptr, 0, nullptr));
}

}  // namespace
}  // namespace mustafar::cuda
