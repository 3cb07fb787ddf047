#include "io/model_config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "mustafar/error.h"
#include "support/model_folder.h"

namespace mustafar {
namespace {

using nlohmann::json;
using testing::TemporaryFolder;
using testing::tiny_config;

ModelConfig read(const json& config, const std::string& generation = "") {
  TemporaryFolder folder;
  folder.write("config.json", config.dump());
  if (!generation.empty()) folder.write("generation_config.json", generation);
  return read_model_config(folder.path());
}

json changed(const std::string& patch) {
  json config = tiny_config();
  const json fields = json::parse(patch);
  for (const auto& [name, value] : fields.items()) {
    // A value of "REMOVE" takes the field away; null stays null.
    if (value == "REMOVE")
      config.erase(name);
    else
      config[name] = value;
  }
  return config;
}

TEST(ModelConfigTest, ReadsLlama) {
  const ModelConfig config = read(tiny_config());
  EXPECT_EQ(config.model_type, "llama");
  EXPECT_EQ(config.hidden_size, 8);
  EXPECT_EQ(config.intermediate_size, 12);
  EXPECT_EQ(config.n_layers, 2);
  EXPECT_EQ(config.n_heads, 4);
  EXPECT_EQ(config.n_kv_heads, 2);
  EXPECT_EQ(config.head_dim, 2);
  EXPECT_EQ(config.vocab_size, 10);
  EXPECT_EQ(config.max_position_embeddings, 64);
  EXPECT_EQ(config.rms_norm_eps, 1e-5);
  EXPECT_EQ(config.rope_theta, 10000.0);
  EXPECT_EQ(config.rope_scaling, RopeScaling::kNone);
  EXPECT_FALSE(config.qkv_bias || config.o_bias || config.mlp_bias);
  EXPECT_FALSE(config.tie_word_embeddings);
  EXPECT_EQ(config.torch_dtype, "float32");
  EXPECT_EQ(config.bos_token_id, 1);
  EXPECT_EQ(config.eos_token_ids, std::vector<int32_t>{2});
}

TEST(ModelConfigTest, FillsInWhatOldFoldersLack) {
  const ModelConfig config = read(changed(
      R"({"num_key_value_heads":"REMOVE","rope_theta":"REMOVE","max_position_embeddings":"REMOVE",
          "rms_norm_eps":"REMOVE","torch_dtype":"REMOVE","bos_token_id":null,"eos_token_id":null,
          "hidden_act":"REMOVE","tie_word_embeddings":"REMOVE","rope_scaling":null})"));
  EXPECT_EQ(config.n_kv_heads, 4);
  EXPECT_EQ(config.rope_theta, 10000.0);
  EXPECT_EQ(config.max_position_embeddings, 2048);
  EXPECT_EQ(config.rms_norm_eps, 1e-6);
  EXPECT_EQ(config.torch_dtype, "");
  EXPECT_EQ(config.bos_token_id, -1);
  EXPECT_TRUE(config.eos_token_ids.empty());
}

TEST(ModelConfigTest, ReadsAnExplicitHeadDim) {
  EXPECT_EQ(read(changed(R"({"head_dim":6})")).head_dim, 6);
  EXPECT_EQ(read(changed(R"({"head_dim":6,"hidden_size":9})")).head_dim, 6);
  EXPECT_EQ(read(changed(R"({"head_dim":null})")).head_dim, 2);
}

TEST(ModelConfigTest, ReadsBiases) {
  const ModelConfig llama = read(changed(R"({"attention_bias":true,"mlp_bias":true})"));
  EXPECT_TRUE(llama.qkv_bias && llama.o_bias && llama.mlp_bias);
  const ModelConfig qwen2 =
      read(changed(R"({"model_type":"qwen2","architectures":["Qwen2ForCausalLM"]})"));
  EXPECT_TRUE(qwen2.qkv_bias);
  EXPECT_FALSE(qwen2.o_bias || qwen2.mlp_bias);
}

// As transformers does: whoever saved the folder wrote what he liked into "architectures".
TEST(ModelConfigTest, TheModelTypeDecides) {
  for (const char* names : {R"(["LLaMAForCausalLM"])", R"(["LlamaModel"])", "[]", "3",
                            R"(["LlamaForCausalLM","LlamaModel"])", R"(["MistralForCausalLM"])"}) {
    EXPECT_EQ(read(changed(std::string("{\"architectures\":") + names + "}")).model_type, "llama");
  }
}

TEST(ModelConfigTest, EitherNameOfTheArchitectureIsEnough) {
  EXPECT_EQ(read(changed(R"({"architectures":"REMOVE"})")).model_type, "llama");
  EXPECT_EQ(read(changed(R"({"model_type":"REMOVE"})")).model_type, "llama");
}

TEST(ModelConfigTest, CollectsEndIdsOfBothFiles) {
  const json config = changed(R"({"eos_token_id":[7,2],"bos_token_id":null})");
  const ModelConfig read_config = read(config, R"({"eos_token_id":[2,9],"bos_token_id":3})");
  EXPECT_EQ(read_config.eos_token_ids, (std::vector<int32_t>{7, 2, 9}));
  EXPECT_EQ(read_config.bos_token_id, 3);
  EXPECT_EQ(read(config, "{}").eos_token_ids, (std::vector<int32_t>{7, 2}));
}

TEST(ModelConfigTest, IdsThatNoTokenHasMeanNone) {
  const ModelConfig config = read(changed(R"({"eos_token_id":-1,"bos_token_id":-1})"), "{}");
  EXPECT_TRUE(config.eos_token_ids.empty());
  EXPECT_EQ(config.bos_token_id, -1);
  EXPECT_EQ(read(changed(R"({"eos_token_id":[3,-1,10]})")).eos_token_ids, std::vector<int32_t>{3});
}

TEST(ModelConfigTest, WholeFloatsAreIntegers) {
  const ModelConfig config = read(changed(R"({"vocab_size":10.0,"hidden_size":8.0})"));
  EXPECT_EQ(config.vocab_size, 10);
  EXPECT_EQ(config.hidden_size, 8);
}

TEST(ModelConfigTest, SamplingOfTheFolder) {
  const SamplingDefaults none = read(tiny_config(), R"({"eos_token_id":5})").sampling;
  EXPECT_FALSE(none.temperature || none.top_k || none.top_p || none.min_p ||
               none.repetition_penalty || none.presence_penalty || none.frequency_penalty);
  const SamplingDefaults given =
      read(tiny_config(), R"({"do_sample":true,"temperature":0.6,"top_k":20.0,"top_p":0.9,
                              "min_p":null,"repetition_penalty":1.05})")
          .sampling;
  EXPECT_EQ(given.temperature, 0.6);
  EXPECT_EQ(given.top_k, 20);
  EXPECT_EQ(given.top_p, 0.9);
  EXPECT_FALSE(given.min_p);
  EXPECT_EQ(given.repetition_penalty, 1.05);
  EXPECT_EQ(read(tiny_config(), R"({"do_sample":false,"temperature":0.6})").sampling.temperature,
            0.0);
  EXPECT_EQ(read(tiny_config(), R"({"top_k":-1})").sampling.top_k, 0);
  EXPECT_MODEL_ERROR(read(tiny_config(), R"({"top_p":1.5})"),
                     "generation_config.json: \"top_p\": expected a number from 0 to 1");
  EXPECT_MODEL_ERROR(read(tiny_config(), R"({"temperature":"hot"})"),
                     "\"temperature\": expected a number that is 0 or more");
}

// What Python's json module writes for numbers that are none.
TEST(ModelConfigTest, NamedNumbersInFieldsThatNobodyReads) {
  TemporaryFolder folder;
  std::string text = tiny_config().dump();
  text.insert(1, R"("limit":[0.0,Infinity,-Infinity],"a \" NaN":"x, NaN","aux":NaN,)");
  folder.write("config.json", text);
  folder.write("generation_config.json", R"({"note":-Infinity,"eos_token_id":5})");
  EXPECT_EQ(read_model_config(folder.path()).model_type, "llama");
  json config = tiny_config();
  config.erase("rope_theta");
  text = config.dump();
  text.insert(1, R"("rope_theta":NaN,)");
  folder.write("config.json", text);
  EXPECT_MODEL_ERROR(read_model_config(folder.path()),
                     "\"rope_theta\": expected a number above 0.0, found the string \"NaN\"");
}

TEST(ModelConfigTest, ReadsBothSpellingsOfRope) {
  const ModelConfig classic = read(changed(
      R"({"rope_theta":500000.0,"rope_scaling":{"rope_type":"llama3","factor":32.0,
          "low_freq_factor":1.0,"high_freq_factor":4.0,
          "original_max_position_embeddings":8192}})"));
  const ModelConfig today = read(changed(
      R"({"rope_theta":"REMOVE","torch_dtype":"REMOVE","dtype":"bfloat16",
          "rope_parameters":{"rope_theta":500000.0,"rope_type":"llama3","factor":32.0,
          "low_freq_factor":1.0,"high_freq_factor":4.0,
          "original_max_position_embeddings":8192}})"));
  for (const ModelConfig& config : {classic, today}) {
    EXPECT_EQ(config.rope_scaling, RopeScaling::kLlama3);
    EXPECT_EQ(config.rope_theta, 500000.0);
    EXPECT_EQ(config.rope_factor, 32.0);
    EXPECT_EQ(config.rope_original_context, 8192);
  }
  EXPECT_EQ(today.torch_dtype, "bfloat16");
  EXPECT_EQ(read(changed(R"({"rope_parameters":{"rope_type":"default","rope_theta":5.0},
                             "rope_theta":"REMOVE"})"))
                .rope_theta,
            5.0);
  const ModelConfig linear = read(changed(R"({"rope_scaling":{"type":"linear","factor":2.5}})"));
  EXPECT_EQ(linear.rope_scaling, RopeScaling::kLinear);
  EXPECT_EQ(linear.rope_factor, 2.5);
}

TEST(ModelConfigTest, FrequenciesOfEveryScaling) {
  ModelConfig config;
  config.head_dim = 4;
  config.rope_theta = 10000.0;
  EXPECT_EQ(config.rope_inverse_frequencies(), (std::vector<float>{1.0f, 0.01f}));
  config.rope_scaling = RopeScaling::kLinear;
  config.rope_factor = 4.0;
  EXPECT_EQ(config.rope_inverse_frequencies(), (std::vector<float>{0.25f, 0.0025f}));
  // llama3: a short wave stays, a long one is divided, one in between is interpolated.
  config.rope_scaling = RopeScaling::kLlama3;
  config.rope_original_context = 1000;
  config.rope_low_freq_factor = 1.0;
  config.rope_high_freq_factor = 4.0;
  std::vector<float> frequencies = config.rope_inverse_frequencies();
  EXPECT_EQ(frequencies[0], 1.0f);
  const double turns = 1000 / (2 * M_PI / 0.01), smooth = (turns - 1) / 3;
  EXPECT_NEAR(frequencies[1], (1 - smooth) * 0.01 / 4 + smooth * 0.01, 1e-9);
  config.rope_original_context = 600;
  EXPECT_EQ(config.rope_inverse_frequencies()[1], 0.0025f);
}

TEST(ModelConfigTest, LlamaHasNoWindow) {
  read(changed(R"({"sliding_window":16,"use_sliding_window":false})"));
  read(changed(R"({"sliding_window":"16","layer_types":["sliding_attention"]})"));
}

TEST(ModelConfigTest, WindowsThatCannotActAreAccepted) {
  const std::string mistral = R"("model_type":"mistral","architectures":["MistralForCausalLM"])";
  const std::string qwen2 = R"("model_type":"qwen2","architectures":["Qwen2ForCausalLM"])";
  read(changed("{" + mistral + R"(,"sliding_window":null,"max_position_embeddings":32768})"));
  read(changed("{" + mistral + R"(,"sliding_window":4096,"max_position_embeddings":4096})"));
  read(changed("{" + mistral + R"(,"max_position_embeddings":4096})"));
  read(changed("{" + qwen2 + R"(,"sliding_window":16,"use_sliding_window":false})"));
  read(changed("{" + qwen2 + R"(,"sliding_window":16,"use_sliding_window":true,
                                 "max_window_layers":2})"));
  read(changed("{" + qwen2 + R"(,"sliding_window":16,
                                 "layer_types":["full_attention","full_attention"]})"));
}

TEST(ModelConfigTest, TheWindowThatAFamilyHas) {
  const auto window = [](const std::string& patch) {
    const ModelConfig config = read(changed(patch));
    EXPECT_EQ(config.max_position_embeddings, 32768);
    EXPECT_EQ(config.sliding_window == 0, config.layers_with_windows().empty());
    return config.sliding_window;
  };
  const std::string long_context = R"("max_position_embeddings":32768,)";
  EXPECT_EQ(window("{" + long_context + R"("model_type":"mistral","sliding_window":32})"), 32);
  EXPECT_EQ(window("{" + long_context + R"("model_type":"mistral"})"), 4096);  // its default
  EXPECT_EQ(window("{" + long_context + R"("model_type":"mistral","sliding_window":null})"), 0);
  EXPECT_EQ(window("{" + long_context + R"("model_type":"phi3"})"), 0);
  EXPECT_EQ(window("{" + long_context + R"("model_type":"phi3","sliding_window":2047})"), 2047);
  EXPECT_EQ(window("{" + long_context + R"("model_type":"granite","sliding_window":32})"), 0);
  const std::string qwen3 = long_context + R"("model_type":"qwen3","use_sliding_window":true,)";
  EXPECT_EQ(window("{" + qwen3 + R"("sliding_window":32,"max_window_layers":1})"), 32);
  EXPECT_EQ(window("{" + qwen3 + R"("sliding_window":32,"max_window_layers":2})"), 0);
  EXPECT_EQ(window("{" + qwen3 + R"("max_window_layers":0})"), 4096);
  EXPECT_EQ(window("{" + qwen3 + R"("sliding_window":32,
                     "layer_types":["full_attention","sliding_attention"]})"),
            32);
  const std::string smollm3 = long_context + R"("model_type":"smollm3","use_sliding_window":true,)";
  EXPECT_EQ(window("{" + smollm3 + R"("sliding_window":32,"no_rope_layers":[1,0]})"), 32);
  EXPECT_EQ(window("{" + smollm3 + R"("sliding_window":32,"no_rope_layers":[1,1]})"), 0);
  EXPECT_EQ(window("{" + smollm3 + R"("no_rope_layers":[1,0]})"), 0);
}

TEST(ModelConfigTest, TheLayersWithAWindow) {
  const auto layers = [](const std::string& patch) {
    return read(changed(R"({"max_position_embeddings":32768,"num_hidden_layers":4,)" + patch + "}"))
        .layers_with_windows();
  };
  using Layers = std::vector<int32_t>;
  EXPECT_EQ(layers(R"("model_type":"llama","sliding_window":32)"), Layers());
  EXPECT_EQ(layers(R"("model_type":"mistral","sliding_window":32)"), (Layers{0, 1, 2, 3}));
  EXPECT_EQ(layers(R"("model_type":"phi3","sliding_window":32)"), (Layers{0, 1, 2, 3}));
  const std::string qwen2 = R"("model_type":"qwen2","use_sliding_window":true,)";
  EXPECT_EQ(layers(qwen2 + R"("max_window_layers":0)"), (Layers{0, 1, 2, 3}));
  EXPECT_EQ(layers(qwen2 + R"("max_window_layers":3)"), Layers{3});
  EXPECT_EQ(layers(qwen2 + R"("sliding_window":32768,"max_window_layers":3)"), Layers());
  EXPECT_EQ(layers(R"("model_type":"qwen3","sliding_window":32,"layer_types":["sliding_attention",
                      "full_attention","sliding_attention","full_attention"])"),
            (Layers{0, 2}));
  EXPECT_EQ(layers(R"("model_type":"smollm3","use_sliding_window":true,"sliding_window":32)"),
            Layers{3});
}

TEST(ModelConfigTest, YarnReachesItsFactor) {
  const auto yarn = [](const char* fields) {
    return read(changed(R"({"max_position_embeddings":100,"rope_scaling":{"type":"yarn",)" +
                        std::string(fields) + "}}"));
  };
  const ModelConfig raised = yarn(R"("factor":4.0,"original_max_position_embeddings":50)");
  EXPECT_EQ(raised.max_position_embeddings, 200);
  EXPECT_NEAR(raised.rope_attention_factor, 1 + 0.1 * std::log(4.0), 1e-12);
  const ModelConfig given = yarn(R"("original_max_position_embeddings":25)");
  EXPECT_EQ(given.max_position_embeddings, 100);
  EXPECT_EQ(given.rope_factor, 4.0);
  EXPECT_EQ(yarn(R"("factor":0.5)").rope_attention_factor, 1.0);
  EXPECT_EQ(yarn(R"("factor":0.5)").max_position_embeddings, 100);
}

TEST(ModelConfigTest, LongRopeHasOlderNames) {
  for (const char* name : {"longrope", "su", "yarn"}) {
    const ModelConfig config = read(changed(
        R"({"model_type":"phi3","max_position_embeddings":8192,"rope_scaling":{
              "short_factor":[1],"long_factor":[4],"type":")" +
        std::string(name) + "\"}}"));
    EXPECT_EQ(config.rope_scaling, RopeScaling::kLongRope);
    EXPECT_EQ(config.rope_original_context, 4096);
    EXPECT_NEAR(config.rope_attention_factor, std::sqrt(1 + 1 / 12.0), 1e-12);
    EXPECT_EQ(config.rope_inverse_frequencies(), std::vector<float>{1.0f});
    EXPECT_EQ(config.rope_inverse_frequencies(true), std::vector<float>{0.25f});
  }
}

TEST(ModelConfigTest, FamiliesHaveDefaultsOfTheirOwn) {
  const std::string missing = R"("rms_norm_eps":"REMOVE","rope_theta":"REMOVE",)"
                              R"("head_dim":"REMOVE","max_position_embeddings":"REMOVE",)"
                              R"("attention_bias":true,"mlp_bias":true,)";
  const auto family = [&](const char* type) {
    return read(changed("{" + missing + R"("model_type":")" + type + "\"}"));
  };
  const ModelConfig qwen3 = family("qwen3"), phi3 = family("phi3"), granite = family("granite"),
                    smollm3 = family("smollm3"), olmo2 = family("olmo2");
  EXPECT_EQ(qwen3.head_dim, 128);
  EXPECT_EQ(qwen3.traits.qk_norm, QkNorm::kHead);
  EXPECT_TRUE(qwen3.qkv_bias && qwen3.o_bias && !qwen3.mlp_bias);
  EXPECT_EQ(phi3.rms_norm_eps, 1e-5);
  EXPECT_EQ(phi3.max_position_embeddings, 4096);
  EXPECT_TRUE(phi3.traits.fused_projections && !phi3.qkv_bias && !phi3.mlp_bias);
  EXPECT_EQ(granite.traits.attention_multiplier, 1.0);
  EXPECT_TRUE(granite.qkv_bias && granite.mlp_bias);
  EXPECT_EQ(smollm3.rope_theta, 2e6);
  EXPECT_TRUE(smollm3.traits.rotates(0) && smollm3.traits.rotates(1));  // the fourth does not
  EXPECT_TRUE(olmo2.traits.norm_after && olmo2.o_bias && !olmo2.mlp_bias);
  EXPECT_EQ(olmo2.traits.qk_norm, QkNorm::kProjection);
}

struct BadConfig {
  const char* name;
  const char* patch;
  const char* message;
};
void PrintTo(const BadConfig& bad, std::ostream* out) { *out << bad.name; }

class BadConfigTest : public ::testing::TestWithParam<BadConfig> {};

TEST_P(BadConfigTest, IsRefused) {
  EXPECT_MODEL_ERROR(read(changed(GetParam().patch)), GetParam().message);
  EXPECT_MODEL_ERROR(read(changed(GetParam().patch)), "config.json: \"");
}

const BadConfig kBadConfigs[] = {
    {"NoHiddenSize", R"({"hidden_size":"REMOVE"})", "\"hidden_size\": is missing"},
    {"NullLayers", R"({"num_hidden_layers":null})", "\"num_hidden_layers\": is missing"},
    {"ZeroLayers", R"({"num_hidden_layers":0})",
     "\"num_hidden_layers\": expected an integer from 1 to 2147483647, found 0"},
    {"NegativeVocab", R"({"vocab_size":-1})", "\"vocab_size\": expected an integer from 1"},
    {"HiddenSize2To31", R"({"hidden_size":2147483648})", "found 2147483648"},
    {"HiddenSize2To64", R"({"hidden_size":18446744073709551615})", "found 18446744073709551615"},
    {"StringDim", R"({"intermediate_size":"12"})",
     "\"intermediate_size\": expected an integer from 1 to 2147483647, found the string \"12\""},
    {"BoolDim", R"({"hidden_size":true})", "found true"},
    {"FloatDim", R"({"hidden_size":8.5})", "found 8.5"},
    {"ListDim", R"({"hidden_size":[8]})", "found the list [8]"},
    {"HeadsDoNotDivideHidden", R"({"hidden_size":10})",
     "\"hidden_size\": expected a multiple of num_attention_heads 4"},
    {"KvHeadsDoNotDivideHeads", R"({"num_key_value_heads":3})",
     "\"num_key_value_heads\": expected a divisor of num_attention_heads 4, found 3"},
    {"MoreKvHeadsThanHeads", R"({"num_key_value_heads":8})", "expected a divisor"},
    {"OddHeadDim", R"({"head_dim":3})", "\"head_dim\": expected an even number (RoPE), found 3"},
    {"OddDerivedHeadDim", R"({"hidden_size":12})", "\"head_dim\": expected an even number"},
    {"HeadsOverflow", R"({"num_attention_heads":2147483646,"num_key_value_heads":1,"head_dim":4})",
     "times head_dim exceeds 2147483647"},
    {"RopeThetaZero", R"({"rope_theta":0})", "\"rope_theta\": expected a number above 0"},
    {"RopeThetaNegative", R"({"rope_theta":-1.0})", "found -1.0"},
    {"RopeThetaString", R"({"rope_theta":"10000"})", "found the string \"10000\""},
    {"EpsZero", R"({"rms_norm_eps":0.0})", "\"rms_norm_eps\": expected a number above 0.0"},
    {"EpsBool", R"({"rms_norm_eps":true})", "found true"},
    {"ContextZero", R"({"max_position_embeddings":0})", "\"max_position_embeddings\": expected"},
    {"OtherScaling", R"({"rope_scaling":{"type":"mrope","factor":4.0}})",
     "\"rope_scaling.type\": RoPE scaling the string \"mrope\" is not supported"},
    {"OtherRopeType", R"({"rope_parameters":{"rope_type":"proportional","rope_theta":1e4}})",
     "\"rope_parameters.rope_type\": RoPE scaling the string \"proportional\" is not supported"},
    {"NoneIsNoRopeType", R"({"rope_scaling":{"type":"none"}})", "is not supported"},
    {"DynamicWithoutFactor", R"({"rope_scaling":{"rope_type":"dynamic"}})",
     "\"rope_scaling.factor\": is missing"},
    {"YarnFactor", R"({"rope_scaling":{"type":"yarn","factor":-4.0}})",
     "\"rope_scaling.factor\": expected a number above 0"},
    {"YarnTheta", R"({"rope_theta":1.0,"rope_scaling":{"type":"yarn","factor":4.0}})",
     "\"rope_scaling.rope_theta\": expected more than 1 for yarn"},
    {"YarnBeta", R"({"rope_scaling":{"type":"yarn","factor":4.0,"beta_fast":"32"}})",
     "\"rope_scaling.beta_fast\": expected a number from 0 to 1e9, found the string \"32\""},
    {"LongRopeWithoutFactors", R"({"rope_scaling":{"type":"longrope"}})",
     "\"rope_scaling.short_factor\": is missing; expected a list of 1 numbers above 0"},
    {"LongRopeLength",
     R"({"rope_scaling":{"type":"longrope","short_factor":[1],"long_factor":[1,2]}})",
     "\"rope_scaling.long_factor\": expected a list of 1 numbers above 0 (it has 2)"},
    {"LongRopeSign", R"({"rope_scaling":{"type":"longrope","short_factor":[-1]}})",
     "\"rope_scaling.short_factor\": expected a list of 1 numbers above 0"},
    {"PhiOddPart", R"({"model_type":"phi3","head_dim":4,"partial_rotary_factor":0.75})",
     "\"partial_rotary_factor\": expected a part of head_dim 4 that is an even number of dims"},
    {"NoRopeShort", R"({"model_type":"smollm3","no_rope_layers":[1]})",
     "\"no_rope_layers\": expected a list of 0 or 1 for each of 2 layers, found the list [1]"},
    {"NoRopeTwo", R"({"model_type":"smollm3","no_rope_layers":[1,2]})",
     "\"no_rope_layers\": expected an integer from 0 to 1, found 2"},
    {"NoRopeInterval", R"({"model_type":"smollm3","no_rope_layer_interval":0})",
     "\"no_rope_layer_interval\": expected an integer from 1"},
    {"GraniteMultiplier", R"({"model_type":"granite","residual_multiplier":0})",
     "\"residual_multiplier\": expected a number above 0"},
    {"ScalingString", R"({"rope_scaling":"linear"})", "\"rope_scaling\": expected an object"},
    {"ScalingTypeNumber", R"({"rope_scaling":{"type":3}})", "expected a string, found 3"},
    {"LinearWithoutFactor", R"({"rope_scaling":{"type":"linear"}})",
     "\"rope_scaling.factor\": is missing"},
    {"LinearFactorZero", R"({"rope_scaling":{"type":"linear","factor":0}})",
     "\"rope_scaling.factor\": expected a number above 0"},
    {"Llama3Incomplete", R"({"rope_scaling":{"rope_type":"llama3","factor":8.0}})",
     "\"rope_scaling.low_freq_factor\": is missing"},
    {"Llama3Factors", R"({"rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":4.0,
                          "high_freq_factor":4.0}})",
     "expected more than low_freq_factor 4.0"},
    {"Llama3Context", R"({"rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,
                          "high_freq_factor":4.0,"original_max_position_embeddings":0}})",
     "\"rope_scaling.original_max_position_embeddings\": expected"},
    {"RopePerLayerType", R"({"rope_parameters":{"full_attention":{"rope_theta":1e4}}})",
     "\"rope_parameters.full_attention\": RoPE per layer type is not supported"},
    {"RopeSpellingsDisagree", R"({"rope_scaling":{"type":"linear","factor":2.0},
                                  "rope_parameters":{"rope_type":"default"}})",
     "disagrees with \"rope_scaling\""},
    {"PartialRotation", R"({"partial_rotary_factor":0.5})", "partial rotation is not supported"},
    {"WrongArchitecture", R"({"architectures":["GPT2LMHeadModel"],"model_type":"REMOVE"})",
     "\"architectures\": expected a list of LlamaForCausalLM"},
    {"Classifier", R"({"architectures":["LlamaForSequenceClassification"],"model_type":"REMOVE"})",
     "found the list [\"LlamaForSequenceClassification\"]"},
    {"ArchitecturesNumber", R"({"architectures":3,"model_type":"REMOVE"})", "found 3"},
    {"WrongModelType", R"({"model_type":"gemma","architectures":["GemmaForCausalLM"]})",
     "\"model_type\": expected \"llama\", \"mistral\", \"qwen2\", \"qwen3\", \"phi3\", "
     "\"granite\", "
     "\"smollm3\" or \"olmo2\", found the string \"gemma\""},
    {"NoArchitecture", R"({"model_type":"REMOVE","architectures":"REMOVE"})",
     "\"model_type\": is missing"},
    {"Activation", R"({"hidden_act":"gelu"})",
     "\"hidden_act\": expected \"silu\", found the string \"gelu\""},
    {"Quantised", R"({"quantization_config":{"quant_method":"aqlm"}})",
     "\"quantization_config.quant_method\": expected compressed-tensors, gptq, awq or fp8, found "
     "the string \"aqlm\""},
    {"QuantisedBits", R"({"quantization_config":{"quant_method":"gptq","bits":2}})",
     "\"quantization_config.bits\": expected 4 or 8, found 2"},
    {"QuantisedNoObject", R"({"quantization_config":[4]})",
     "\"quantization_config\": expected an object, found the list [4]"},
    {"MistralKvHeads", R"({"model_type":"mistral","architectures":["MistralForCausalLM"],
                           "num_key_value_heads":"REMOVE"})",
     "\"num_key_value_heads\": is missing"},
    {"LayerType", R"({"model_type":"qwen2","layer_types":["full_attention","chunked_attention"]})",
     "\"layer_types\": expected \"full_attention\" or \"sliding_attention\", found the string "
     "\"chunked_attention\""},
    {"LayerTypesNoList", R"({"model_type":"qwen3","layer_types":"full_attention"})",
     "\"layer_types\": expected a list"},
    {"WindowString", R"({"model_type":"mistral","sliding_window":"4096"})",
     "\"sliding_window\": expected an integer"},
    {"BiasNumber", R"({"attention_bias":1})",
     "\"attention_bias\": expected true or false, found 1"},
    {"TieString", R"({"tie_word_embeddings":"yes"})", "expected true or false"},
    {"DtypeNumber", R"({"torch_dtype":16})", "\"torch_dtype\": expected a string, found 16"},
    {"SizeString", R"({"vocab_size":"10"})", "\"vocab_size\": expected an integer"},
    {"SizeFraction", R"({"vocab_size":10.5})", "\"vocab_size\": expected an integer"},
    {"BosList", R"({"bos_token_id":[1,2]})", "\"bos_token_id\": expected an integer or null"},
    {"EosString", R"({"eos_token_id":"</s>"})", "\"eos_token_id\": expected an integer"},
    {"EosListOfBools", R"({"eos_token_id":[2,true]})", "found true"},
};

INSTANTIATE_TEST_SUITE_P(All, BadConfigTest, ::testing::ValuesIn(kBadConfigs),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(ModelConfigTest, BadFilesAreNamed) {
  TemporaryFolder folder;
  EXPECT_MODEL_ERROR(read_model_config(folder.path()), "config.json: cannot be opened");
  const std::pair<std::string, const char*> cases[] = {
      {"", "config.json: not valid JSON"},
      {"{\"rope_theta\": Nan}", "config.json: not valid JSON"},
      {"{\"rope_theta\": NaN", "config.json: not valid JSON"},
      {"{\"hidden_size\": 1e999}", "config.json: not valid JSON"},
      {"\xff", "config.json: not valid JSON"},
      {"[1]", "config.json: expected a JSON object, found the list [1]"},
      {std::string(17 << 20, ' '), "expected at most 16777216"},
      {"{\"a\":" + std::string(100'000, '['), "config.json: not valid JSON"},
      {"{\"hidden_size\":" + std::string(100'000, '[') + std::string(100'000, ']') + "}",
       "config.json: not valid JSON: JSON that nests more than 512 levels deep"}};
  for (const auto& [text, message] : cases) {
    folder.write("config.json", text);
    EXPECT_MODEL_ERROR(read_model_config(folder.path()), message);
  }
  folder.write("config.json", tiny_config().dump());
  folder.write("generation_config.json", "{");
  EXPECT_MODEL_ERROR(read_model_config(folder.path()), "generation_config.json: not valid JSON");
  folder.write("generation_config.json", R"({"eos_token_id":[1,"2"]})");
  EXPECT_MODEL_ERROR(read_model_config(folder.path()),
                     "generation_config.json: \"eos_token_id\": expected an integer");
}

}  // namespace
}  // namespace mustafar
