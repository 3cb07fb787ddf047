// Sessions of small random models on the CUDA backend against the CPU backend: under the host
// harness, and in a CUDA build on the device, where there is one.
#include "mustafar/session.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "mustafar/calibration.h"
#include "mustafar/engine.h"
#include "mustafar/error.h"
#include "mustafar/profile.h"
#include "runtime/scorer.h"
#include "runtime/session_impl.h"
#include "support/caller.h"
#include "support/on_cuda.h"
#include "support/random_model.h"

namespace mustafar {
namespace {

using testing::ids_of;

ModelConfig small_config(int32_t head_dim) {
  return testing::small_config(
      {.hidden_size = 64, .intermediate_size = 72, .n_layers = 2, .head_dim = head_dim});
}

Model random_model(const char* device, int32_t head_dim, DType dtype,
                   const char* weights = "auto") {
  return testing::random_model(small_config(head_dim), device, 1, dtype, 0, weights);
}

double largest_difference(std::span<const float> a, std::span<const float> b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); i++) largest = std::max(largest, std::fabs(double{a[i]} - b[i]));
  return a.size() == b.size() ? largest : std::numeric_limits<double>::infinity();
}

// A prompt, then enough tokens that two blocks leave the window, on both devices.
void compare(int32_t head_dim, DType dtype, const KVConfig& kv, double tolerance) {
  const Model cpu = random_model("cpu", head_dim, dtype);
  const Model gpu = random_model("cuda", head_dim, dtype);
  Session a(cpu, kv), b(gpu, kv);
  const std::vector<int32_t> prompt = ids_of(101);
  EXPECT_LE(largest_difference(a.prefill(prompt), b.prefill(prompt)), tolerance);
  const std::vector<int32_t> rest = ids_of(70, 2);
  for (size_t i = 0; i < rest.size(); i++) {
    ASSERT_LE(largest_difference(a.decode(rest[i]), b.decode(rest[i])), tolerance) << "step " << i;
  }
  const std::vector<int32_t> more = ids_of(30, 3);
  EXPECT_LE(largest_difference(a.prefill(more), b.prefill(more)), tolerance);
  EXPECT_EQ(a.memory().compressed_tokens, b.memory().compressed_tokens);
  EXPECT_GT(a.memory().compressed_tokens, 0);
}

class CudaSession : public testing::OnCuda {};

KVConfig config_of(double sparsity, int32_t sinks = 0, ValueType type = ValueType::kAuto,
                   Pattern pattern = Pattern::kGroup) {
  KVConfig kv;
  kv.sparsity = sparsity;
  kv.sink_tokens = sinks;
  kv.value_dtype = type;
  kv.pattern = pattern;
  return kv;
}

TEST_F(CudaSession, EqualsTheCpu) { compare(16, DType::kF32, config_of(0.5), 1e-4); }

TEST_F(CudaSession, EqualsTheCpuByRow) {
  compare(24, DType::kF32, config_of(0.7, 5, ValueType::kAuto, Pattern::kRow), 1e-4);
}

// Rounding to 2 bytes can tip a value over a rank's or a code's edge, differently on each side.
TEST_F(CudaSession, EqualsTheCpuInBf16) { compare(64, DType::kBF16, config_of(0.5, 2), 2e-2); }

TEST_F(CudaSession, EqualsTheCpuInF16WithInt8) {
  compare(64, DType::kF16, config_of(0.5, 0, ValueType::kInt8), 1e-2);
}

// Models on two devices, used by turns and released in the other order: each gets what it gets
// alone.
TEST_F(CudaSession, TwoDevicesByTurns) {
  const KVConfig kv = config_of(0.5, 2, ValueType::kInt8);
  const Model first = random_model("cuda", 16, DType::kF32);
  std::optional<Model> second;
  try {
    second = random_model("cuda:1", 16, DType::kF32);
  } catch (const DeviceError& error) {
    GTEST_SKIP() << error.what();
  }
  EXPECT_EQ(first.device(), "cuda");
  EXPECT_EQ(second->device(), "cuda:1");
  const std::vector<int32_t> prompt = ids_of(101), rest = ids_of(70, 2);
  std::vector<std::vector<float>> alone;
  const auto note = [&](std::span<const float> logits) {
    alone.emplace_back(logits.begin(), logits.end());
  };
  {
    Session session(first, kv);
    note(session.prefill(prompt));
    for (const int32_t id : rest) note(session.decode(id));
  }
  Session a(first, kv);
  {
    Session b(*second, kv);
    const auto expect_as_alone = [&](std::span<const float> logits, size_t step) {
      EXPECT_EQ(largest_difference(logits, alone[step]), 0) << "step " << step;
    };
    expect_as_alone(b.prefill(prompt), 0);
    expect_as_alone(a.prefill(prompt), 0);
    for (size_t i = 0; i < rest.size(); i++) {
      expect_as_alone(a.decode(rest[i]), i + 1);
      expect_as_alone(b.decode(rest[i]), i + 1);
    }
    EXPECT_GT(b.memory().compressed_tokens, 0);
    second.reset();
    b.decode(1);
  }
  a.decode(1);
}

// A prompt longer than what is multiplied with codes as they are, where values are 2 bytes wide,
// and some steps. CPUs round activations to 8 bits in those.
void compare_weights(const char* weights, int32_t head_dim, DType dtype, double tolerance) {
  const Model cpu = random_model("cpu", head_dim, dtype, weights);
  const Model gpu = random_model("cuda", head_dim, dtype, weights);
  Session a(cpu, config_of(0.5)), b(gpu, config_of(0.5));
  const std::vector<int32_t> prompt = ids_of(40);
  EXPECT_LE(largest_difference(a.prefill(prompt), b.prefill(prompt)), tolerance);
  for (const int32_t id : ids_of(3, 2)) {
    ASSERT_LE(largest_difference(a.decode(id), b.decode(id)), tolerance);
  }
}

TEST_F(CudaSession, QuantisedWeightsEqualTheCpu) {
  compare_weights("int4:32", 16, DType::kF32, 1e-4);
  compare_weights("int8:row", 16, DType::kF32, 1e-4);
  compare_weights("int4:64", 64, DType::kBF16, 3e-2);
  compare_weights("int8:32", 64, DType::kF16, 3e-2);
}

TEST_F(CudaSession, QuantisedWeightsAreTheSameOnBothDevices) {
  const Model cpu = random_model("cpu", 16, DType::kF32, "int4:32");
  const Model gpu = random_model("cuda", 16, DType::kF32, "int4:32");
  EXPECT_EQ(cpu.fingerprint(), gpu.fingerprint());
}

#if !defined(MUSTAFAR_SIMT)  // minutes on the harness
// As models have it: heads of 128, up to 8 of which share keys, the settings of the presets.
TEST_F(CudaSession, EqualsTheCpuAtHeadDim128) {
  for (const ValueType type : {ValueType::kAuto, ValueType::kInt8, ValueType::kInt4}) {
    KVConfig kv = config_of(0.625, 4, type);
    kv.v_sparsity = 0.75;
    compare(128, DType::kBF16, kv, 2e-2);
    compare(128, DType::kF16, config_of(0.5, 0, type), 1e-2);
    compare(128, DType::kBF16, config_of(0, 0, type), 2e-2);
  }
}
#endif

// Coded rows, in the basis of a profile calibrated on the CPU.
KVConfig coded_config(int32_t head_dim, DType dtype, double bits) {
  const Prompt text = ids_of(400, 9);
  KVConfig kv;
  kv.value_dtype = ValueType::kCoded;
  kv.bits = bits;
  kv.sink_tokens = 3;
  kv.profile = std::make_shared<const Profile>(
      calibrate(random_model("cpu", head_dim, dtype), {&text, 1}, {}));
  return kv;
}

TEST_F(CudaSession, CodedRowsEqualTheCpu) {
  compare(16, DType::kF32, coded_config(16, DType::kF32, 3.0), 1e-4);
}

TEST_F(CudaSession, CodedRowsEqualTheCpuInBf16) {
  compare(64, DType::kBF16, coded_config(64, DType::kBF16, 4.0), 2e-2);
}

// A store made on one device is read, and added to, on the other.
TEST_F(CudaSession, CodedStatesMoveBetweenDevices) {
  const KVConfig kv = coded_config(16, DType::kF32, 4.0);
  const Model cpu = random_model("cpu", 16, DType::kF32),
              gpu = random_model("cuda", 16, DType::kF32);
  const std::filesystem::path file =
      std::filesystem::temp_directory_path() /
      ("mustafar_coded_" + std::to_string(std::random_device{}()) + ".state");
  for (const bool from_gpu : {false, true}) {
    const Model& from = from_gpu ? gpu : cpu;
    const Model& to = from_gpu ? cpu : gpu;
    Session made(from, kv);
    made.prefill(ids_of(150));
    ASSERT_GT(made.memory().compressed_tokens, 0);
    made.save(file);
    Session read = Session::load(to, file, kv.profile);
    std::filesystem::remove(file);
    EXPECT_EQ(read.memory().compressed_tokens, made.memory().compressed_tokens);
    for (const int32_t id : ids_of(5, 4)) {
      EXPECT_LE(largest_difference(made.decode(id), read.decode(id)), 1e-4)
          << "from_gpu " << from_gpu;
    }
  }
}

TEST_F(CudaSession, PruningPolicies) {
  KVConfig kv = config_of(0.6);
  kv.k_policy = PrunePolicy::kOutputAware;
  compare(16, DType::kF32, kv, 1e-4);
}

TEST_F(CudaSession, PruningByChannel) {
  KVConfig kv = config_of(0.6);
  kv.k_policy = kv.v_policy = PrunePolicy::kChannelOutputAware;
  compare(16, DType::kF32, kv, 1e-4);
}

TEST_F(CudaSession, PruningOfWholeChannels) {
  KVConfig kv = config_of(0.6);
  kv.k_policy = PrunePolicy::kChannelStructured;
  kv.v_policy = PrunePolicy::kChannelMagnitude;
  compare(16, DType::kF32, kv, 1e-4);
}

// Several sequences in one ragged call, and rows that come to the host to be scored.
TEST_F(CudaSession, ScoresSideBySide) {
  const std::vector<std::vector<int32_t>> texts = {ids_of(170, 6), ids_of(40, 7), ids_of(130, 8)};
  const Model cpu = random_model("cpu", 16, DType::kF32);
  const Model gpu = random_model("cuda", 16, DType::kF32);
  const KVConfig kv = config_of(0.5, 3);
  LogProbTable reference(texts, cpu.config().vocab_size);
  Scorer a(*cpu.impl(), cpu.impl()->cache_spec(kv)), b(*gpu.impl(), gpu.impl()->cache_spec(kv));
  const auto expected = a.score(texts, &reference), scores = b.score(texts, nullptr, &reference);
  for (size_t i = 0; i < texts.size(); i++) {
    EXPECT_LE(largest_difference(scores[i].log_probs, expected[i].log_probs), 1e-4) << i;
    EXPECT_EQ(scores[i].log_probs.size(), texts[i].size() - 1);
    for (const double divergence : scores[i].divergence) EXPECT_LE(divergence, 1e-6);
  }
  EXPECT_LE(largest_difference(Session(gpu, kv).score(texts[2]), expected[2].log_probs), 1e-4);
}

// ---- other families ----

// Random tensors whose norms are not all ones.
class UnevenNorms : public TensorSource {
 public:
  explicit UnevenNorms(const ModelConfig& config)
      : source_(random_tensors(config, DType::kF32, /*seed=*/7)) {}

  bool has(const std::string& name) const override { return source_->has(name); }
  StoredTensor tensor(const std::string& name, const std::vector<int64_t>& shape) const override {
    if (name.find("norm") == std::string::npos) return source_->tensor(name, shape);
    const std::lock_guard lock(mutex_);
    std::vector<float>& values = norms_[name];
    if (values.empty()) {
      for (int64_t i = 0; i < shape[0]; i++) {
        values.push_back(1.0f + 0.3f * std::sin(static_cast<float>(7 * i + name.size())));
      }
    }
    return {values.data(), DType::kF32};
  }

 private:
  const std::unique_ptr<TensorSource> source_;
  mutable std::mutex mutex_;
  mutable std::map<std::string, std::vector<float>> norms_;
};

// A prompt, steps and another prompt. max_tokens: of the sessions.
void compare_family(const char* name, const ModelConfig& config, const KVConfig& kv,
                    int32_t max_tokens = 300) {
  SCOPED_TRACE(name);
  const auto model_on = [](const char* device, const ModelConfig& config) {
    ModelOptions options;
    options.device = device;
    options.threads = 1;
    return make_model(config, std::make_shared<UnevenNorms>(config), options);
  };
  constexpr double kBound = 1e-5;
  const Model cpu = model_on("cpu", config), gpu = model_on("cuda", config);
  const Model llama = model_on("cpu", small_config(config.head_dim));
  Session a(cpu, kv, max_tokens), b(gpu, kv, max_tokens), other(llama, kv, max_tokens);
  const std::vector<int32_t> prompt = ids_of(43);
  EXPECT_LE(largest_difference(a.prefill(prompt), b.prefill(prompt)), kBound);
  EXPECT_GT(largest_difference(a.logits(), other.prefill(prompt)), 20 * kBound)
      << "it does nothing";
  for (const int32_t id : ids_of(4, 2)) {
    ASSERT_LE(largest_difference(a.decode(id), b.decode(id)), kBound) << a.position();
  }
  const std::vector<int32_t> more = ids_of(5, 3);
  EXPECT_LE(largest_difference(a.prefill(more), b.prefill(more)), kBound);
}

TEST_F(CudaSession, FamiliesEqualTheCpu) {
  KVConfig kv = config_of(0.5, 2);
  kv.window = 8;
  // head_dim 64 has kernels for blocks of a prompt's rows, 16 has not.
  for (const int32_t head_dim : {16, 64}) {
    const ModelConfig plain = small_config(head_dim);
    ModelConfig config = plain;
    config.traits.qk_norm = QkNorm::kHead;
    compare_family("norms of heads", config, kv);
    config.traits.qk_norm = QkNorm::kProjection;
    config.traits.norm_after = true;
    compare_family("norms after", config, kv);
    config = plain;
    config.traits.rope_layers = {true, false};
    compare_family("a layer without RoPE", config, kv);
    config = plain;
    config.traits.embedding_multiplier = 12;
    config.traits.residual_multiplier = 0.22;
    config.traits.attention_multiplier = 0.3;
    config.traits.logits_scaling = 8;
    compare_family("multipliers", config, kv);
    config = plain;
    config.rotary_dim = head_dim / 2;
    config.rope_attention_factor = 1.3;
    compare_family("a part of a head, scaled", config, kv);
    config = plain;
    config.rope_scaling = RopeScaling::kLongRope;
    config.rope_original_context = 100;
    for (int32_t i = 0; i < head_dim / 2; i++) {
      config.rope_short_factors.push_back(1.0f + 0.1f * static_cast<float>(i));
      config.rope_long_factors.push_back(2.0f + 0.3f * static_cast<float>(i));
    }
    compare_family("longrope, short", config, kv, 100);
    compare_family("longrope, long", config, kv, 101);
  }
}

// With a transform's matrices, rounded and in a batch with longrope of both kinds.
TEST_F(CudaSession, FamiliesInABatch) {
  ModelConfig config = small_config(16);
  config.traits.qk_norm = QkNorm::kHead;
  config.rope_scaling = RopeScaling::kLongRope;
  config.rope_original_context = 100;
  config.rope_short_factors.assign(8, 1.0f);
  config.rope_long_factors.assign(8, 3.0f);
  const Model gpu = testing::random_model(config, "cuda", 1, DType::kF32);
  KVConfig kv = config_of(0.5);
  kv.profile = std::make_shared<const Profile>(*Profile::hadamard(config));
  std::vector<std::vector<float>> alone;
  std::vector<Session> sessions;
  for (const int32_t max_tokens : {100, 300, 90}) {
    Session session(gpu, kv, max_tokens);
    session.prefill(ids_of(30 + max_tokens / 10));
    Session fork = session.fork();
    const auto logits = fork.decode(5);
    alone.emplace_back(logits.begin(), logits.end());
    sessions.push_back(std::move(session));
  }
  std::vector<Session*> pointers;
  for (Session& session : sessions) pointers.push_back(&session);
  const std::vector<int32_t> ids(3, 5);
  const std::vector<float> together = Session::decode_batch(pointers, ids);
  const size_t vocab = alone[0].size();
  for (size_t i = 0; i < 3; i++) {
    EXPECT_EQ(largest_difference({together.data() + i * vocab, vocab}, alone[i]), 0) << i;
  }
}

// ---- sliding windows ----

ModelConfig windowed_config(int32_t head_dim, const std::vector<bool>& layers = {},
                            int32_t window = 60) {
  ModelConfig config = small_config(head_dim);
  config.sliding_window = window;
  config.traits.window_layers = layers;
  return config;
}

// A prompt whose first blocks no one sees once it is over, steps in which a block is dropped, then
// more of both.
void compare_windows(const ModelConfig& config, DType dtype, const KVConfig& kv, double tolerance) {
  const Model cpu = testing::random_model(config, "cpu", 1, dtype);
  const Model gpu = testing::random_model(config, "cuda", 1, dtype);
  EXPECT_EQ(gpu.config().max_position_embeddings, config.max_position_embeddings);
  Session a(cpu, kv), b(gpu, kv);
  const auto prefill = [&](int64_t n, uint32_t seed) {
    const std::vector<int32_t> ids = ids_of(n, seed);
    EXPECT_LE(largest_difference(a.prefill(ids), b.prefill(ids)), tolerance) << "prompt " << seed;
  };
  const auto decode = [&](int64_t n, uint32_t seed) {
    for (const int32_t id : ids_of(n, seed)) {
      ASSERT_LE(largest_difference(a.decode(id), b.decode(id)), tolerance) << a.position();
    }
  };
  prefill(250, 1);
  decode(66, 2);
  prefill(70, 3);
  decode(2, 4);
  EXPECT_EQ(a.memory().compressed_tokens, b.memory().compressed_tokens);
  EXPECT_EQ(a.impl().cache->dropped_blocks(), b.impl().cache->dropped_blocks());
  EXPECT_EQ(b.impl().cache->dropped_blocks() > 0, config.traits.window_layers.empty());
}

TEST_F(CudaSession, WindowsInAllLayersEqualTheCpu) {
  compare_windows(windowed_config(16), DType::kF32, config_of(0.5, 4), 1e-4);
  compare_windows(windowed_config(16, {}, 20), DType::kF32, config_of(0), 1e-4);
}

TEST_F(CudaSession, WindowsInSomeLayersEqualTheCpu) {
  compare_windows(windowed_config(16, {true, false}), DType::kF32, config_of(0.5), 1e-4);
}

TEST_F(CudaSession, WindowsEqualTheCpuOnTensorCores) {
  compare_windows(windowed_config(64, {false, true}, 64), DType::kBF16, config_of(0.5, 2), 2e-2);
  compare_windows(windowed_config(64), DType::kF16, config_of(0, 4, ValueType::kInt8), 1e-2);
}

TEST_F(CudaSession, WindowsOverRaggedRowsAndQueryMagnitudesEqualTheCpu) {
  KVConfig kv = config_of(0.6, 3);
  kv.k_policy = PrunePolicy::kChannelOutputAware;
  kv.v_policy = PrunePolicy::kChannelMagnitude;
  compare_windows(windowed_config(16), DType::kF32, kv, 1e-4);
}

TEST_F(CudaSession, WindowsOverCodedRowsEqualTheCpu) {
  const ModelConfig config = windowed_config(16);
  const Prompt text = ids_of(400, 9);
  KVConfig kv;
  kv.value_dtype = ValueType::kCoded;
  kv.bits = 3.0;
  kv.sink_tokens = 3;
  kv.profile = std::make_shared<const Profile>(
      calibrate(testing::random_model(config, "cpu", 1, DType::kF32), {&text, 1}, {}));
  compare_windows(config, DType::kF32, kv, 1e-4);
}

// Bit for bit, on either kind of kernels.
TEST_F(CudaSession, WhatWindowsDropIsSeenByNoOne) {
  for (const DType dtype : {DType::kF32, DType::kF16}) {
    ModelConfig config = windowed_config(dtype == DType::kF32 ? 16 : 64);
    config.n_layers = 1;
    const Model model = testing::random_model(config, "cuda", 1, dtype);
    const auto spec = model.impl()->cache_spec(config_of(0.5, 4));
    auto keeps = std::make_shared<CacheSpec>(*spec);
    keeps->widest_window = 0;
    testing::Caller drops(model, spec, 600), whole(model, keeps, 600);
    const std::vector<int32_t> prompt = ids_of(220), more = ids_of(50, 3);
    EXPECT_EQ(drops.prefill(prompt), whole.prefill(prompt));
    for (const int32_t id : ids_of(50, 2)) EXPECT_EQ(drops.decode(id), whole.decode(id));
    EXPECT_EQ(drops.prefill(more), whole.prefill(more));
    EXPECT_EQ(drops.decode(1), whole.decode(1));
    EXPECT_GT(drops.cache.dropped_blocks(), 0);
    EXPECT_EQ(whole.cache.dropped_blocks(), 0);
  }
}

TEST_F(CudaSession, WindowsInABatchAndAState) {
  const Model cpu = testing::random_model(windowed_config(16), "cpu", 1, DType::kF32),
              gpu = testing::random_model(windowed_config(16), "cuda", 1, DType::kF32);
  const KVConfig kv = config_of(0.5, 4);
  SamplingParams params;
  params.temperature = 0;
  params.max_new_tokens = 6;
  params.ignore_eos = true;
  const std::vector<Prompt> prompts = {ids_of(140, 4), ids_of(30, 5)};
  const auto together = gpu.generate(prompts, params, kv);
  for (size_t i = 0; i < prompts.size(); i++) {
    EXPECT_EQ(gpu.generate({&prompts[i], 1}, params, kv)[0].token_ids, together[i].token_ids);
  }

  const std::filesystem::path file =
      std::filesystem::temp_directory_path() /
      ("mustafar_windows_" + std::to_string(std::random_device{}()) + ".state");
  Session made(gpu, kv);
  made.prefill(ids_of(255));
  made.save(file);
  Session read = Session::load(cpu, file), fork = made.fork();
  std::filesystem::remove(file);
  EXPECT_GT(read.impl().cache->dropped_blocks(), 0);
  for (const int32_t id : ids_of(40, 4)) {
    const auto once = made.decode(id);
    const std::vector<float> logits(once.begin(), once.end());
    EXPECT_EQ(largest_difference(fork.decode(id), logits), 0);
    EXPECT_LE(largest_difference(read.decode(id), logits), 1e-4);
  }
  made.rewind(70);  // farther than what is held: from the tokens
  Session fresh(gpu, kv);
  const std::vector<int32_t> kept = made.tokens();
  fresh.prefill(kept);
  EXPECT_EQ(largest_difference(made.decode(5), fresh.decode(5)), 0);
}

TEST_F(CudaSession, ForkRewindAndBatch) {
  const Model model = random_model("cuda", 16, DType::kF32);
  Session session(model, config_of(0.5));
  session.prefill(ids_of(120));
  Session fork = session.fork();
  const auto once = session.decode(5);
  const std::vector<float> first(once.begin(), once.end());
  EXPECT_EQ(largest_difference(fork.decode(5), first), 0);

  SamplingParams params;
  params.temperature = 0;
  params.max_new_tokens = 6;
  const std::vector<Prompt> prompts = {Prompt{ids_of(9, 4)}, Prompt{ids_of(70, 5)}};
  const auto together = model.generate(prompts, params, config_of(0.5));
  for (size_t i = 0; i < prompts.size(); i++) {
    const auto alone = model.generate({&prompts[i], 1}, params, config_of(0.5));
    EXPECT_EQ(alone[0].token_ids, together[i].token_ids);
  }
}

// A bias of 0 changes no logit but makes the sampler look at whole rows, which then come to the
// host.
TEST_F(CudaSession, SamplingOnTheDeviceChoosesTheSameTokens) {
  const Model model = random_model("cuda", 16, DType::kF32);
  for (const double temperature : {0.0, 0.9}) {
    SamplingParams params;
    params.temperature = temperature;
    params.max_new_tokens = 6;
    params.top_k = 20;
    params.seed = 3;
    params.logprobs = 2;
    SamplingParams whole = params;
    whole.logit_bias = {{5, 0.0f}};
    Session a(model, config_of(0.5)), b(model, config_of(0.5));
    const Prompt prompt = ids_of(90);
    const GenerateResult on_device = a.generate(prompt, params),
                         on_host = b.generate(prompt, whole);
    EXPECT_EQ(on_device.token_ids, on_host.token_ids) << "temperature " << temperature;
    ASSERT_EQ(on_device.logprobs.size(), on_host.logprobs.size());
    for (size_t i = 0; i < on_host.logprobs.size(); i++) {
      const TokenLogprob &x = on_device.logprobs[i], &y = on_host.logprobs[i];
      EXPECT_NEAR(x.logprob, y.logprob, 1e-4);
      ASSERT_EQ(x.top.size(), y.top.size());
      for (size_t j = 0; j < y.top.size(); j++) EXPECT_EQ(x.top[j].first, y.top[j].first);
    }
    EXPECT_FALSE(a.impl().next.whole()) << "whole rows came to the host";
    EXPECT_TRUE(b.impl().next.whole());
    // Rows that stayed on the device are there for whoever asks: here, in a fork, later.
    Session fork = a.fork();
    EXPECT_EQ(largest_difference(fork.logits(), b.logits()), 0);
    EXPECT_EQ(largest_difference(a.logits(), b.logits()), 0);
    EXPECT_EQ(a.generate(ids_of(3, 8), params).token_ids,
              b.generate(ids_of(3, 8), whole).token_ids);

    const std::vector<Prompt> prompts = {ids_of(9, 4), ids_of(20, 5)};
    const auto together = model.generate(prompts, params), rows = model.generate(prompts, whole);
    for (size_t i = 0; i < 2; i++) EXPECT_EQ(together[i].token_ids, rows[i].token_ids);
  }
}

// Nothing there expands a block for another setting.
TEST_F(CudaSession, CachesThatBecomeSparserAreRefusedByName) {
  const Model gpu = random_model("cuda", 16, DType::kF32);
  try {
    Engine engine(gpu, config_of(0.5), {.on_pressure = OnPressure::kSparser});
    FAIL() << "it was made";
  } catch (const DeviceError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("on_pressure \"sparser\" is not supported on device \"cuda\""),
              std::string::npos)
        << message;
  }
  EXPECT_NO_THROW(Engine(gpu, config_of(0.5)));
}

TEST_F(CudaSession, AnInfiniteKeyCannotBeQuantised) {
  const ModelConfig config = small_config(16);
  // Weights whose keys overflow: the largest float squared.
  class Overflowing final : public TensorSource {
   public:
    explicit Overflowing(std::shared_ptr<const TensorSource> base, int64_t kv_values)
        : base_(std::move(base)), huge_(kv_values, 3e38f) {}
    bool has(const std::string& name) const override { return base_->has(name); }
    StoredTensor tensor(const std::string& name, const std::vector<int64_t>& shape) const override {
      if (name == "model.layers.1.self_attn.k_proj.weight") return {huge_.data(), DType::kF32};
      return base_->tensor(name, shape);
    }

   private:
    std::shared_ptr<const TensorSource> base_;
    std::vector<float> huge_;
  };
  ModelOptions options;
  options.device = "cuda";
  const Model model =
      make_model(config,
                 std::make_shared<Overflowing>(
                     std::shared_ptr<const TensorSource>(random_tensors(config, DType::kF32, 7)),
                     int64_t{config.n_kv_heads} * config.head_dim * config.hidden_size),
                 options);
  Session session(model, config_of(0.5, 0, ValueType::kInt8));
  try {
    session.prefill(ids_of(100));
    FAIL() << "an infinite key was quantised";
  } catch (const StateError& error) {
    EXPECT_NE(std::string(error.what()).find("key of layer 1 at position 0"), std::string::npos)
        << error.what();
  }
  EXPECT_EQ(session.position(), 0);
}

}  // namespace
}  // namespace mustafar
