#include "io/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "io/config_fields.h"
#include "io/json_file.h"
#include "io/quantised/quantisation.h"
#include "io/rope_config.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

using nlohmann::json;

// What a missing field means differs from family to family.
struct Family {
  const char* model_type;
  const char* architecture;
  int32_t context;  // max_position_embeddings, tokens
  double rms_norm_eps;
  double rope_theta;
  int32_t head_dim;    // 0: hidden_size / num_attention_heads
  bool kv_heads;       // num_key_value_heads may be missing: as many as heads
  const char* biases;  // that the fields may ask for: "a" of attention, "m" of the MLP
};
constexpr Family kFamilies[] = {
    {"llama", "LlamaForCausalLM", 2048, 1e-6, 1e4, 0, true, "am"},
    {"mistral", "MistralForCausalLM", 131072, 1e-6, 1e4, 0, false, ""},
    {"qwen2", "Qwen2ForCausalLM", 32768, 1e-6, 1e4, 0, false, ""},
    {"qwen3", "Qwen3ForCausalLM", 32768, 1e-6, 1e4, 128, false, "a"},
    {"phi3", "Phi3ForCausalLM", 4096, 1e-5, 1e4, 0, true, ""},
    {"granite", "GraniteForCausalLM", 2048, 1e-6, 1e4, 0, true, "am"},
    {"smollm3", "SmolLM3ForCausalLM", 32768, 1e-6, 2e6, 0, false, "am"},
    {"olmo2", "Olmo2ForCausalLM", 2048, 1e-5, 1e4, 0, true, "a"},
};

// "A, B or C" of one member of every family.
std::string list_of(const char* Family::* member, const char* quote) {
  std::string list;
  for (const Family& family : kFamilies) {
    if (!list.empty()) list += &family == std::end(kFamilies) - 1 ? " or " : ", ";
    list += quote + std::string(family.*member) + quote;
  }
  return list;
}

// model_type decides; "architectures" is a note of who saved the folder, and says LlamaModel or
// LLaMAForCausalLM as often as not. It counts where there is no model_type.
const Family& read_family(const Fields& fields) {
  const std::string type = fields.string_or("model_type", "");
  for (const Family& known : kFamilies) {
    if (type == known.model_type) return known;
  }
  if (!type.empty()) {
    fields.fail("model_type", "expected " + list_of(&Family::model_type, "\"") + ", found " +
                                  describe(json(type)));
  }
  const json* names = fields.find("architectures");
  if (names == nullptr) {
    fields.fail("model_type", "is missing, and so is \"architectures\"; expected " +
                                  list_of(&Family::architecture, ""));
  }
  // Compared as strings: nlohmann's comparison with a literal allocates although it is noexcept, so
  // that lack of memory would end the process.
  const std::string* name =
      names->is_array() && names->size() == 1 ? (*names)[0].get_ptr<const std::string*>() : nullptr;
  for (const Family& known : kFamilies) {
    if (name != nullptr && *name == known.architecture) return known;
  }
  fields.fail("architectures", "a list of " + list_of(&Family::architecture, ""), *names);
}

void read_heads(const Fields& fields, const Family& family, ModelConfig& config) {
  config.n_heads = fields.integer("num_attention_heads", 1, kInt32Max);
  config.n_kv_heads = family.kv_heads || fields.find("num_key_value_heads") != nullptr
                          ? fields.integer_or("num_key_value_heads", 1, kInt32Max, config.n_heads)
                          : fields.integer("num_key_value_heads", 1, kInt32Max);
  if (config.n_heads % config.n_kv_heads != 0) {
    fields.fail("num_key_value_heads", "expected a divisor of num_attention_heads " +
                                           std::to_string(config.n_heads) + ", found " +
                                           std::to_string(config.n_kv_heads));
  }
  if (fields.find("head_dim") != nullptr) {
    config.head_dim = fields.integer("head_dim", 2, kInt32Max);
  } else if (family.head_dim > 0) {
    config.head_dim = family.head_dim;
  } else {
    if (config.hidden_size % config.n_heads != 0) {
      fields.fail("hidden_size",
                  "expected a multiple of num_attention_heads " + std::to_string(config.n_heads) +
                      " (there is no head_dim), found " + std::to_string(config.hidden_size));
    }
    config.head_dim = config.hidden_size / config.n_heads;
  }
  if (config.head_dim % 2 != 0) {
    fields.fail("head_dim",
                "expected an even number (RoPE), found " + std::to_string(config.head_dim));
  }
  if (int64_t{config.n_heads} * config.head_dim > kInt32Max) {
    fields.fail("num_attention_heads", "times head_dim exceeds " + std::to_string(kInt32Max) +
                                           ": " + std::to_string(config.n_heads) + " x " +
                                           std::to_string(config.head_dim));
  }
}

std::vector<bool> read_layer_types(const Fields& fields, const json& types,
                                   const ModelConfig& config) {
  if (!types.is_array() || std::ssize(types) != config.n_layers) {
    fields.fail("layer_types",
                "a list of a type for each of " + std::to_string(config.n_layers) + " layers",
                types);
  }
  std::vector<bool> slides;
  for (const json& layer : types) {
    const std::string* name = layer.get_ptr<const std::string*>();
    if (name == nullptr || (*name != "sliding_attention" && *name != "full_attention")) {
      fields.fail("layer_types",
                  "expected \"full_attention\" or \"sliding_attention\", found " + describe(layer));
    }
    slides.push_back(*name == "sliding_attention");
  }
  return slides;
}

// In which layers attention sees only a window of the newest tokens, where there is a window;
// empty: in all; null: in none. Llama, Granite and OLMo-2 have none, whatever fields are left over
// from another family.
std::optional<std::vector<bool>> read_window_layers(const Fields& fields,
                                                    const ModelConfig& config) {
  const std::string& type = config.model_type;
  if (type == "mistral" || type == "phi3") return std::vector<bool>();
  if (type != "qwen2" && type != "qwen3" && type != "smollm3") return std::nullopt;
  if (const json* types = fields.find("layer_types")) {  // they decide
    return read_layer_types(fields, *types, config);
  }
  if (!fields.boolean_or("use_sliding_window", false)) return std::nullopt;
  const int32_t first =
      type == "smollm3" ? 0 : fields.integer_or("max_window_layers", 0, kInt32Max, 28);
  std::vector<bool> slides(config.n_layers, false);
  for (int32_t i = first; i < config.n_layers; i++) {
    slides[i] = type != "smollm3" || !config.traits.rotates(i);
  }
  return slides;
}

void read_window(const Fields& fields, ModelConfig& config) {
  std::optional<std::vector<bool>> layers = read_window_layers(fields, config);
  if (!layers) return;
  const auto none = [&](bool slides) {
    return std::find(layers->begin(), layers->end(), slides) == layers->end();
  };
  if (!layers->empty() && none(true)) return;
  // A missing field means a window of 4096 to Mistral and Qwen, none to the others; so does null.
  const bool by_default = !fields.find("sliding_window") && !fields.is_null("sliding_window") &&
                          config.model_type != "phi3" && config.model_type != "smollm3";
  const int32_t window = fields.integer_or("sliding_window", 1, kInt32Max,
                                           by_default ? 4096 : static_cast<int32_t>(kInt32Max));
  if (window >= config.max_position_embeddings) return;
  config.sliding_window = window;
  if (!none(false)) config.traits.window_layers = std::move(*layers);
}

std::vector<bool> read_rope_layers(const Fields& fields, const ModelConfig& config) {
  std::vector<bool> rotates;
  const json* list = fields.find("no_rope_layers");  // 1 where a layer has RoPE
  const int32_t interval = fields.integer_or("no_rope_layer_interval", 1, kInt32Max, 4);
  if (list != nullptr && (!list->is_array() || std::ssize(*list) < config.n_layers)) {
    fields.fail("no_rope_layers",
                "a list of 0 or 1 for each of " + std::to_string(config.n_layers) + " layers",
                *list);
  }
  for (int32_t i = 0; i < config.n_layers; i++) {
    rotates.push_back(list == nullptr ? (i + 1) % interval != 0
                                      : fields.to_integer("no_rope_layers", (*list)[i], 0, 1) != 0);
  }
  return rotates;
}

FamilyTraits read_traits(const Fields& fields, const ModelConfig& config) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  FamilyTraits traits;
  const std::string& type = config.model_type;
  if (type == "qwen3") traits.qk_norm = QkNorm::kHead;
  if (type == "olmo2") traits.qk_norm = QkNorm::kProjection;
  traits.norm_after = type == "olmo2";
  traits.fused_projections = type == "phi3";
  if (type == "smollm3") traits.rope_layers = read_rope_layers(fields, config);
  if (type == "granite") {
    traits.embedding_multiplier = fields.number_or("embedding_multiplier", 0, kInfinity, 1);
    traits.residual_multiplier = fields.number_or("residual_multiplier", 0, kInfinity, 1);
    traits.attention_multiplier = fields.number_or("attention_multiplier", 0, kInfinity, 1);
    traits.logits_scaling = fields.number_or("logits_scaling", 0, kInfinity, 1);
  }
  return traits;
}

void refuse_unsupported(const Fields& fields) {
  read_quantisation(fields);  // what of it is not read is refused by name
  const std::string activation = fields.string_or("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    fields.fail("hidden_act", "expected \"silu\", found " + describe(json(activation)));
  }
}

void add_ids(const std::vector<int32_t>& ids, std::vector<int32_t>& all) {
  for (int32_t id : ids) {
    if (std::find(all.begin(), all.end(), id) == all.end()) all.push_back(id);
  }
}

// The sampling that generation_config.json asks for.
SamplingDefaults read_sampling(const Fields& fields) {
  constexpr double kMost = std::numeric_limits<double>::max();
  constexpr double kLeast = std::numeric_limits<double>::min();
  SamplingDefaults sampling;
  sampling.temperature =
      fields.number_within("temperature", 0, kMost, "a number that is 0 or more");
  if (!fields.boolean_or("do_sample", true)) sampling.temperature = 0;
  if (fields.find("top_k")) {  // 0, and to some -1, means that it is off
    sampling.top_k = std::max(fields.integer("top_k", -1, kInt32Max), 0);
  }
  sampling.top_p = fields.number_within("top_p", 0, 1, "a number from 0 to 1");
  sampling.min_p = fields.number_within("min_p", 0, 1, "a number from 0 to 1");
  sampling.repetition_penalty =
      fields.number_within("repetition_penalty", kLeast, kMost, "a number above 0");
  sampling.presence_penalty = fields.number_within("presence_penalty", -kMost, kMost, "a number");
  sampling.frequency_penalty = fields.number_within("frequency_penalty", -kMost, kMost, "a number");
  return sampling;
}

int32_t read_bos(const Fields& fields, int64_t vocab_size) {
  const std::vector<int32_t> ids = fields.ids("bos_token_id", vocab_size);
  if (ids.size() > 1) {
    fields.fail("bos_token_id", "an integer or null", *fields.find("bos_token_id"));
  }
  return ids.empty() ? -1 : ids[0];
}

}  // namespace

ModelConfig read_model_config(const std::filesystem::path& folder) {
  const std::filesystem::path file = folder / "config.json";
  const JsonTree<> object = read_json_file(file, kConfigCap);
  const Fields fields(file, *object);

  const Family& family = read_family(fields);
  ModelConfig config;
  config.model_type = family.model_type;
  config.hidden_size = fields.integer("hidden_size", 1, kInt32Max);
  config.intermediate_size = fields.integer("intermediate_size", 1, kInt32Max);
  config.n_layers = fields.integer("num_hidden_layers", 1, kInt32Max);
  config.vocab_size = fields.integer("vocab_size", 1, kInt32Max);
  config.max_position_embeddings =
      fields.integer_or("max_position_embeddings", 1, kInt32Max, family.context);
  config.rms_norm_eps = fields.number_or("rms_norm_eps", 0, 1, family.rms_norm_eps);
  read_heads(fields, family, config);
  read_rope(fields, family.rope_theta, config);
  config.traits = read_traits(fields, config);
  read_window(fields, config);
  refuse_unsupported(fields);

  // Others have no biases, and Qwen2 those of q, k and v, whatever the file says.
  const std::string_view biases = family.biases;
  const bool has_attention_bias = biases.find('a') != biases.npos;
  const bool attention_bias = fields.boolean_or("attention_bias", false) && has_attention_bias;
  config.qkv_bias = config.model_type == "qwen2" || attention_bias;
  config.o_bias = attention_bias;
  config.mlp_bias = fields.boolean_or("mlp_bias", false) && biases.find('m') != biases.npos;
  config.tie_word_embeddings = fields.boolean_or("tie_word_embeddings", false);
  config.torch_dtype = fields.string_or("dtype", fields.string_or("torch_dtype", ""));
  config.bos_token_id = read_bos(fields, config.vocab_size);
  add_ids(fields.ids("eos_token_id", config.vocab_size), config.eos_token_ids);

  const std::filesystem::path generation_file = folder / "generation_config.json";
  std::error_code ignored;
  if (std::filesystem::exists(std::filesystem::symlink_status(generation_file, ignored))) {
    const JsonTree<> generation_object = read_json_file(generation_file, kConfigCap);
    const Fields generation(generation_file, *generation_object);
    add_ids(generation.ids("eos_token_id", config.vocab_size), config.eos_token_ids);
    if (config.bos_token_id < 0) config.bos_token_id = read_bos(generation, config.vocab_size);
    config.sampling = read_sampling(generation);
  }
  return config;
}

std::vector<int32_t> ModelConfig::layers_with_windows() const {
  std::vector<int32_t> layers;
  for (int32_t i = 0; i < n_layers; i++) {
    if (window_of(i) > 0) layers.push_back(i);
  }
  return layers;
}

}  // namespace mustafar
