#include "mustafar/kv_config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace mustafar {
namespace {

std::string refusal(const KVConfig& config) {
  try {
    config.validate();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

TEST(KVConfigTest, AcceptsTheDefaultAndTheEdges) {
  KVConfig config;
  EXPECT_EQ(refusal(config), "accepted");
  config.sparsity = 0.0;
  config.k_sparsity = std::nextafter(1.0, 0.0);
  config.window = 0;
  config.sink_tokens = 4;
  config.k_policy = PrunePolicy::kChannelStructured;
  config.v_policy = PrunePolicy::kChannelOutputAware;
  EXPECT_EQ(refusal(config), "accepted");
}

TEST(KVConfigTest, SparsityOfKeysAndValuesOverridesTheCommonOne) {
  KVConfig config;
  config.sparsity = 0.7;
  EXPECT_EQ(config.effective_k_sparsity(), 0.7);
  config.v_sparsity = 0.0;
  EXPECT_EQ(config.effective_v_sparsity(), 0.0);
  EXPECT_EQ(config.effective_k_sparsity(), 0.7);
}

TEST(KVConfigTest, RefusesSparsityOutsideItsRangeByName) {
  for (const double bad : {-0.1, 1.0, 1.5, double{NAN}, double{INFINITY}}) {
    KVConfig config;
    config.sparsity = bad;
    EXPECT_NE(refusal(config).find("sparsity must be at least 0 and less than 1"),
              std::string::npos)
        << bad << ": " << refusal(config);
    config.sparsity = 0.5;
    config.k_sparsity = bad;
    EXPECT_EQ(refusal(config).rfind("k_sparsity", 0), 0u) << refusal(config);
    config.k_sparsity.reset();
    config.v_sparsity = bad;
    EXPECT_EQ(refusal(config).rfind("v_sparsity", 0), 0u) << refusal(config);
  }
}

TEST(KVConfigTest, RefusesBadWindowSinksAndPolicies) {
  KVConfig config;
  config.window = -1;
  EXPECT_EQ(refusal(config), "window must be between 0 and 16777216 tokens, not -1");
  config = {};
  config.sink_tokens = std::numeric_limits<int32_t>::max();
  EXPECT_EQ(refusal(config), "sink_tokens must be between 0 and 16777216 tokens, not 2147483647");
  for (const PrunePolicy policy : {PrunePolicy::kOutputAware, PrunePolicy::kChannelStructured}) {
    config = {};
    config.k_policy = policy;
    EXPECT_EQ(refusal(config), "accepted");
    config.v_policy = policy;
    EXPECT_NE(refusal(config).find(name_of(policy)), std::string::npos) << refusal(config);
  }
}

TEST(KVConfigTest, CodedTakesBitsInPlaceOfSparsity) {
  KVConfig config;
  config.value_dtype = ValueType::kCoded;
  EXPECT_EQ(refusal(config), "accepted");
  config.bits = 7.5;
  EXPECT_EQ(refusal(config), "bits must be between 1 and 7 (bits of a dim, on average), not 7.5");
  config.bits = 2;
  config.k_bits = 0.5;
  EXPECT_EQ(refusal(config), "k_bits must be between 1 and 7 (bits of a dim, on average), not 0.5");
  config.k_bits = 4;
  EXPECT_EQ(refusal(config), "accepted");
  EXPECT_EQ(config.effective_k_bits(), 4);
  EXPECT_EQ(config.effective_v_bits(), 2);
  config.v_sparsity = 0.5;
  EXPECT_NE(refusal(config).find("sparsity must be 0"), std::string::npos) << refusal(config);
  config.v_sparsity.reset();
  config.value_dtype = ValueType::kInt8;
  EXPECT_EQ(refusal(config), "k_bits applies to value_dtype \"coded\" alone, not to \"int8\"");
}

TEST(KVConfigTest, ABudgetTakesThePlaceOfBits) {
  KVConfig config;
  config.value_dtype = ValueType::kCoded;
  config.budget_bytes_per_token = 4680;
  EXPECT_EQ(refusal(config), "accepted");
  EXPECT_TRUE(config.budgeted());
  config.k_bits = 3;
  EXPECT_EQ(refusal(config), "budget_bytes_per_token takes the place of k_bits: give one of them");
  config.k_bits.reset();
  config.bits = 2;
  EXPECT_EQ(refusal(config), "budget_bytes_per_token takes the place of bits: give one of them");
  config.bits = KVConfig().bits;
  config.max_kld = 0.01;
  EXPECT_NE(refusal(config).find("max_kld"), std::string::npos);
  config.budget_bytes_per_token.reset();
  EXPECT_EQ(refusal(config), "accepted");
  config.max_kld = 0;
  EXPECT_EQ(refusal(config), "max_kld must be more than 0, not 0");
  config.max_kld = std::nan("");
  EXPECT_NE(refusal(config).find("max_kld must be more than 0"), std::string::npos);
  config.max_kld = 0.01;
  config.value_dtype = ValueType::kInt8;
  EXPECT_EQ(refusal(config), "max_kld applies to value_dtype \"coded\" alone, not to \"int8\"");
}

TEST(KVConfigTest, NamesParseBack) {
  for (const Pattern pattern : {Pattern::kGroup, Pattern::kRow}) {
    EXPECT_EQ(parse_pattern(name_of(pattern)), pattern);
  }
  for (const ValueType type : {ValueType::kAuto, ValueType::kF32, ValueType::kF16, ValueType::kBF16,
                               ValueType::kInt8, ValueType::kInt4, ValueType::kCoded}) {
    EXPECT_EQ(parse_value_type(name_of(type)), type);
  }
  for (const PrunePolicy policy :
       {PrunePolicy::kMagnitude, PrunePolicy::kOutputAware, PrunePolicy::kChannelMagnitude,
        PrunePolicy::kChannelOutputAware, PrunePolicy::kChannelStructured}) {
    EXPECT_EQ(parse_prune_policy(name_of(policy)), policy);
  }
  EXPECT_STREQ(name_of(ValueType::kBF16), "bf16");
  EXPECT_STREQ(name_of(PrunePolicy::kChannelOutputAware), "channel_output_aware");
}

TEST(KVConfigTest, UnknownNamesListTheChoices) {
  try {
    parse_value_type("q8_0");
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(),
                 "value_dtype must be one of auto, f32, f16, bf16, int8, int4, coded, not "
                 "\"q8_0\"");
  }
  EXPECT_THROW(parse_pattern("Group"), std::invalid_argument);
  EXPECT_THROW(parse_prune_policy(""), std::invalid_argument);
}

}  // namespace
}  // namespace mustafar
