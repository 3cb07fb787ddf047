// Weights on their way to a device with memory of its own, here one that lends host memory.
#include "model/weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "mustafar/error.h"
#include "support/quantised_source.h"
#include "support/random_model.h"
#include "support/stub_backend.h"

namespace mustafar {
namespace {

using testing::Float8Matrix;
using testing::Int4Matrix;
using testing::PartlyQuantised;

class HostMemory final : public DeviceMemory {
 public:
  explicit HostMemory(int64_t bytes) : values_(bytes) {
    data_ = values_.data();
    bytes_ = bytes;
  }

 private:
  std::vector<uint8_t> values_;
};

// Takes weights and does nothing else.
class StoreBackend final : public testing::StubBackend {
 public:
  int64_t free_bytes = int64_t{1} << 30;
  int64_t uploaded = 0;
  int64_t largest_upload = 0;

  bool host_memory() const override { return false; }
  std::unique_ptr<DeviceMemory> allocate(int64_t bytes) override {
    free_bytes -= bytes;
    return std::make_unique<HostMemory>(bytes);
  }
  void upload(void* device, const void* host, int64_t bytes) override {
    uploaded += bytes;
    largest_upload = std::max(largest_upload, bytes);
    std::memcpy(device, host, static_cast<size_t>(bytes));
  }
  int64_t available_bytes() const override { return free_bytes; }
};

// A vocabulary large enough that its matrix (80 MiB in f32) goes up in parts.
ModelConfig config_of(int32_t vocab_size) {
  ModelConfig c = testing::small_config({.hidden_size = 64,
                                         .intermediate_size = 72,
                                         .n_layers = 2,
                                         .vocab_size = vocab_size,
                                         .max_position_embeddings = 64});
  c.tie_word_embeddings = true;
  return c;
}

constexpr int32_t kLargeVocab = 320 << 10;

TEST(UploadedWeights, ProgressCountsTheBytesInOrderToTheEnd) {
  const ModelConfig config = config_of(kLargeVocab);
  const auto source = random_tensors(config, DType::kF32, 3);
  StoreBackend backend;
  std::vector<std::pair<int64_t, int64_t>> calls;
  const LoadedWeights loaded =
      load_weights(config, *source, backend, {},
                   [&](int64_t done, int64_t total) { calls.emplace_back(done, total); });
  EXPECT_EQ(loaded.bytes, backend.uploaded);
  ASSERT_GT(calls.size(), 20u);
  int64_t last = 0;
  for (const auto& [done, total] : calls) {
    EXPECT_GT(done, last);
    EXPECT_EQ(total, loaded.bytes);
    last = done;
  }
  EXPECT_EQ(last, loaded.bytes);
  EXPECT_LE(backend.largest_upload, int64_t{64} << 20);
}

TEST(UploadedWeights, TheDeviceHoldsWhatTheSourceHas) {
  const ModelConfig config = config_of(kLargeVocab);
  const auto source = random_tensors(config, DType::kF32, 3);
  StoreBackend backend;
  const LoadedWeights loaded = load_weights(config, *source, backend, {}, {});
  const Matrix& table = loaded.table.embedding;
  const StoredTensor stored =
      source->tensor("model.embed_tokens.weight", {config.vocab_size, config.hidden_size});
  ASSERT_NE(table.data, stored.data);
  EXPECT_EQ(std::memcmp(table.data, stored.data, dtype_bytes(table.dtype, table.rows * table.cols)),
            0);
  EXPECT_EQ(loaded.table.lm_head.data, table.data) << "tied weights go up once";
}

TEST(UploadedWeights, QuantisedOnesAreExpandedFirst) {
  const ModelConfig config = config_of(97);
  const auto source = PartlyQuantised::with<Float8Matrix>(config);
  StoreBackend backend;
  int64_t done = 0, total = 0;
  const LoadedWeights loaded = load_weights(
      config, *source, backend, {}, [&](int64_t at, int64_t all) { done = at, total = all; });
  EXPECT_EQ(loaded.bytes, backend.uploaded);
  EXPECT_EQ(done, loaded.bytes);
  EXPECT_EQ(total, loaded.bytes);
  const Matrix& up = loaded.table.layers[1].up;
  ASSERT_EQ(up.dtype, DType::kBF16);
  for (int64_t r = 0; r < up.rows; r++) {
    for (int64_t c = 0; c < up.cols; c++) {
      const float expected = 0.5f * e4m3_to_f32(Float8Matrix::code(r, c));
      ASSERT_EQ(load_float(up.data, up.dtype, r * up.cols + c), expected) << r << ", " << c;
    }
  }
}

// What the CPU has in memory of its own, byte for byte, in one allocation a matrix; and the same
// model to state files.
void expect_as_on_the_cpu(const ModelConfig& config, const TensorSource& source,
                          const std::string& weights) {
  SCOPED_TRACE(weights);
  const WeightFormat format = parse_weight_format(weights);
  const auto cpu = make_backend(config, {.device = "cpu", .threads = 2});
  const LoadedWeights expected = load_weights(config, source, *cpu, format, {});
  StoreBackend backend;
  const int64_t free_bytes = backend.free_bytes;
  const LoadedWeights loaded = load_weights(config, source, backend, format, {});
  EXPECT_EQ(loaded.fingerprint, expected.fingerprint);
  EXPECT_EQ(loaded.bytes, expected.bytes);
  EXPECT_EQ(backend.uploaded, loaded.bytes);
  EXPECT_EQ(free_bytes - backend.free_bytes, loaded.bytes);
  const std::vector<Matrix> theirs = testing::matrices_of(expected.table);
  const std::vector<Matrix> ours = testing::matrices_of(loaded.table);
  ASSERT_EQ(ours.size(), theirs.size());
  for (size_t i = 0; i < ours.size(); i++) {
    ASSERT_EQ(ours[i].dtype, theirs[i].dtype) << "matrix " << i;
    EXPECT_EQ(testing::bytes_of(ours[i]), testing::bytes_of(theirs[i])) << "matrix " << i;
  }
}

TEST(UploadedWeights, RoundedOnesAndCodesAreThoseOfTheCpu) {
  const ModelConfig config = config_of(97);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const auto source = random_tensors(config, dtype, 3);
    for (const char* weights : {"auto", "int8", "int4", "int4:64", "int8:row"}) {
      expect_as_on_the_cpu(config, *source, weights);
    }
  }
  const auto float8 = PartlyQuantised::with<Float8Matrix>(config);
  expect_as_on_the_cpu(config, *float8, "auto");
  expect_as_on_the_cpu(config, *float8, "int4");
  expect_as_on_the_cpu(config, *PartlyQuantised::with<Int4Matrix>(config), "auto");
}

TEST(UploadedWeights, ProgressOfRoundedOnesCountsWhatIsRead) {
  const ModelConfig config = config_of(kLargeVocab);
  const auto source = random_tensors(config, DType::kBF16, 3);
  StoreBackend backend;
  const int64_t stored = load_weights(config, *source, backend, {}, {}).bytes;
  int64_t last = 0;
  const LoadedWeights loaded = load_weights(config, *source, backend, parse_weight_format("int4"),
                                            [&](int64_t done, int64_t total) {
                                              EXPECT_GT(done, last);
                                              EXPECT_EQ(total, stored);
                                              last = done;
                                            });
  EXPECT_EQ(last, stored);
  EXPECT_LT(loaded.bytes, stored);
}

// Bytes that a device needs for weights of this type.
int64_t expect_refused_where_a_byte_is_missing(const ModelConfig& config,
                                               const TensorSource& source,
                                               const std::string& weights) {
  SCOPED_TRACE(weights);
  const WeightFormat format = parse_weight_format(weights);
  StoreBackend roomy;
  const int64_t needed = load_weights(config, source, roomy, format, {}).bytes;

  StoreBackend exact;
  exact.free_bytes = needed;
  EXPECT_EQ(load_weights(config, source, exact, format, {}).bytes, needed);
  EXPECT_EQ(exact.free_bytes, 0) << "the count is what is allocated";

  StoreBackend small;
  small.free_bytes = needed - 1;
  try {
    load_weights(config, source, small, format, {});
    ADD_FAILURE() << "weights of " << needed << " bytes went where one is missing";
  } catch (const OutOfMemory& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("take " + std::to_string(needed) + " bytes"), std::string::npos)
        << message;
    EXPECT_NE(message.find("has " + std::to_string(needed - 1) + " free"), std::string::npos)
        << message;
  }
  EXPECT_EQ(small.uploaded, 0);
  return needed;
}

TEST(UploadedWeights, WhatDoesNotFitIsRefusedBeforeTheUploadWithTheNumbers) {
  const ModelConfig config = config_of(97);
  const auto source = random_tensors(config, DType::kBF16, 3);
  const int64_t stored = expect_refused_where_a_byte_is_missing(config, *source, "auto");
  const int64_t int8 = expect_refused_where_a_byte_is_missing(config, *source, "int8");
  EXPECT_LT(int8, stored);
  EXPECT_LT(expect_refused_where_a_byte_is_missing(config, *source, "int4"), int8);

  const auto float8 = PartlyQuantised::with<Float8Matrix>(config);
  const auto codes = PartlyQuantised::with<Int4Matrix>(config);
  EXPECT_EQ(expect_refused_where_a_byte_is_missing(config, *float8, "auto"), stored);
  EXPECT_EQ(expect_refused_where_a_byte_is_missing(config, *float8, "int8"), int8);
  EXPECT_LT(expect_refused_where_a_byte_is_missing(config, *codes, "auto"), stored);
}

TEST(UploadedWeights, ProgressThatThrowsStopsTheUpload) {
  const ModelConfig config = config_of(kLargeVocab);
  const auto source = random_tensors(config, DType::kF32, 3);
  StoreBackend backend;
  EXPECT_THROW(
      load_weights(config, *source, backend, {}, [](int64_t, int64_t) { throw Cancelled("stop"); }),
      Cancelled);
  EXPECT_LE(backend.uploaded, int64_t{64} << 20);
}

}  // namespace
}  // namespace mustafar
