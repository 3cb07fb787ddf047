// Quantised matrices on the CPU: every instruction set against the definition in
// format/quantised_matrix.h, read code by code.
#include "format/quantised_matrix.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/kernels.h"
#include "backend/cpu/linear/linear.h"
#include "support/code_matrix.h"

namespace mustafar {
namespace {

using testing::CodeMatrix;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<float> normal(int64_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> x(n);
  for (float& v : x) v = distribution(random);
  return x;
}

std::vector<QuantisedShape> shapes() {
  std::vector<QuantisedShape> all;
  const std::pair<int64_t, int64_t> sizes[] = {{1, 1}, {16, 32}, {19, 33}, {40, 100}, {33, 300}};
  const Offset offsets[] = {Offset::kNone, Offset::kZeros, Offset::kMinimums};
  for (const DType dtype : {DType::kInt8, DType::kInt4}) {
    int turn = 0;
    for (const auto& [rows, cols] : sizes) {
      for (const int32_t group : {32, 64, 128, 0}) {
        QuantisedShape shape;
        shape.dtype = dtype;
        shape.rows = rows;
        shape.cols = cols;
        shape.group = group > 0 ? group : static_cast<int32_t>(shape.inner());
        shape.offset = offsets[turn / 3 % 3];
        shape.scale_dtype = turn % 3 == 0   ? DType::kF16
                            : turn % 3 == 1 ? DType::kBF16
                                            : DType::kF32;
        if (shape.offset == Offset::kMinimums && shape.scale_dtype == DType::kF32) {
          shape.scale_dtype = DType::kF16;
        }
        all.push_back(shape);
        turn++;
      }
      turn++;
    }
  }
  return all;
}

std::string test_name(const ::testing::TestParamInfo<Isa>& info) { return isa_name(info.param); }

class QuantisedMatrix : public ::testing::TestWithParam<Isa> {
 protected:
  const Kernels kernels_ = select_kernels(GetParam());
  ThreadPool pool_{1};
  CpuWorkspace workspace_;
};

INSTANTIATE_TEST_SUITE_P(Isa, QuantisedMatrix, ::testing::ValuesIn(available_isas()), test_name);

TEST(QuantisedShape, CodesAreWhereTheyWerePut) {
  for (const QuantisedShape& shape : shapes()) {
    std::vector<uint8_t> memory(shape.bytes());
    const int32_t range = shape.dtype == DType::kInt4 ? 16 : 256;
    const auto code = [&](int64_t r, int64_t c) {
      return static_cast<int32_t>((r * 31 + c * 7) % range);
    };
    for (int64_t r = 0; r < shape.rows; r++) {
      for (int64_t c = 0; c < shape.cols; c++) set_code(shape, memory.data(), r, c, code(r, c));
    }
    for (int64_t r = 0; r < shape.rows; r++) {
      for (int64_t c = 0; c < shape.cols; c++) {
        ASSERT_EQ(code_at(shape, memory.data(), r, c), code(r, c)) << r << ", " << c;
      }
    }
    for (int64_t i = shape.scales_at(); i < shape.bytes(); i++) ASSERT_EQ(memory[i], 0);
  }
}

TEST_P(QuantisedMatrix, FloatActivations) {
  for (const QuantisedShape& shape : shapes()) {
    const CodeMatrix p(shape);
    const std::vector<float> bias = normal(shape.rows, 2);
    for (const int32_t batch : {1, 3, 9}) {
      const std::vector<float> x = normal(batch * shape.cols, 3);
      std::vector<float> y(batch * shape.rows, 0.5f);
      const LinearLayer layer{&p.matrix, bias.data(), y.data(), shape.rows, true};
      decode_linear(pool_, kernels_, {&layer, 1}, x.data(), shape.cols, batch,
                    /*int8_input=*/false, workspace_);
      for (int32_t b = 0; b < batch; b++) {
        for (int64_t r = 0; r < shape.rows; r++) {
          double sum = bias[r] + 0.5, size = 2;
          for (int64_t c = 0; c < shape.cols; c++) {
            const double term = double{p.weights[r * shape.cols + c]} * x[b * shape.cols + c];
            sum += term;
            size += std::abs(term);
          }
          ASSERT_NEAR(y[b * shape.rows + r], sum, 1e-6 * size) << p.name() << " row " << r;
        }
      }
    }
  }
}

// Rows x [batch][cols] rounded to integers, laid out as kernels take them.
struct Int8Rows {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  int32_t planes;

  Int8Rows(const Kernels& kernels, const std::vector<float>& x, int32_t batch,
           const QuantisedShape& shape)
      : codes(batch * shape.inner() * input_planes(shape.dtype)),
        scales(batch * shape.inner() / kInnerStep),
        sums(scales.size()),
        planes(input_planes(shape.dtype)) {
    for (int32_t b = 0; b < batch; b++) {
      const int32_t rows = input().rows(), first = b / rows * rows;
      kernels.quantise_input(x.data() + b * shape.cols, shape.cols, b - first,
                             std::min(rows, batch - first), input().block(first, shape.inner()));
    }
  }
  Int8Input input() { return {codes.data(), scales.data(), sums.data(), planes}; }

  // What kernels take many rows as; empty where they don't.
  HostBuffer tiles(const Kernels& kernels, int32_t batch, int64_t inner) {
    HostBuffer tiles;
    if (kernels.tile_int8_input == nullptr) return tiles;
    const int64_t bytes = kernels.int8_tiles_bytes(batch, inner, planes);
    tiles.ensure(bytes);
    if (bytes > 0) kernels.tile_int8_input(input(), batch, inner, tiles.data());
    return tiles;
  }
};

TEST_P(QuantisedMatrix, ActivationsAreRoundedInGroups) {
  for (const DType dtype : {DType::kInt8, DType::kInt4}) {
    QuantisedShape shape;
    shape.dtype = dtype;
    shape.cols = 100;
    const int32_t largest = dtype == DType::kInt8 ? Int8Input::kLargestOfTwo : 127;
    for (const int32_t batch : {1, 5, 11}) {
      std::vector<float> x = normal(batch * shape.cols, 4);
      std::fill_n(x.begin(), 32, 0.0f);
      Int8Rows rows(kernels_, x, batch, shape);
      for (int32_t b = 0; b < batch; b++) {
        const int32_t first = b / rows.input().rows() * rows.input().rows();
        const int32_t n = std::min(rows.input().rows(), batch - first);
        const Int8Input block = rows.input().block(first, shape.inner());
        for (int64_t group = 0; group < shape.inner() / kInnerStep; group++) {
          const float scale = block.scales[group * n + b - first];
          int32_t sum = 0, most = 0;
          for (int64_t c = group * 32; c < group * 32 + 32; c++) {
            const int8_t* code = block.codes + (c / 4 * n + b - first) * 4 * block.planes + c % 4;
            const int32_t v = block.planes == 2 ? code[0] * 128 + code[4] : code[0];
            const float value = c < shape.cols ? x[b * shape.cols + c] : 0.0f;
            EXPECT_NEAR(scale * static_cast<float>(v), value, 0.502f * scale) << "input " << c;
            sum += v;
            most = std::max(most, std::abs(v));
          }
          EXPECT_EQ(block.sums[group * n + b - first], sum);
          EXPECT_EQ(most, b == 0 && group == 0 ? 0 : largest);
        }
      }
    }
  }
}

TEST_P(QuantisedMatrix, Int8ActivationsGiveTheBitsOfThePlainPath) {
  for (const QuantisedShape& shape : shapes()) {
    const CodeMatrix p(shape);
    const std::vector<float> bias = normal(shape.rows, 2);
    for (const int32_t batch : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 18, 31}) {
      const std::vector<float> x = normal(batch * shape.cols, 5);
      Int8Rows rows(kernels_, x, batch, shape);
      std::vector<float> y(batch * shape.rows, 0.5f), plain = y;
      QuantisedGemvArgs args;
      args.weights = &p.matrix;
      args.row1 = shape.rows;
      args.input = rows.input();
      args.batch = batch;
      args.bias = bias.data();
      args.y_stride = shape.rows;
      args.add = true;
      args.y = y.data();
      const HostBuffer tiles = rows.tiles(kernels_, batch, shape.inner());
      args.tiles = tiles.data();
      kernels_.gemv_int8_input(args);
      args.y = plain.data();
      gemv_int8_input_plain(args);
      ASSERT_EQ(std::memcmp(y.data(), plain.data(), y.size() * sizeof(float)), 0)
          << p.name() << " batch " << batch;
    }
  }
}

TEST_P(QuantisedMatrix, Int8ActivationsAreCloseAndDoNotDependOnTheBatchOrTasks) {
  ThreadPool pool(2);
  QuantisedShape shape;
  shape.rows = 100;
  shape.cols = 260;
  // The second, a prompt's, is more than is rounded at once.
  for (const auto& [dtype, batch] :
       {std::pair{DType::kInt8, 11}, {DType::kInt4, 11}, {DType::kInt4, 530}}) {
    shape.dtype = dtype;
    const CodeMatrix p(shape);
    const std::vector<float> x = normal(batch * shape.cols, 6);
    std::vector<float> y(batch * shape.rows, kNaN);
    const LinearLayer layer{&p.matrix, nullptr, y.data(), shape.rows, false};
    decode_linear(pool, kernels_, {&layer, 1}, x.data(), shape.cols, batch, true, workspace_);
    for (int32_t b = 0; b < batch; b++) {
      std::vector<float> one(shape.rows, kNaN);
      const LinearLayer alone{&p.matrix, nullptr, one.data(), shape.rows, false};
      decode_linear(pool_, kernels_, {&alone, 1}, x.data() + b * shape.cols, shape.cols, 1, true,
                    workspace_);
      ASSERT_EQ(std::memcmp(one.data(), y.data() + b * shape.rows, shape.rows * sizeof(float)), 0);
      double error = 0, all = 0;
      for (int64_t r = 0; r < shape.rows; r++) {
        double sum = 0;
        for (int64_t c = 0; c < shape.cols; c++) {
          sum += double{p.weights[r * shape.cols + c]} * x[b * shape.cols + c];
        }
        error += (one[r] - sum) * (one[r] - sum);
        all += sum * sum;
      }
      // Of the size of its group an activation is wrong by 0.3 %, or by 0.003 % with two planes.
      EXPECT_LT(error, (dtype == DType::kInt4 ? 2e-4 : 2e-8) * all);
    }
  }
}

TEST_P(QuantisedMatrix, GateAndUpOfManyRowsDoNotDependOnThem) {
  ThreadPool pool(2);
  QuantisedShape shape;
  shape.dtype = DType::kInt4;
  shape.rows = 100;
  shape.cols = 260;
  const CodeMatrix gate(shape), up(shape);
  LayerWeights layer;
  layer.gate = gate.matrix;
  layer.up = up.matrix;
  const int32_t batch = 530;
  const std::vector<float> x = normal(batch * shape.cols, 8);
  std::vector<float> y(batch * shape.rows, kNaN), one(shape.rows, kNaN);
  decode_gate_up(pool, kernels_, layer, x.data(), batch, y.data(), true, workspace_);
  for (const int32_t b : {0, 7, 255, 256, 511, 512, 529}) {
    decode_gate_up(pool_, kernels_, layer, x.data() + b * shape.cols, 1, one.data(), true,
                   workspace_);
    ASSERT_EQ(std::memcmp(one.data(), y.data() + b * shape.rows, shape.rows * sizeof(float)), 0)
        << b;
  }
}

TEST_P(QuantisedMatrix, ActivationsThatAreNotFiniteStaySo) {
  QuantisedShape shape;
  shape.rows = 20;
  shape.cols = 64;
  const CodeMatrix p(shape);
  for (const float bad : {kNaN, std::numeric_limits<float>::infinity()}) {
    std::vector<float> x = normal(shape.cols, 7), y(shape.rows, 0.0f);
    x[40] = bad;
    const LinearLayer layer{&p.matrix, nullptr, y.data(), shape.rows, false};
    decode_linear(pool_, kernels_, {&layer, 1}, x.data(), shape.cols, 1, true, workspace_);
    for (const float v : y) EXPECT_FALSE(std::isfinite(v));
  }
}

// A prompt's products are those with the dequantised matrix, rounded to what the GEMM multiplies.
TEST_P(QuantisedMatrix, PromptsGiveTheBitsOfTheDequantisedMatrix) {
  std::vector<QuantisedShape> all = shapes();
  QuantisedShape large = all[0];
  large.rows = 70;
  large.cols = 1100;  // several depth blocks
  large.group = 64;
  all.push_back(large);
  for (const QuantisedShape& shape : all) {
    const CodeMatrix p(shape);
    for (const GemmKernels* gemm : {&kernels_.f32, &kernels_.bf16}) {
      if (gemm->rows == 0) continue;
      const DType dtype = gemm->unit == 2 ? DType::kBF16 : DType::kF32;
      std::vector<uint8_t> dense(dtype_bytes(dtype, shape.rows * shape.cols));
      for (size_t i = 0; i < p.weights.size(); i++) {
        store_float(dense.data(), dtype, static_cast<int64_t>(i), p.weights[i]);
      }
      const Matrix expanded{dense.data(), dtype, shape.rows, shape.cols};
      const int64_t n = 37;
      const std::vector<float> x = normal(n * shape.cols, 8);
      const PackedInput packed(*gemm, n, shape.cols, workspace_.packed);
      for (int64_t i = 0; i < packed.n_panels(); i++) {
        packed.pack(i, x.data() + i * gemm->rows * shape.cols, shape.cols);
      }
      std::vector<float> y(n * shape.rows, kNaN), expected = y;
      LinearLayer layer{&p.matrix, nullptr, y.data(), shape.rows, false};
      prefill_linear(pool_, kernels_, *gemm, {&layer, 1}, packed, workspace_);
      layer.weights = &expanded;
      layer.out = expected.data();
      prefill_linear(pool_, kernels_, *gemm, {&layer, 1}, packed, workspace_);
      ASSERT_EQ(std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)), 0)
          << p.name() << ", " << dtype_name(dtype);
    }
  }
}

struct Quantised {
  std::vector<uint8_t> memory;
  bool fine;
};

Quantised quantise(decltype(Kernels::quantise_tile) tile, const QuantisedShape& shape,
                   const Matrix& stored) {
  Quantised result{std::vector<uint8_t>(shape.bytes()), true};
  std::vector<float> scratch(shape.inner() * kTileRows, kNaN);
  std::vector<uint16_t> scales(shape.n_scales()), minimums(shape.n_scales());
  for (int64_t i = 0; i < shape.n_tiles(); i++) {
    if (!tile(stored, shape, i, result.memory.data(), scales.data(), minimums.data(),
              scratch.data())) {
      result.fine = false;
    }
  }
  std::memcpy(result.memory.data() + shape.scales_at(), scales.data(), scales.size() * 2);
  std::memcpy(result.memory.data() + shape.offsets_at(), minimums.data(), minimums.size() * 2);
  return result;
}

TEST_P(QuantisedMatrix, WeightsAreRoundedAlikeAndWell) {
  for (QuantisedShape shape : shapes()) {
    shape.scale_dtype = DType::kF16;
    shape.offset = Offset::kMinimums;
    const std::vector<float> values = normal(shape.rows * shape.cols, 9);
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      std::vector<uint8_t> dense(dtype_bytes(dtype, shape.rows * shape.cols));
      for (size_t i = 0; i < values.size(); i++) {
        store_float(dense.data(), dtype, static_cast<int64_t>(i), 0.02f * values[i] + 0.01f);
      }
      const Matrix stored{dense.data(), dtype, shape.rows, shape.cols};
      const Quantised plain = quantise(quantise_tile_plain, shape, stored);
      const Quantised ours = quantise(kernels_.quantise_tile, shape, stored);
      ASSERT_TRUE(ours.fine && plain.fine);
      ASSERT_EQ(ours.memory, plain.memory) << dtype_name(shape.dtype) << ":" << shape.group;

      // No group is worse than with the usual line: from the least value to the largest.
      const Matrix matrix = Matrix::of(shape, ours.memory.data());
      const double top = shape.dtype == DType::kInt4 ? 15 : 255;
      for (int64_t r = 0; r < shape.rows; r++) {
        for (int64_t c0 = 0; c0 < shape.cols; c0 += shape.group) {
          const int64_t end = std::min(shape.cols, c0 + shape.group);
          std::vector<double> w;
          for (int64_t c = c0; c < end; c++) {
            w.push_back(load_float(dense.data(), dtype, r * shape.cols + c));
          }
          const double low = *std::min_element(w.begin(), w.end());
          const double step = (*std::max_element(w.begin(), w.end()) - low) / top;
          double error = 0, usual = 0, most = 0;
          for (int64_t c = c0; c < end; c++) {
            const double value = w[c - c0];
            const int32_t code = code_at(shape, ours.memory.data(), r, c);
            error += std::pow(value - matrix.weight(code, scale_at(shape, r, c)), 2);
            const double q = step > 0 ? std::nearbyint((value - low) / step) : 0;
            usual += std::pow(value - (low + q * step), 2);
            most = std::max(most, std::abs(value));
          }
          // Scale and minimum are rounded to f16: each by 2^-11 of itself, or by 2^-25.
          const double rounding = 0.002 * most + 2e-5;
          EXPECT_LE(std::sqrt(error),
                    std::sqrt(usual) * 1.02 + rounding * std::sqrt(static_cast<double>(end - c0)));
        }
      }
    }
  }
}

TEST_P(QuantisedMatrix, WeightsThatNoScaleHoldsAreReported) {
  QuantisedShape shape;
  shape.rows = 18;
  shape.cols = 70;
  for (const DType dtype : {DType::kInt8, DType::kInt4}) {
    shape.dtype = dtype;
    shape.offset = Offset::kMinimums;
    for (const float bad : {kNaN, std::numeric_limits<float>::infinity(), 3e7f}) {
      std::vector<float> values = normal(shape.rows * shape.cols, 9);
      const Matrix stored{values.data(), DType::kF32, shape.rows, shape.cols};
      EXPECT_TRUE(quantise(kernels_.quantise_tile, shape, stored).fine);
      values[17 * shape.cols + 69] = bad;
      EXPECT_FALSE(quantise(kernels_.quantise_tile, shape, stored).fine) << bad;
    }
    // A group of equal values is its minimum.
    for (const float value : {0.0f, 0.75f}) {
      std::vector<float> values(shape.rows * shape.cols, value);
      const Quantised same = quantise(kernels_.quantise_tile, shape,
                                      {values.data(), DType::kF32, shape.rows, shape.cols});
      EXPECT_TRUE(same.fine);
      const Matrix matrix = Matrix::of(shape, same.memory.data());
      for (int64_t c = 0; c < shape.cols; c++) {
        EXPECT_EQ(matrix.weight(code_at(shape, same.memory.data(), 3, c), scale_at(shape, 3, c)),
                  value);
      }
    }
  }
}

}  // namespace
}  // namespace mustafar
