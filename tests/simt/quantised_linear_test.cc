// Products with matrices of codes against double precision over the weights that they stand for.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cuda/linear.h"
#include "linear_fixture.h"
#include "support/code_matrix.h"

namespace mustafar::cuda {
namespace {

using testing::CodeMatrix;

// Random codes, on the device too.
class DeviceCodes : public CodeMatrix {
 public:
  explicit DeviceCodes(const QuantisedShape& shape)
      : CodeMatrix(shape), memory_(shape.bytes(), "codes") {
    std::memcpy(memory_.host(), memory.data(), memory.size());
    memory_.upload();
  }
  LinearPart part(float* y, const float* bias = nullptr, bool accumulate = false) const {
    return part_of(Matrix::of(shape, memory_.device()), bias, y, accumulate);
  }
  float weight(int64_t row, int64_t col) const { return weights[row * shape.cols + col]; }
  // Of what a kernel adds up for a weight: with minimums it is the sum of two products.
  double size(int64_t row, int64_t col) const {
    if (shape.offset != Offset::kMinimums) return std::fabs(weight(row, col));
    const double minimum = load_float(matrix.offsets, shape.scale_dtype, scale_at(shape, row, col));
    return std::fabs(minimum) + std::fabs(weight(row, col) - minimum);
  }

 private:
  DeviceMemory memory_;
};

struct Product {
  QuantisedShape codes;
  int64_t second_rows;
  int32_t n;
  bool accumulate, bias;
};

std::string name_of(const ::testing::TestParamInfo<Product>& info) {
  const Product& p = info.param;
  const char* offsets[] = {"", "_zeros", "_minimums"};
  return std::string(dtype_name(p.codes.dtype)) + "_" + std::to_string(p.codes.group) +
         offsets[static_cast<int>(p.codes.offset)] + "_" + dtype_name(p.codes.scale_dtype) + "_" +
         std::to_string(p.n) + "x" + std::to_string(p.codes.rows) + "x" +
         std::to_string(p.codes.cols) + (p.accumulate ? "_add" : "") + (p.bias ? "_bias" : "");
}

// x as the sum of two terms of 8 bits each comes within 2^-17 of it.
constexpr double kTwoTerms = 4e-6;

void check_product(const Product& p, void (*run)(const LinearArgs&, Stream)) {
  QuantisedShape second = p.codes;  // of the same launch, with scales of its own
  second.rows = p.second_rows;
  second.group = 64;
  const DeviceCodes w0(p.codes), w1(second);
  const int64_t rows = p.codes.rows, cols = p.codes.cols;
  Values x(p.n * cols, DType::kF32, 3), bias(rows, DType::kF32, 4);
  Values y0(p.n * rows, DType::kF32, 5), y1(p.n * second.rows, DType::kF32, 6);
  const Values before(p.n * rows, DType::kF32, 5);
  if (!p.accumulate) y0.poison();
  y1.poison();
  LinearArgs args;
  args.parts[0] = w0.part(y0.floats(), p.bias ? bias.floats() : nullptr, p.accumulate);
  args.parts[1] = w1.part(y1.floats());
  args.n_parts = 2;
  args.cols = cols;
  args.x = x.floats();
  args.n = p.n;
  run(args, nullptr);
  y0.download();
  y1.download();
  for (const bool first : {true, false}) {
    const DeviceCodes& w = first ? w0 : w1;
    for (int64_t row = 0; row < w.shape.rows; row++) {
      for (int32_t i = 0; i < p.n; i++) {
        double want = 0, size = 0;
        for (int64_t j = 0; j < cols; j++) {
          want += double{x[i * cols + j]} * w.weight(row, j);
          size += std::fabs(x[i * cols + j]) * w.size(row, j);
        }
        if (first && p.bias) want += bias[row];
        if (first && p.accumulate) want += before[i * rows + row];
        ASSERT_NEAR((first ? y0 : y1)[i * w.shape.rows + row], want, kTwoTerms * size + 1e-6)
            << (first ? "first" : "second") << " row " << row << " of batch row " << i;
      }
    }
  }
}

void multiply_codes(const LinearArgs& args, Stream stream) {
  ASSERT_TRUE(gemm_quantised_takes(args));
  DeviceMemory scratch(gemm_quantised_scratch_bytes(args), "scratch");
  gemm_quantised(args, scratch.device(), stream);
  scratch.download();  // finds writes around it
}

class QuantisedGemvTest : public ::testing::TestWithParam<Product> {};

TEST_P(QuantisedGemvTest, EqualsTheProductWithItsWeights) { check_product(GetParam(), gemv); }

TEST_P(QuantisedGemvTest, PlainEqualsTheProductWithItsWeights) {
  check_product(GetParam(), gemv_codes_plain);
}

// Rows of both matrices of a launch, columns.
struct Size {
  int64_t rows, second_rows, cols;
};

// Every kind of codes with each of the sizes, in turn with groups and numbers of rows of x. step:
// turns that are left out after a kind, for other pairs of those with the next one.
std::vector<Product> every_kind(std::span<const Size> sizes, std::span<const int32_t> batches,
                                int step) {
  std::vector<Product> all;
  size_t turn = 0;
  for (const DType dtype : {DType::kInt4, DType::kInt8}) {
    for (const Offset offset : {Offset::kNone, Offset::kZeros, Offset::kMinimums}) {
      for (const DType scale : {DType::kF16, DType::kBF16, DType::kF32}) {
        if (offset == Offset::kMinimums && scale == DType::kF32) continue;
        for (const Size& size : sizes) {
          const int32_t groups[] = {32, 64, 96, 128,
                                    static_cast<int32_t>((size.cols + 31) / 32 * 32)};
          all.push_back({{dtype, scale, offset, groups[turn % 5], size.rows, size.cols},
                         size.second_rows,
                         batches[turn % batches.size()],
                         turn % 2 == 0,
                         turn % 3 == 0});
          turn++;
        }
        turn += step;
      }
    }
  }
  return all;
}

std::vector<Product> products() {
  // Tiles that are not full, odd numbers of tiles; pieces that are not full, columns that fill no
  // vector.
  const Size sizes[] = {{1, 16, 1}, {19, 40, 33}, {33, 5, 100}, {64, 1, 300}, {48, 17, 1060}};
  const int32_t batches[] = {1, 3, 8, 9, 16, 17, 2, 33};
  std::vector<Product> all = every_kind(sizes, batches, 2);
  for (const DType dtype : {DType::kInt4, DType::kInt8}) {
    for (const Offset offset : {Offset::kNone, Offset::kZeros, Offset::kMinimums}) {
      // More columns than a block holds of x at once, or than a turn has; several groups a block.
      all.push_back({{dtype, DType::kF16, offset, 64, 80, 2112}, 130, 7, true, false});
      all.push_back({{dtype, DType::kBF16, offset, 128, 70, 6300}, 16, 3, false, true});
      all.push_back({{dtype, DType::kF16, offset, 32, 90, 4100}, 40, 1, false, false});
#if !defined(MUSTAFAR_SIMT)  // as models have them
      all.push_back({{dtype, DType::kF16, offset, 128, 4096, 4096}, 1024, 1, false, false});
      all.push_back({{dtype, DType::kBF16, offset, 32, 512, 14336}, 64, 8, true, false});
      all.push_back({{dtype, DType::kF16, offset, 64, 1024, 2048}, 512, 16, false, true});
#endif
    }
  }
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, QuantisedGemvTest, ::testing::ValuesIn(products()), name_of);

class QuantisedGemmTest : public ::testing::TestWithParam<Product> {};

TEST_P(QuantisedGemmTest, EqualsTheProductWithItsWeights) {
  check_product(GetParam(), multiply_codes);
}

std::vector<Product> gemm_products() {
  // Tiles, groups of tiles and blocks of those that are not full; pieces and stages that are not.
  const Size sizes[] = {{1, 16, 28},  {19, 40, 36},    {33, 5, 164},
                        {64, 1, 512}, {300, 290, 260}, {48, 17, 1060}};
  const int32_t batches[] = {9, 16, 17, 33, 64, 32, 1, 70};
  std::vector<Product> all = every_kind(sizes, batches, 1);
#if !defined(MUSTAFAR_SIMT)  // as many columns as models have
  for (const DType dtype : {DType::kInt4, DType::kInt8}) {
    all.push_back({{dtype, DType::kF16, Offset::kMinimums, 32, 512, 4096}, 64, 16, false, false});
    all.push_back({{dtype, DType::kBF16, Offset::kMinimums, 128, 64, 14336}, 32, 33, true, false});
  }
#endif
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, QuantisedGemmTest, ::testing::ValuesIn(gemm_products()), name_of);

TEST(QuantisedGemm, ARowDoesNotDependOnTheBatch) {
  constexpr int32_t kMost = 70;
  const int64_t rows = 600, cols = 1060;
  const DeviceCodes w({DType::kInt4, DType::kF16, Offset::kMinimums, 32, rows, cols});
  Values x(kMost * cols, DType::kF32, 2), norm(cols, DType::kF32, 3);
  Values few(kMost * rows, DType::kF32, 4), all(kMost * rows, DType::kF32, 5);
  LinearArgs args;
  args.parts[0] = w.part(all.floats());
  args.n_parts = 1;
  args.cols = cols;
  args.x = x.floats();
  args.norm = norm.floats();
  args.eps = 1e-5f;
  args.n = kMost;
  multiply_codes(args, nullptr);
  all.download();
  for (const int32_t n : {9, 17, 33}) {
    const int64_t first = kMost - n;
    args.n = n;
    args.x = x.floats() + first * cols;
    args.parts[0].y = few.floats();
    multiply_codes(args, nullptr);
    few.download();
    EXPECT_EQ(std::memcmp(few.host(), all.host() + first * rows * 4, n * rows * 4), 0) << n;
  }
}

TEST(QuantisedGemm, RefusesWhatItsLoadsDoNotTake) {
  const DeviceCodes w({DType::kInt4, DType::kF16, Offset::kNone, 32, 16, 34});
  Values x(9 * 34, DType::kF32, 1);
  LinearArgs args;
  args.parts[0] = w.part(nullptr);
  args.n_parts = 1;
  args.cols = 34;
  args.x = x.floats();
  args.n = 9;
  EXPECT_FALSE(gemm_quantised_takes(args));
}

// Also where a block holds all of one row of x, but a part of many.
TEST(QuantisedGemv, ARowDoesNotDependOnTheBatch) {
  for (const int64_t cols : {1100, 6400}) {
    const int64_t rows = 40;
    const DeviceCodes w({DType::kInt4, DType::kF16, Offset::kMinimums, 32, rows, cols});
    Values x(16 * cols, DType::kF32, 2), norm(cols, DType::kF32, 3);
    Values alone(rows, DType::kF32, 4), all(16 * rows, DType::kF32, 5);
    LinearArgs args;
    args.parts[0] = w.part(all.floats());
    args.n_parts = 1;
    args.cols = cols;
    args.x = x.floats();
    args.norm = norm.floats();
    args.eps = 1e-5f;
    args.n = 16;
    gemv(args, nullptr);
    all.download();
    args.n = 1;
    for (const int i : {0, 6, 15}) {
      args.x = x.floats() + i * cols;
      args.parts[0].y = alone.floats();
      gemv(args, nullptr);
      alone.download();
      EXPECT_EQ(std::memcmp(alone.host(), all.host() + i * rows * 4, rows * 4), 0)
          << i << " of " << cols << " columns";
    }
  }
}

void check_fused_codes(const QuantisedShape& shape, int32_t n, bool gated,
                       void (*run)(const LinearArgs&, Stream)) {
  const DeviceCodes gate(shape), up(shape);
  const auto weight_of = [](const DeviceCodes& w) {
    return [&w](int64_t row, int64_t col) { return double{w.weight(row, col)}; };
  };
  const auto size_of = [](const DeviceCodes& w) {
    return [&w](int64_t row, int64_t col) { return w.size(row, col); };
  };
  check_fused({gate.part(nullptr), up.part(nullptr), shape.cols, weight_of(gate), weight_of(up),
               size_of(gate), size_of(up)},
              n, gated, kTwoTerms, [run](const LinearArgs& args) { run(args, nullptr); });
}

TEST(QuantisedGemv, NormAndGateInPassing) {
  for (const auto run : {gemv, gemv_codes_plain}) {
    check_fused_codes({DType::kInt4, DType::kF16, Offset::kMinimums, 32, 50, 264}, 1, true, run);
    check_fused_codes({DType::kInt4, DType::kF16, Offset::kNone, 64, 18, 1028}, 5, true, run);
    check_fused_codes({DType::kInt8, DType::kBF16, Offset::kZeros, 128, 7, 72}, 11, true, run);
    check_fused_codes({DType::kInt8, DType::kF32, Offset::kNone, 64, 33, 520}, 16, false, run);
    check_fused_codes({DType::kInt8, DType::kF16, Offset::kNone, 64, 20, 75}, 2, true, run);
    check_fused_codes({DType::kInt4, DType::kF16, Offset::kMinimums, 32, 70, 2080}, 6, true, run);
  }
}

TEST(QuantisedGemm, NormAndGateInPassing) {
  struct Case {
    QuantisedShape shape;
    int32_t n;
    bool gated;
  };
  for (const Case& c : {Case{{DType::kInt4, DType::kF16, Offset::kMinimums, 32, 50, 264}, 9, true},
                        Case{{DType::kInt4, DType::kF16, Offset::kNone, 64, 18, 1028}, 17, true},
                        Case{{DType::kInt8, DType::kBF16, Offset::kZeros, 128, 7, 72}, 11, true},
                        Case{{DType::kInt8, DType::kF32, Offset::kNone, 64, 33, 520}, 40, false},
                        Case{{DType::kInt8, DType::kF16, Offset::kNone, 64, 300, 140}, 66, true}}) {
    check_fused_codes(c.shape, c.n, c.gated, multiply_codes);
  }
}

TEST(QuantisedGemv, RefusesMatricesThatAreNotAlike) {
  const DeviceCodes w0({DType::kInt4, DType::kF16, Offset::kNone, 32, 16, 32});
  const DeviceCodes w1({DType::kInt4, DType::kF16, Offset::kZeros, 32, 16, 32});
  Values x(32, DType::kF32, 1), y(32, DType::kF32, 2);
  LinearArgs args;
  args.parts[0] = w0.part(y.floats());
  args.parts[1] = w1.part(y.floats() + 16);
  args.n_parts = 2;
  args.cols = 32;
  args.x = x.floats();
  args.n = 1;
  EXPECT_THROW(gemv(args, nullptr), Error);
}

TEST(ExpandCodes, GivesTheWeightsRoundedOnce) {
  for (const Product& p : products()) {
    if (p.n > 3) continue;  // each type and size once
    const DeviceCodes w(p.codes);
    const int64_t first = p.codes.rows > kTileRows ? kTileRows : 0;
    const int64_t rows = p.codes.rows - first, cols = p.codes.cols;
    for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
      DeviceMemory out(dtype_bytes(dtype, rows * cols), "values");
      expand_codes(w.part(nullptr), cols, first, rows, dtype, out.device(), nullptr);
      out.download();
      for (int64_t i = 0; i < rows * cols; i++) {
        ASSERT_EQ(load_float(out.host(), dtype, i),
                  testing::rounded(w.weights[first * cols + i], dtype))
            << w.name() << " " << i;
      }
    }
  }
}

TEST(ExpandCodes, EmbedsRows) {
  for (const Product& p : products()) {
    if (p.n > 3) continue;
    const DeviceCodes w(p.codes);
    const int64_t cols = p.codes.cols;
    const int32_t rows[] = {static_cast<int32_t>(p.codes.rows - 1), 0,
                            static_cast<int32_t>(p.codes.rows / 2)};
    DeviceMemory ids(sizeof rows, "ids");
    std::memcpy(ids.host(), rows, sizeof rows);
    ids.upload();
    Values out(3 * cols, DType::kF32, 1);
    out.poison();
    embed_codes(w.part(nullptr), reinterpret_cast<const int32_t*>(ids.device()), 3, cols,
                out.floats(), nullptr);
    out.download();
    for (int64_t i = 0; i < 3 * cols; i++) {
      ASSERT_EQ(out[i], w.weight(rows[i / cols], i % cols)) << w.name() << " " << i;
    }
  }
}

}  // namespace
}  // namespace mustafar::cuda
