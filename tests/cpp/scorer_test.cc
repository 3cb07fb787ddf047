// Scoring many sequences side by side: what each gets is what it gets alone, and what decode sees.
#include "runtime/scorer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "mustafar/error.h"
#include "mustafar/profile.h"
#include "mustafar/session.h"
#include "support/random_model.h"

namespace mustafar {
namespace {

using testing::kSmallVocab;

Model small_model(DType dtype, int64_t kv_budget = 0) {
  return testing::random_model(testing::small_config(), "cpu", 2, dtype, kv_budget);
}

// Sequences of different lengths: some end in the window, some on a block's edge.
std::vector<std::vector<int32_t>> texts() {
  std::mt19937 random(3);
  std::vector<std::vector<int32_t>> texts;
  for (const size_t n : {225, 2, 97, 130, 40, 161, 33, 98}) {
    for (int32_t& id : texts.emplace_back(n)) id = static_cast<int32_t>(random() % kSmallVocab);
  }
  return texts;
}

struct Case {
  const char* name;
  DType dtype;
  KVConfig kv;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](const char* name, DType dtype, double sparsity) -> KVConfig& {
    all.push_back({name, dtype, {}});
    all.back().kv.sparsity = sparsity;
    return all.back().kv;
  };
  add("dense", DType::kF32, 0);
  add("group", DType::kF32, 0.5);
  add("bf16", DType::kBF16, 0.5);
  KVConfig& row = add("row", DType::kF32, 0.7);
  row.pattern = Pattern::kRow;
  row.window = 0;
  row.sink_tokens = 4;
  KVConfig& int4 = add("int4", DType::kF32, 0);
  int4.value_dtype = ValueType::kInt4;
  int4.sink_tokens = 70;
  KVConfig& aware = add("output_aware", DType::kF32, 0.5);
  aware.k_policy = PrunePolicy::kOutputAware;
  KVConfig& turned = add("hadamard", DType::kF32, 0.5);
  turned.profile = Profile::hadamard(small_model(DType::kF32).config());
  return all;
}

class ScorerTest : public ::testing::TestWithParam<Case> {
 protected:
  const Model model_ = small_model(GetParam().dtype);
  Model::Impl& engine_ = *model_.impl();
};

INSTANTIATE_TEST_SUITE_P(Configs, ScorerTest, ::testing::ValuesIn(cases()),
                         [](const auto& info) { return info.param.name; });

// Log-softmax in double.
std::vector<double> log_softmax(std::span<const float> logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float x : logits) sum += std::exp(x - top);
  std::vector<double> out;
  for (float x : logits) out.push_back(x - top - std::log(sum));
  return out;
}

TEST_P(ScorerTest, OneAtATimeSideBySideAndDecodeAgree) {
  const auto sequences = texts();
  const double tolerance = GetParam().dtype == DType::kF32 ? 2e-5 : 2e-2;
  Scorer scorer(engine_, engine_.cache_spec(GetParam().kv));
  LogProbTable table(sequences, kSmallVocab);
  const std::vector<TokenScores> together = scorer.score(sequences, &table);
  for (size_t i = 0; i < sequences.size(); i++) {
    const std::vector<int32_t>& ids = sequences[i];
    const std::vector<TokenScores> alone = scorer.score({&ids, 1});
    ASSERT_EQ(together[i].log_probs.size(), ids.size() - 1);
    const std::vector<float> by_session = Session(model_, GetParam().kv).score(ids);
    Session session(model_, GetParam().kv);
    for (size_t p = 0; p + 1 < ids.size(); p++) {
      const std::vector<double> seen = log_softmax(session.decode(ids[p]));
      const double expected = seen[ids[p + 1]];
      EXPECT_NEAR(together[i].log_probs[p], alone[0].log_probs[p], 1e-5) << i << " at " << p;
      EXPECT_EQ(alone[0].log_probs[p], by_session[p]) << i << " at " << p;
      EXPECT_NEAR(together[i].log_probs[p], expected, tolerance) << i << " at " << p;
      EXPECT_GE(seen[together[i].top[p]], *std::max_element(seen.begin(), seen.end()) - tolerance);
      for (int32_t id = 0; id < kSmallVocab; id += 7) {
        EXPECT_NEAR(table.row(i, p)[id], seen[id], tolerance) << i << " at " << p << " of " << id;
      }
    }
  }
}

TEST_P(ScorerTest, DivergenceIsThatOfTheDistributions) {
  const auto sequences = texts();
  KVConfig dense;
  dense.sparsity = 0;
  LogProbTable reference(sequences, kSmallVocab), own(sequences, kSmallVocab);
  Scorer(engine_, engine_.cache_spec(dense)).score(sequences, &reference);
  Scorer scorer(engine_, engine_.cache_spec(GetParam().kv));
  const std::vector<TokenScores> scores = scorer.score(sequences, &own, &reference);
  double sum = 0;
  for (size_t i = 0; i < sequences.size(); i++) {
    for (size_t p = 0; p + 1 < sequences[i].size(); p++) {
      double expected = 0;
      for (int32_t id = 0; id < kSmallVocab; id++) {
        const double log_p = reference.row(i, p)[id];
        expected += std::exp(log_p) * (log_p - own.row(i, p)[id]);
      }
      EXPECT_NEAR(scores[i].divergence[p], std::max(expected, 0.0), 1e-6 + 1e-5 * expected);
      sum += scores[i].divergence[p];
    }
  }
  if (std::string(GetParam().name) == "dense") {
    EXPECT_EQ(sum, 0);
  } else {
    EXPECT_GT(sum, 0);
  }
}

TEST(Scorer, RowsComeInOrderAndOnce) {
  const Model model = small_model(DType::kF32);
  const auto sequences = texts();
  std::vector<int64_t> next(sequences.size(), 0);
  Scorer scorer(*model.impl(), model.impl()->cache_spec({}));
  int64_t last = 0, total = 0;
  scorer.between = [&](int64_t done, int64_t all) {
    EXPECT_GE(done, last);
    last = done;
    total = all;
  };
  scorer.run(sequences, [&](std::span<const Scorer::Row> rows, const float*) {
    for (const Scorer::Row& row : rows) EXPECT_EQ(row.position, next[row.sequence]++);
  });
  int64_t expected = 0;
  for (size_t i = 0; i < sequences.size(); i++) {
    EXPECT_EQ(next[i], static_cast<int64_t>(sequences[i].size()) - 1);
    expected += next[i];
  }
  EXPECT_EQ(last, expected);
  EXPECT_EQ(total, expected);
}

// With room for one cache at a time the sequences follow one another, and the scores are the same.
TEST(Scorer, KeepsToTheBudget) {
  const auto sequences = texts();
  KVConfig kv;
  kv.sparsity = 0.5;
  const Model roomy = small_model(DType::kF32);
  const CacheSpec spec = *roomy.impl()->cache_spec(kv);
  const int64_t one = SequenceCache::bytes_for(spec, 96, 225) + (int64_t{64} << 10);
  const Model tight = small_model(DType::kF32, one);
  Scorer a(*roomy.impl(), roomy.impl()->cache_spec(kv));
  Scorer b(*tight.impl(), tight.impl()->cache_spec(kv));
  const auto with_room = a.score(sequences), without = b.score(sequences);
  for (size_t i = 0; i < sequences.size(); i++) {
    for (size_t p = 0; p + 1 < sequences[i].size(); p++) {
      EXPECT_NEAR(with_room[i].log_probs[p], without[i].log_probs[p], 1e-5);
    }
  }
  EXPECT_GT(roomy.memory().kv_peak_bytes, one);
  EXPECT_LE(tight.memory().kv_peak_bytes, one);
}

TEST(Scorer, CanBeStopped) {
  const Model model = small_model(DType::kF32);
  Scorer scorer(*model.impl(), model.impl()->cache_spec({}));
  scorer.between = [](int64_t done, int64_t) {
    if (done > 100) throw Cancelled("enough");
  };
  EXPECT_THROW(scorer.score(texts()), Cancelled);
  scorer.between = {};
  EXPECT_EQ(scorer.score(texts()).size(), texts().size());
  EXPECT_EQ(model.memory().kv_bytes, 0);
}

}  // namespace
}  // namespace mustafar
