// Trained models on the CUDA backend against the CPU backend: under the host harness, and in a CUDA
// build on the device, where there is one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "mustafar/error.h"
#include "mustafar/session.h"
#include "support/source_dir.h"

namespace mustafar {
namespace {

struct Trained {
  const char* name;
  std::filesystem::path folder;
  const char* text;
};

const Trained kStory{"story", testing::test_models() / "story", "Once upon a time"};
const Trained kStories260K{"stories260K", testing::test_models() / "stories260K",
                           "Once upon a time"};
const Trained kDemo{"demo", testing::source_dir() / "python/mustafar/models/demo",
                    "import os\n\ndef main():\n"};

class WholeModel : public ::testing::TestWithParam<Trained> {
 protected:
  // A prompt that the model made itself, then `steps` greedy ones, f32, on both devices: every row
  // of logits within 1e-3, and so the same tokens.
  void compare(int64_t steps) {
    const Trained& trained = GetParam();
    if (!std::filesystem::exists(trained.folder / "config.json")) {
      GTEST_SKIP() << trained.folder << " is absent";
    }
    ModelOptions options;
    options.threads = 1;
    options.dtype = "f32";
    options.device = "cpu";
    const Model cpu = Model::load(trained.folder, options);
    options.device = "cuda";
    const auto load = [&]() -> std::optional<Model> {
      try {
        return Model::load(trained.folder, options);
      } catch (const DeviceError& error) {
        reason_ = error.what();
        return std::nullopt;
      }
    };
    const std::optional<Model> gpu = load();
    if (!gpu) GTEST_SKIP() << reason_;

    KVConfig kv;
    kv.sparsity = 0.5;
    kv.sink_tokens = 4;
    SamplingParams greedy;
    greedy.temperature = 0;
    greedy.ignore_eos = true;
    greedy.max_new_tokens = 112;
    Session writer(cpu, kv);
    writer.generate(trained.text, greedy);

    Session a(cpu, kv), b(*gpu, kv);
    std::span<const float> x = a.prefill(writer.tokens()), y = b.prefill(writer.tokens());
    double largest = 0;
    for (int64_t step = 0;; step++) {
      for (size_t i = 0; i < x.size(); i++) {
        largest = std::max(largest, std::fabs(double{x[i]} - double{y[i]}));
      }
      ASSERT_LE(largest, 1e-3) << "step " << step;
      const auto best = std::max_element(x.begin(), x.end()) - x.begin();
      ASSERT_EQ(best, std::max_element(y.begin(), y.end()) - y.begin()) << "step " << step;
      if (step == steps) break;
      x = a.decode(static_cast<int32_t>(best));
      y = b.decode(static_cast<int32_t>(best));
    }
    EXPECT_GE(b.memory().compressed_tokens, 64);
    RecordProperty("largest_difference", std::to_string(largest));
  }

 private:
  std::string reason_;
};

TEST_P(WholeModel, AgreesWithTheCpu) { compare(24); }

// Under the harness the longest of all tests: labelled slow.
TEST_P(WholeModel, AgreesWithTheCpuFor128Tokens) { compare(128); }

INSTANTIATE_TEST_SUITE_P(Trained, WholeModel, ::testing::Values(kStory, kStories260K, kDemo),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace mustafar
