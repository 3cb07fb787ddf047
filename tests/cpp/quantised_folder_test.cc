// Quantised folders of odd sizes: tensors that lie unaligned, rows that fill no tile, inputs that
// fill no word; every weight against the layout's definition. Whole folders are compared with
// transformers in tests/python/test_quantised_folders.py.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "io/checkpoint.h"
#include "model/stored_weights.h"
#include "mustafar/error.h"
#include "support/model_folder.h"

namespace mustafar {
namespace {

using testing::TestTensor;

std::string random_bytes(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::string bytes(n, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

TestTensor tensor(const std::string& name, const std::string& dtype, std::vector<int64_t> shape) {
  size_t n = dtype == "I32" || dtype == "F32" ? 4 : (dtype == "F16" || dtype == "BF16" ? 2 : 1);
  for (const int64_t dim : shape) n *= static_cast<size_t>(dim);
  TestTensor made{name, dtype, std::move(shape),
                  random_bytes(n, static_cast<uint32_t>(name.size()))};
  if (dtype == "F16" || dtype == "BF16") {  // finite ones near 1
    for (size_t i = 1; i < n; i += 2) made.bytes[i] = dtype == "F16" ? 0x3c : 0x3f;
  }
  return made;
}

class QuantisedFolder : public ::testing::Test {
 protected:
  // The tiny model with the matrix of one module, [rows][cols], replaced by these tensors.
  void write(const std::string& module, std::vector<TestTensor> instead,
             const nlohmann::json& quantisation) {
    std::vector<TestTensor> tensors;
    for (TestTensor& t : instead) tensors.push_back(std::move(t));
    for (TestTensor& t : testing::tiny_tensors()) {
      if (t.name != module + ".weight") tensors.push_back(std::move(t));
    }
    nlohmann::json config = testing::tiny_config();
    config["quantization_config"] = quantisation;
    folder_.write("config.json", config.dump());
    folder_.write("model.safetensors", testing::safetensors_bytes(tensors, padding_));
  }

  // Every weight as it is kept in memory, row by row.
  std::vector<float> weights(const std::string& module, int64_t row0, int64_t rows) {
    const Checkpoint checkpoint = Checkpoint::open(folder_.path());
    const StoredMatrix* stored = checkpoint.find_quantised(module + ".weight");
    if (stored == nullptr) throw std::runtime_error("not quantised");
    kept_ = describe_kept(*stored);
    std::vector<float> values;
    if (!keeps_codes(*stored)) {
      std::vector<uint8_t> memory(dtype_bytes(stored->expanded, rows * stored->cols));
      expand(*stored, row0, rows, nullptr, memory.data());
      for (int64_t i = 0; i < rows * stored->cols; i++) {
        values.push_back(load_float(memory.data(), stored->expanded, i));
      }
      return values;
    }
    const QuantisedShape shape = code_shape(*stored, rows);
    std::vector<uint8_t> memory(shape.bytes(), 0xa5);
    unpack_codes(*stored, row0, shape, nullptr, memory.data());
    const Matrix matrix = Matrix::of(shape, memory.data());
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t c = 0; c < stored->cols; c++) {
        values.push_back(matrix.weight(code_at(shape, memory.data(), r, c), scale_at(shape, r, c)));
      }
    }
    return values;
  }

  testing::TemporaryFolder folder_;
  size_t padding_ = 0;  // bytes by which tensors lie unaligned
  std::string kept_;
};

uint32_t word(const std::string& bytes, int64_t i) {
  uint32_t value;
  std::memcpy(&value, bytes.data() + 4 * i, 4);
  return value;
}

float half(const std::string& bytes, int64_t i) { return load_float(bytes.data(), DType::kF16, i); }

constexpr const char* kDown = "model.layers.0.mlp.down_proj";  // [8][12]
constexpr const char* kUp = "model.layers.1.mlp.up_proj";      // [12][8]

TEST_F(QuantisedFolder, WordsOfCompressedTensors) {
  for (const int32_t bits : {4, 8}) {
    for (padding_ = 0; padding_ < 4; padding_++) {
      const int64_t words = (12 * bits + 31) / 32, per_word = 32 / bits;
      const std::string name = kDown;
      const TestTensor codes = tensor(name + ".weight_packed", "I32", {8, words});
      const TestTensor scales = tensor(name + ".weight_scale", "F16", {8, 1});
      const TestTensor zeros = tensor(name + ".weight_zero_point", "I32", {8 * bits / 32, 1});
      TestTensor shape{name + ".weight_shape", "I32", {2}, std::string("\10\0\0\0\14\0\0\0", 8)};
      write(name, {codes, scales, zeros, shape},
            {{"quant_method", "compressed-tensors"},
             {"format", "pack-quantized"},
             {"config_groups",
              {{"a",
                {{"weights",
                  {{"num_bits", bits}, {"strategy", "channel"}, {"symmetric", false}}}}}}}});
      const std::vector<float> found = weights(name, 3, 5);
      for (int64_t r = 3; r < 8; r++) {
        for (int64_t c = 0; c < 12; c++) {
          const uint32_t mask = (1u << bits) - 1;
          const uint32_t code =
              word(codes.bytes, r * words + c / per_word) >> (c % per_word * bits) & mask;
          const uint32_t zero = word(zeros.bytes, r / per_word) >> (r % per_word * bits) & mask;
          const float difference = static_cast<float>(code) - static_cast<float>(zero);
          ASSERT_EQ(found[(r - 3) * 12 + c], half(scales.bytes, r) * difference) << r << ", " << c;
        }
      }
    }
  }
}

TEST_F(QuantisedFolder, WordsOfGptqAndAwq) {
  const std::string name = kUp;
  for (const char* method : {"gptq", "awq"}) {
    const bool is_awq = std::string(method) == "awq";
    // Twelve outputs: not in eights, as AutoAWQ has to have them.
    const TestTensor codes = is_awq ? tensor(name + ".qweight", "I32", {8, 1})
                                    : tensor(name + ".qweight", "I32", {1, 12});
    const TestTensor zeros = tensor(name + ".qzeros", "I32", {1, is_awq ? 1 : 2});
    const TestTensor scales = tensor(name + ".scales", "F16", {1, 12});
    write(name, {codes, zeros, scales},
          {{"quant_method", method}, {"bits", 4}, {"group_size", -1}});
    if (is_awq) {
      EXPECT_MODEL_ERROR(weights(name, 0, 12), "expected outputs in eights, found 12");
      continue;
    }
    const std::vector<float> found = weights(name, 0, 12);
    for (int64_t r = 0; r < 12; r++) {
      for (int64_t c = 0; c < 8; c++) {
        const uint32_t code = word(codes.bytes, r) >> (4 * c) & 15;
        const uint32_t zero = (word(zeros.bytes, r / 8) + 0x11111111u) >> (4 * (r % 8)) & 15;
        const float difference = static_cast<float>(code) - static_cast<float>(zero);
        ASSERT_EQ(found[r * 8 + c], half(scales.bytes, r) * difference) << r << ", " << c;
      }
    }
  }
}

TEST_F(QuantisedFolder, OutputsOfAwqAreShuffled) {
  const std::string name = kDown;
  const TestTensor codes = tensor(name + ".qweight", "I32", {12, 1});
  const TestTensor zeros = tensor(name + ".qzeros", "I32", {3, 1});
  const TestTensor scales = tensor(name + ".scales", "F16", {3, 8});
  write(name, {codes, zeros, scales}, {{"quant_method", "awq"}, {"group_size", 4}});
  constexpr int kOrder[] = {0, 2, 4, 6, 1, 3, 5, 7};
  const std::vector<float> found = weights(name, 0, 8);
  EXPECT_EQ(kept_, "int4, groups of 4, zero points: expanded to f16");
  for (int64_t c = 0; c < 12; c++) {
    for (int i = 0; i < 8; i++) {
      const int64_t r = kOrder[i];
      const float code = static_cast<float>(word(codes.bytes, c) >> (4 * i) & 15);
      const float zero = static_cast<float>(word(zeros.bytes, c / 4) >> (4 * i) & 15);
      const float exact = half(scales.bytes, c / 4 * 8 + r) * (code - zero);
      ASSERT_EQ(found[r * 12 + c], f16_to_f32(f32_to_f16(exact))) << r << ", " << c;
    }
  }
}

TEST_F(QuantisedFolder, BlocksOfFloat8AreCutAtTheEdges) {
  const std::string name = kUp;
  TestTensor codes = tensor(name + ".weight", "F8_E4M3", {12, 8});
  const TestTensor scales = tensor(name + ".weight_scale_inv", "BF16", {3, 2});
  write(name, {codes, scales}, {{"quant_method", "fp8"}, {"weight_block_size", {5, 6}}});
  const std::vector<float> found = weights(name, 1, 11);
  EXPECT_EQ(kept_, "fp8, blocks of 5 x 6: expanded to f32");
  for (int64_t r = 1; r < 12; r++) {
    for (int64_t c = 0; c < 8; c++) {
      const float value = e4m3_to_f32(static_cast<uint8_t>(codes.bytes[r * 8 + c]));
      const float scale = load_float(scales.bytes.data(), DType::kBF16, r / 5 * 2 + c / 6);
      if (value != value) {
        ASSERT_NE(found[(r - 1) * 8 + c], found[(r - 1) * 8 + c]);
      } else {
        ASSERT_EQ(found[(r - 1) * 8 + c], value * scale) << r << ", " << c;
      }
    }
  }
}

TEST(Float8, ValuesAreThoseOfTheFormat) {
  EXPECT_EQ(e4m3_to_f32(0x00), 0.0f);
  EXPECT_EQ(e4m3_to_f32(0x01), 0x1p-9f);
  EXPECT_EQ(e4m3_to_f32(0x07), 7 * 0x1p-9f);
  EXPECT_EQ(e4m3_to_f32(0x08), 0x1p-6f);
  EXPECT_EQ(e4m3_to_f32(0x38), 1.0f);
  EXPECT_EQ(e4m3_to_f32(0xb9), -1.125f);
  EXPECT_EQ(e4m3_to_f32(0x7e), 448.0f);
  EXPECT_TRUE(e4m3_to_f32(0x7f) != e4m3_to_f32(0x7f));
  for (int code = 0; code < 127; code++) {  // every finite one in ascending order
    if (code > 0) {
      EXPECT_LT(e4m3_to_f32(code - 1), e4m3_to_f32(code));
    }
    EXPECT_EQ(e4m3_to_f32(code | 0x80), -e4m3_to_f32(code));
  }
}

TEST_F(QuantisedFolder, ShapesThatOverflowOrHaveNoDimensionsAreNamed) {
  const std::string name = kDown;
  const nlohmann::json config = {
      {"quant_method", "compressed-tensors"},
      {"config_groups",
       {{"a", {{"weights", {{"num_bits", 4}, {"strategy", "channel"}}}}},
        {"b", {{"weights", {{"num_bits", 8}, {"strategy", "channel"}}}}}}}};
  const TestTensor scalar{name + ".weight_packed", "I32", {}, std::string(4, '\0')};
  const TestTensor scales = tensor(name + ".weight_scale", "F16", {8, 1});
  write(name, {scalar, scales}, config);
  EXPECT_MODEL_ERROR(Checkpoint::open(folder_.path()), "weight_packed\": expected shape [8, 2]");
  TestTensor packed = tensor(name + ".weight_packed", "I32", {8, 2});
  TestTensor huge{name + ".weight_scale", "F16", {int64_t{1} << 61, 4, 0}, ""};
  write(name, {packed, huge}, config);
  EXPECT_MODEL_ERROR(Checkpoint::open(folder_.path()), "weight_scale\": expected shape [8, 1]");
}

}  // namespace
}  // namespace mustafar
