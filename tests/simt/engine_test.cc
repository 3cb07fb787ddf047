// The serving engine on the CUDA backend: every request gets what a session of its own gets there,
// whoever joins, leaves, shares a prefix or is paused meanwhile. Under the host harness, and in a
// CUDA build on the device, where there is one. In f32, where no product depends on how many rows
// are multiplied at once.
#include "mustafar/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "mustafar/session.h"
#include "support/asked.h"
#include "support/on_cuda.h"
#include "support/random_model.h"
#include "support/sampling.h"

namespace mustafar {
namespace {

using testing::alone;
using testing::Asked;
using testing::greedy;
using testing::half;
using testing::ids_of;
using testing::sampled;

Model small_model(int64_t kv_budget = 0, const char* weights = "auto") {
  const ModelConfig config = testing::small_config({.hidden_size = 32,
                                                    .intermediate_size = 40,
                                                    .n_layers = 1,
                                                    .vocab_size = testing::kSmallVocab,
                                                    .max_position_embeddings = 400});
  return testing::random_model(config, "cuda", 1, DType::kF32, kv_budget, weights);
}

class CudaEngine : public testing::OnCuda {};

KVConfig dense_int8() {
  KVConfig kv;
  kv.value_dtype = ValueType::kInt8;
  return kv;
}

// Requests of all lengths, greedy ones among them; some prompts in two calls, of which the first is
// the same for several.
std::vector<Asked> traffic(int n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<Asked> requests;
  for (int i = 0; i < n; i++) {
    Asked request;
    if (i % 3 == 0) {
      request.ids = ids_of(72, 1000);
      request.prefixes = {72};
    }
    const std::vector<int32_t> rest = ids_of(1 + random() % 70, random());
    request.ids.insert(request.ids.end(), rest.begin(), rest.end());
    const int32_t n_new = 1 + static_cast<int32_t>(random() % 12);
    request.params = i % 2 == 0 ? greedy(n_new) : sampled(n_new, random());
    request.params.top_k = i % 4 == 1 ? 5 : 0;  // of whole rows, and of the largest alone
    requests.push_back(request);
  }
  return requests;
}

// That every request gets what it gets alone. Returns the engine's counts.
EngineStats expect_alone(const Model& model, const Model& free, const KVConfig& kv,
                         const EngineOptions& options, const std::vector<Asked>& requests) {
  Engine engine(model, kv, options);
  std::vector<Request> running;
  for (const Asked& each : requests) {
    running.push_back(engine.submit(each.ids, each.params, {.prefixes = each.prefixes}));
  }
  std::vector<GenerateResult> made;
  for (const Request& request : running) made.push_back(request.result());
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.failed, 0);
  engine.close();
  EXPECT_EQ(model.memory().kv_bytes, 0);
  for (size_t i = 0; i < requests.size(); i++) {
    const GenerateResult expected = alone(free, kv, requests[i]);
    EXPECT_EQ(made[i].token_ids, expected.token_ids) << "request " << i;
    EXPECT_EQ(made[i].finish_reason, expected.finish_reason) << "request " << i;
  }
  return stats;
}

TEST_F(CudaEngine, RequestsGetWhatTheyGetAlone) {
  const Model model = small_model();
  const std::vector<Asked> requests = traffic(8, 3);
  const EngineStats stats =
      expect_alone(model, model, half(), {.max_batch = 5, .prefill_tokens = 90}, requests);
  EXPECT_EQ(stats.finished, 8);
  EXPECT_GT(stats.reused_tokens, 0) << "no prefix was shared";
}

// More sequences than a pass over the codes takes.
TEST_F(CudaEngine, WideBatchesOfIntegerWeights) {
  const Model model = small_model(0, "int4");
  std::vector<Asked> requests;
  for (int i = 0; i < 17; i++) {
    requests.push_back({ids_of(2 + i % 5, 50 + static_cast<uint32_t>(i)), {}, greedy(4)});
  }
  expect_alone(model, model, dense_int8(), {.max_batch = 17, .prefill_tokens = 400}, requests);
}

// Memory for some of them at a time: the youngest wait, computed again or kept on the host.
TEST_F(CudaEngine, ShortMemoryChangesNoResult) {
  const Model free = small_model();
  std::vector<Asked> requests;
  int64_t need = 0, prompt_tokens = 0;
  for (int i = 0; i < 3; i++) {
    requests.push_back({ids_of(4 + i, 80 + static_cast<uint32_t>(i)), {}, greedy(190)});
    Session session(free, half());
    session.prefill(ids_of(200));
    need = std::max(need, session.memory().allocated);
    prompt_tokens += static_cast<int64_t>(requests.back().ids.size());
  }
  for (const int64_t swap_bytes : {int64_t{0}, int64_t{1} << 30}) {
    const Model model = small_model(2 * need);
    const EngineStats stats = expect_alone(
        model, free, half(), {.prefill_tokens = 64, .swap_bytes = swap_bytes}, requests);
    EXPECT_LE(model.memory().kv_peak_bytes, 2 * need);
    if (swap_bytes == 0) {
      EXPECT_GT(stats.prompt_tokens, prompt_tokens) << "nobody was paused";
    }
  }
}

TEST_F(CudaEngine, ARequestThatIsCancelledLeavesTheOthers) {
  const Model model = small_model();
  Engine engine(model, half());
  const Asked kept = {ids_of(40, 5), {}, greedy(12)};
  Request first = engine.submit(kept.ids, kept.params);
  Request second = engine.submit(ids_of(50, 6), greedy(300));
  while (second.tokens_from(0).size() < 3) second.text_from(0, 0.01);
  second.cancel();
  EXPECT_EQ(second.result().finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(first.result().token_ids, alone(model, half(), kept).token_ids);
}

}  // namespace
}  // namespace mustafar
