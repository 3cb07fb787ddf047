// The largest logits against top_select, the sampler's own.
#include "cuda/top_logits.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "device_memory.h"
#include "runtime/top_select.h"

namespace mustafar::cuda {
namespace {

struct Row {
  TopSummary summary;
  std::vector<TopPair> pairs;
};

std::vector<Row> top_of(const std::vector<float>& logits, int64_t n, int32_t k) {
  const int64_t vocab = static_cast<int64_t>(logits.size()) / n;
  const DeviceArray<float> in(logits, "the logits");
  DeviceMemory scratch(top_logits_scratch_bytes(n, vocab, k), "scratch");
  DeviceMemory out(n * top_logits_row_bytes(k), "the output");
  top_logits(in.device(), n, vocab, k, scratch.device(), out.device(), nullptr);
  scratch.download();
  out.download();
  std::vector<Row> rows(n);
  for (int64_t i = 0; i < n; i++) {
    const uint8_t* from = out.host() + i * top_logits_row_bytes(k);
    std::memcpy(&rows[i].summary, from, sizeof(TopSummary));
    rows[i].pairs.resize(k);
    std::memcpy(rows[i].pairs.data(), from + sizeof(TopSummary), k * sizeof(TopPair));
  }
  return rows;
}

// Many ties, both zeros, some -Inf.
std::vector<float> random_logits(int64_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> logits(n);
  for (float& x : logits) {
    x = normal(random);
    if (random() % 2 == 0) x = std::round(x) * (random() % 2 == 0 ? 1.0f : -1.0f);
    if (random() % 16 == 0) x = -INFINITY;
  }
  return logits;
}

TEST(TopLogits, EqualTheSamplersSelection) {
  struct Case {
    int64_t n, vocab;
    int32_t k;
  };
  // One chunk and many; one merge and two.
  std::vector<Case> cases = {{2, 1, 1},     {3, 1000, 1},   {2, 97, 97},      {2, 5000, 40},
                             {1, 32000, 1}, {2, 9000, 512}, {1, kTopChunk, 7}};
  if (kOnDevice) cases.insert(cases.end(), {{8, 128256, 40}, {32, 128256, 1}, {3, 49152, 512}});
  for (const Case& c : cases) {
    const std::vector<float> logits = random_logits(c.n * c.vocab, static_cast<uint32_t>(c.vocab));
    set_schedule(static_cast<uint32_t>(c.k));
    const std::vector<Row> rows = top_of(logits, c.n, c.k);
    for (int64_t i = 0; i < c.n; i++) {
      SCOPED_TRACE(std::to_string(c.vocab) + " logits, k " + std::to_string(c.k));
      const std::span<const float> row{logits.data() + i * c.vocab, static_cast<size_t>(c.vocab)};
      std::vector<int32_t> expected;
      top_select(row, c.k, expected);
      if (row[expected[0]] == -INFINITY) continue;
      double sum = 0;
      for (const float x : row) sum += std::exp(double{x} - row[expected[0]]);
      EXPECT_EQ(rows[i].summary.regular, 1);
      EXPECT_NEAR(rows[i].summary.exp_sum, sum, 1e-5 * sum);
      for (int32_t j = 0; j < c.k; j++) {
        ASSERT_EQ(rows[i].pairs[j].id, expected[j]) << "place " << j;
        ASSERT_EQ(rows[i].pairs[j].value, row[expected[j]]) << "place " << j;
      }
    }
  }
}

TEST(TopLogits, IrregularRowsAreMarked) {
  constexpr int64_t kVocab = 3000;
  std::vector<float> logits = random_logits(5 * kVocab, 1);
  logits[17] = NAN;
  logits[kVocab + 2500] = INFINITY;
  std::fill_n(logits.begin() + 2 * kVocab, kVocab, -INFINITY);
  logits[3 * kVocab + 2999] = -NAN;
  const std::vector<Row> rows = top_of(logits, 5, 3);
  for (int i = 0; i < 5; i++) EXPECT_EQ(rows[i].summary.regular, i == 4 ? 1 : 0) << i;
}

}  // namespace
}  // namespace mustafar::cuda
