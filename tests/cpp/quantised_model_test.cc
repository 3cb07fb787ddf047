// Models whose matrices are quantised when they are loaded.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/buffer.h"
#include "mustafar/error.h"
#include "mustafar/session.h"
#include "support/random_model.h"

namespace mustafar {
namespace {

ModelConfig config() {
  return testing::small_config(
      {.hidden_size = 72, .intermediate_size = 200, .n_layers = 2, .max_position_embeddings = 256});
}

Model load(const std::string& weights, const std::string& dtype = "f32",
           std::shared_ptr<const TensorSource> source = nullptr) {
  ModelOptions options;
  options.device = "cpu";
  options.threads = 2;
  options.weights = weights;
  options.dtype = dtype;
  if (source == nullptr) source = random_tensors(config(), DType::kBF16, /*seed=*/7);
  return make_model(config(), std::move(source), options);
}

// A source in which one tensor's last value is replaced.
class Spoilt final : public TensorSource {
 public:
  Spoilt(std::string name, float value)
      : name_(std::move(name)), value_(value), source_(random_tensors(config(), DType::kBF16, 7)) {}
  bool has(const std::string& name) const override { return source_->has(name); }
  StoredTensor tensor(const std::string& name, const std::vector<int64_t>& shape) const override {
    const StoredTensor stored = source_->tensor(name, shape);
    if (name != name_) return stored;
    int64_t n = 1;
    for (const int64_t extent : shape) n *= extent;
    copy_ = HostBuffer(dtype_bytes(stored.dtype, n));
    std::memcpy(copy_.data(), stored.data, copy_.bytes());
    store_float(copy_.data(), stored.dtype, n - 1, value_);
    return {copy_.data(), stored.dtype};
  }

 private:
  const std::string name_;
  const float value_;
  const std::unique_ptr<TensorSource> source_;
  mutable HostBuffer copy_;
};

TEST(QuantisedModel, NamesAndBytes) {
  EXPECT_EQ(load("auto").weights(), "auto");
  EXPECT_EQ(load("int8").weights(), "int8:32");
  EXPECT_EQ(load("int4").weights(), "int4:32");
  EXPECT_EQ(load("int4:128").weights(), "int4:128");
  EXPECT_EQ(load("int8:row").weights(), "int8:row");
  const int64_t stored = load("auto").memory().weights_bytes;
  const int64_t int8 = load("int8").memory().weights_bytes;
  const int64_t int4 = load("int4").memory().weights_bytes;
  EXPECT_LT(int8, stored);
  EXPECT_LT(int4, int8);
}

TEST(QuantisedModel, UnknownNamesAreRefused) {
  for (const char* name :
       {"", "int3", "int4:", "int4:48", "int4:0", "INT8", "int8:-32", "auto:32"}) {
    try {
      load(name);
      ADD_FAILURE() << name;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find("weights is \"" + std::string(name) + "\""),
                std::string::npos)
          << error.what();
    }
  }
}

// What a device says of a type of weights: why it can't be had, or the model's fingerprint.
std::string answer_of(const std::string& device, const std::string& weights) {
  ModelOptions options;
  options.weights = weights;
  options.device = device;
  try {
    return make_model(config(), random_tensors(config(), DType::kBF16, 7), options).fingerprint();
  } catch (const DeviceError& error) {
    return error.what();
  }
}

TEST(QuantisedModel, DevicesAreChosenAsForOtherWeights) {
  const std::string refusal = answer_of("cuda", "auto");
  const bool has_gpu = refusal.find("device \"cuda\"") == std::string::npos;
  for (const char* weights : {"int8", "int4:64"}) {
    const std::string on_cpu = answer_of("cpu", weights);
    EXPECT_EQ(answer_of("cuda", weights), has_gpu ? on_cpu : refusal);
    EXPECT_EQ(answer_of("auto", weights), on_cpu);
  }
}

TEST(QuantisedModel, ValuesThatCannotBeQuantisedAreNamed) {
  for (const char* name : {"model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"}) {
    const auto source =
        std::make_shared<const Spoilt>(name, std::numeric_limits<float>::infinity());
    EXPECT_NO_THROW(load("auto", "f32", source));
    try {
      load("int4", "f32", source);
      ADD_FAILURE() << name;
    } catch (const ModelError& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  }
}

TEST(QuantisedModel, EveryTypeIsAnotherModelToStateFiles) {
  const auto path = std::filesystem::path(::testing::TempDir()) / "quantised_model.state";
  Model int8 = load("int8");
  Session session(int8, KVConfig{});
  session.prefill(testing::ids_of(20));
  session.save(path);
  EXPECT_NO_THROW(Session::load(load("int8"), path));
  std::set<std::string> fingerprints = {int8.fingerprint()};
  for (const char* other : {"auto", "int8:64", "int4", "int4:64"}) {
    const Model model = load(other);
    EXPECT_TRUE(fingerprints.insert(model.fingerprint()).second) << other;
    EXPECT_THROW(Session::load(model, path), StateError) << other;
  }
  std::filesystem::remove(path);
}

TEST(QuantisedModel, ProgressCountsWhatIsRead) {
  ModelOptions options;
  options.device = "cpu";
  options.weights = "int8";
  int64_t last = 0, all = -1;
  options.progress = [&](int64_t done, int64_t total) {
    EXPECT_GT(done, last);
    last = done;
    all = total;
  };
  make_model(config(), random_tensors(config(), DType::kBF16, 7), options);
  EXPECT_EQ(last, all);
}

// With f32 arithmetic decode and prefill multiply by the same numbers; with bf16 they round
// activations differently.
TEST(QuantisedModel, DecodeAndPrefillAgree) {
  for (const auto& [dtype, tolerance] : {std::pair("f32", 1e-5), std::pair("bf16", 0.02)}) {
    for (const char* weights : {"int8", "int4", "int4:row"}) {
      const Model model = load(weights, dtype);
      const std::vector<int32_t> ids = testing::ids_of(40);
      KVConfig kv;
      kv.value_dtype = ValueType::kAuto;
      Session whole(model, kv), stepped(model, kv);
      const std::span<const float> expected = whole.prefill(ids);
      std::span<const float> logits = stepped.prefill({ids.data(), 30});
      for (size_t i = 30; i < ids.size(); i++) logits = stepped.decode(ids[i]);
      double error = 0, size = 0;
      for (size_t i = 0; i < logits.size(); i++) {
        error += (logits[i] - expected[i]) * (logits[i] - expected[i]);
        size += expected[i] * expected[i];
      }
      EXPECT_LT(std::sqrt(error / size), tolerance) << dtype << " " << weights;
    }
  }
}

}  // namespace
}  // namespace mustafar
