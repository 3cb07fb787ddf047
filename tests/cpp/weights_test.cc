// Weights on their way to a device with memory of its own, here one that lends host memory.
#include "model/weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "mustafar/error.h"
#include "support/random_model.h"
#include "support/stub_backend.h"

namespace mustafar {
namespace {

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

// fp8 numbers [rows][cols] with one scale, 0.5.
class Float8Matrix final : public StoredMatrix {
 public:
  Float8Matrix(int64_t n_rows, int64_t n_cols) {
    rows = n_rows;
    cols = n_cols;
    bits = 8;
    is_float = true;
    scales.data = reinterpret_cast<const uint8_t*>(&scale_);
    scales.dtype = DType::kF32;
  }
  static uint8_t code(int64_t r, int64_t c) { return static_cast<uint8_t>((r * 31 + c * 7) % 120); }
  void read_codes(int64_t row, int64_t n, int64_t stride, uint8_t* out) const override {
    for (int64_t r = 0; r < n; r++) {
      for (int64_t c = 0; c < cols; c++) out[r * stride + c] = code(row + r, c);
    }
  }
  int32_t zero(int64_t, int64_t) const override { return 0; }

 private:
  const float scale_ = 0.5f;
};

// Random tensors, but for one matrix that is quantised.
class PartlyQuantised final : public TensorSource {
 public:
  explicit PartlyQuantised(const ModelConfig& config)
      : dense_(random_tensors(config, DType::kBF16, 3)),
        matrix_(config.intermediate_size, config.hidden_size) {}
  bool has(const std::string& name) const override { return dense_->has(name); }
  StoredTensor tensor(const std::string& name, const std::vector<int64_t>& shape) const override {
    EXPECT_EQ(quantised(name), nullptr);
    return dense_->tensor(name, shape);
  }
  const StoredMatrix* quantised(const std::string& name) const override {
    return name == "model.layers.1.mlp.up_proj.weight" ? &matrix_ : nullptr;
  }
  bool any_quantised(const std::function<bool(const StoredMatrix&)>& test) const override {
    return test(matrix_);
  }

 private:
  const std::unique_ptr<TensorSource> dense_;
  const Float8Matrix matrix_;
};

TEST(UploadedWeights, QuantisedOnesAreExpandedFirst) {
  const ModelConfig config = config_of(97);
  const PartlyQuantised source(config);
  StoreBackend backend;
  int64_t done = 0, total = 0;
  const LoadedWeights loaded = load_weights(
      config, source, backend, {}, [&](int64_t at, int64_t all) { done = at, total = all; });
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

TEST(UploadedWeights, WhatDoesNotFitIsRefusedBeforeTheUploadWithTheNumbers) {
  const ModelConfig config = config_of(97);
  const auto source = random_tensors(config, DType::kBF16, 3);
  StoreBackend roomy;
  const int64_t needed = load_weights(config, *source, roomy, {}, {}).bytes;

  StoreBackend exact;
  exact.free_bytes = needed;
  EXPECT_EQ(load_weights(config, *source, exact, {}, {}).bytes, needed);
  EXPECT_EQ(exact.free_bytes, 0) << "the count is what is allocated";

  StoreBackend small;
  small.free_bytes = needed - 1;
  try {
    load_weights(config, *source, small, {}, {});
    FAIL() << "weights of " << needed << " bytes went where one is missing";
  } catch (const OutOfMemory& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("take " + std::to_string(needed) + " bytes"), std::string::npos)
        << message;
    EXPECT_NE(message.find("has " + std::to_string(needed - 1) + " free"), std::string::npos)
        << message;
  }
  EXPECT_EQ(small.uploaded, 0);
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
