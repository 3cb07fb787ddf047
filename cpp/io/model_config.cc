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

#include "io/json_file.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

using nlohmann::json;

constexpr size_t kConfigCap = 16 << 20;  // bytes
constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

struct Architecture {
  const char* model_type;
  const char* name;
  int32_t default_context;  // tokens, where max_position_embeddings is missing
};
constexpr Architecture kArchitectures[] = {
    {"llama", "LlamaForCausalLM", 2048},
    {"mistral", "MistralForCausalLM", 131072},
    {"qwen2", "Qwen2ForCausalLM", 32768},
};

// One object of a config file, with typed access. A null counts as missing.
class Fields {
 public:
  Fields(const std::filesystem::path& file, const json& object, std::string prefix = "")
      : file_(file), object_(object), prefix_(std::move(prefix)) {}

  [[noreturn]] void fail(const std::string& field, const std::string& what) const {
    throw ModelError(file_.string() + ": \"" + prefix_ + field + "\": " + what);
  }
  [[noreturn]] void fail(const std::string& field, const std::string& expected,
                         const json& actual) const {
    fail(field, "expected " + expected + ", found " + describe(actual));
  }

  const json* find(const char* field) const {
    const auto it = object_.find(field);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  bool is_null(const char* field) const {
    const auto it = object_.find(field);
    return it != object_.end() && it->is_null();
  }

  int32_t integer(const char* field, int64_t low, int64_t high) const {
    const json* value = find(field);
    if (value == nullptr) fail(field, "is missing; expected " + range(low, high));
    return to_integer(field, *value, low, high);
  }
  int32_t integer_or(const char* field, int64_t low, int64_t high, int32_t otherwise) const {
    const json* value = find(field);
    return value == nullptr ? otherwise : to_integer(field, *value, low, high);
  }
  // Whole numbers that were written as floats (512.0) are integers.
  int32_t to_integer(const char* field, const json& value, int64_t low, int64_t high) const {
    const double number = value.is_number() ? value.get<double>() : 0.5;
    const bool fits = number == std::floor(number) && number >= static_cast<double>(low) &&
                      number <= static_cast<double>(high);
    if (!fits) fail(field, range(low, high), value);
    return static_cast<int32_t>(number);
  }

  // A finite number in (low, high).
  double number(const char* field, double low, double high) const {
    const json* value = find(field);
    const std::string expected = "a number above " + json(low).dump() +
                                 (std::isinf(high) ? "" : " and below " + json(high).dump());
    if (value == nullptr) fail(field, "is missing; expected " + expected);
    if (!value->is_number()) fail(field, expected, *value);
    const double number = value->get<double>();
    if (!(number > low && number < high)) fail(field, expected, *value);
    return number;
  }
  double number_or(const char* field, double low, double high, double otherwise) const {
    return find(field) == nullptr ? otherwise : number(field, low, high);
  }

  // A number in [low, high], or nothing.
  std::optional<double> number_within(const char* field, double low, double high,
                                      const char* expected) const {
    const json* value = find(field);
    if (value == nullptr) return std::nullopt;
    const double number = value->is_number() ? value->get<double>() : NAN;
    if (!(number >= low && number <= high)) fail(field, expected, *value);
    return number;
  }

  bool boolean_or(const char* field, bool otherwise) const {
    const json* value = find(field);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) fail(field, "true or false", *value);
    return value->get<bool>();
  }

  std::string string_or(const char* field, const std::string& otherwise) const {
    const json* value = find(field);
    if (value == nullptr) return otherwise;
    if (!value->is_string()) fail(field, "a string", *value);
    return value->get<std::string>();
  }

  // An id, a list of ids, or nothing. Ids that no token has, such as -1, mean none.
  std::vector<int32_t> ids(const char* field, int64_t vocab_size) const {
    std::vector<int32_t> result;
    const json* value = find(field);
    if (value == nullptr) return result;
    const auto add = [&](const json& id) {
      const int32_t number = to_integer(field, id, -kInt32Max, kInt32Max);
      if (number >= 0 && number < vocab_size) result.push_back(number);
    };
    if (!value->is_array()) add(*value);
    if (value->is_array()) std::for_each(value->begin(), value->end(), add);
    return result;
  }

  // An object in this one, or null.
  const json* object(const char* field) const {
    const json* value = find(field);
    if (value != nullptr && !value->is_object()) fail(field, "an object", *value);
    return value;
  }
  Fields within(const char* field, const json& object) const {
    return Fields(file_, object, prefix_ + field + ".");
  }

 private:
  static std::string range(int64_t low, int64_t high) {
    return "an integer from " + std::to_string(low) + " to " + std::to_string(high);
  }

  const std::filesystem::path& file_;
  const json& object_;
  std::string prefix_;
};

// model_type decides; "architectures" is a note of who saved the folder, and says LlamaModel or
// LLaMAForCausalLM as often as not. It counts where there is no model_type.
const Architecture& read_architecture(const Fields& fields) {
  constexpr const char* kSupported = "LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM";
  const std::string type = fields.string_or("model_type", "");
  for (const Architecture& known : kArchitectures) {
    if (type == known.model_type) return known;
  }
  if (!type.empty()) {
    fields.fail("model_type",
                "expected \"llama\", \"mistral\" or \"qwen2\", found " + describe(json(type)));
  }
  const json* names = fields.find("architectures");
  if (names == nullptr) {
    fields.fail("model_type",
                std::string("is missing, and so is \"architectures\"; expected ") + kSupported);
  }
  // Compared as strings: nlohmann's comparison with a literal allocates although it is noexcept, so
  // that lack of memory would end the process.
  const std::string* name =
      names->is_array() && names->size() == 1 ? (*names)[0].get_ptr<const std::string*>() : nullptr;
  for (const Architecture& known : kArchitectures) {
    if (name != nullptr && *name == known.name) return known;
  }
  fields.fail("architectures", std::string("a list of ") + kSupported, *names);
}

void read_heads(const Fields& fields, ModelConfig& config) {
  config.n_heads = fields.integer("num_attention_heads", 1, kInt32Max);
  const bool kv_optional = config.model_type == "llama";  // others have defaults of their own
  config.n_kv_heads = kv_optional || fields.find("num_key_value_heads") != nullptr
                          ? fields.integer_or("num_key_value_heads", 1, kInt32Max, config.n_heads)
                          : fields.integer("num_key_value_heads", 1, kInt32Max);
  if (config.n_heads % config.n_kv_heads != 0) {
    fields.fail("num_key_value_heads", "expected a divisor of num_attention_heads " +
                                           std::to_string(config.n_heads) + ", found " +
                                           std::to_string(config.n_kv_heads));
  }
  if (fields.find("head_dim") != nullptr) {
    config.head_dim = fields.integer("head_dim", 2, kInt32Max);
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

// The scaling of a rope_scaling or rope_parameters object. factor and the rest as transformers
// reads them: original_max_position_embeddings at the top wins, max_position_embeddings stands in.
void read_rope_scaling(const Fields& top, const Fields& rope, ModelConfig& config) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const std::string kind = rope.string_or("rope_type", rope.string_or("type", "default"));
  if (rope.number_or("partial_rotary_factor", 0, kInfinity, 1.0) != 1.0) {
    rope.fail("partial_rotary_factor", "partial rotation is not supported, expected 1, found " +
                                           describe(*rope.find("partial_rotary_factor")));
  }
  if (kind == "default") return;
  if (kind != "linear" && kind != "llama3") {
    rope.fail(rope.find("rope_type") ? "rope_type" : "type",
              "RoPE scaling " + describe(json(kind)) +
                  " is not supported, expected \"default\", \"linear\" or \"llama3\"");
  }
  config.rope_factor = rope.number("factor", 0, kInfinity);
  if (kind == "linear") {
    config.rope_scaling = RopeScaling::kLinear;
    return;
  }
  config.rope_scaling = RopeScaling::kLlama3;
  config.rope_low_freq_factor = rope.number("low_freq_factor", 0, kInfinity);
  config.rope_high_freq_factor = rope.number("high_freq_factor", 0, kInfinity);
  if (config.rope_high_freq_factor <= config.rope_low_freq_factor) {
    rope.fail("high_freq_factor", "expected more than low_freq_factor " +
                                      json(config.rope_low_freq_factor).dump() + ", found " +
                                      json(config.rope_high_freq_factor).dump());
  }
  constexpr const char* kOriginal = "original_max_position_embeddings";
  config.rope_original_context =
      rope.integer_or(kOriginal, 1, kInt32Max, config.max_position_embeddings);
  config.rope_original_context =
      top.integer_or(kOriginal, 1, kInt32Max, config.rope_original_context);
}

void read_rope(const Fields& fields, ModelConfig& config) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  config.rope_theta = fields.number_or("rope_theta", 0, kInfinity, 10000.0);
  if (fields.number_or("partial_rotary_factor", 0, kInfinity, 1.0) != 1.0) {
    fields.fail("partial_rotary_factor", "partial rotation is not supported, expected 1, found " +
                                             describe(*fields.find("partial_rotary_factor")));
  }
  const json* scaling = fields.object("rope_scaling");
  const json* parameters = fields.object("rope_parameters");
  if (scaling != nullptr)
    read_rope_scaling(fields, fields.within("rope_scaling", *scaling), config);
  if (parameters == nullptr) return;
  const Fields rope = fields.within("rope_parameters", *parameters);
  for (const auto& [name, value] : parameters->items()) {
    if (value.is_object()) rope.fail(name, "RoPE per layer type is not supported");
  }
  // Where a folder has both spellings, they must not disagree.
  ModelConfig classic = config;
  config.rope_scaling = RopeScaling::kNone;
  read_rope_scaling(fields, rope, config);
  config.rope_theta = rope.number_or("rope_theta", 0, kInfinity, config.rope_theta);
  if (scaling != nullptr &&
      (classic.rope_scaling != config.rope_scaling || classic.rope_factor != config.rope_factor)) {
    fields.fail("rope_parameters", "disagrees with \"rope_scaling\": expected " +
                                       describe(*scaling) + ", found " + describe(*parameters));
  }
}

// Refused unless no position within the context can fall out of the window. Llama has none,
// whatever fields are left over from another family.
void refuse_sliding_window(const Fields& fields, const ModelConfig& config) {
  if (config.model_type == "llama") return;
  const bool qwen2 = config.model_type == "qwen2";
  if (const json* types = fields.find("layer_types")) {
    if (!types->is_array()) fields.fail("layer_types", "a list", *types);
    for (const json& type : *types) {
      if (type != "full_attention") {
        fields.fail("layer_types", "expected \"full_attention\" for every layer, found " +
                                       describe(type) + " (not supported)");
      }
    }
    if (qwen2) return;  // the types decide, whatever sliding_window says
  }
  if (qwen2) {
    if (!fields.boolean_or("use_sliding_window", false)) return;
    if (fields.integer_or("max_window_layers", 0, kInt32Max, 28) >= config.n_layers) return;
  }
  // A missing field means a window of 4096 to Mistral and Qwen2; null means none.
  const bool by_default = !fields.find("sliding_window") && !fields.is_null("sliding_window");
  const int32_t window = fields.integer_or("sliding_window", 1, kInt32Max,
                                           by_default ? 4096 : static_cast<int32_t>(kInt32Max));
  if (window < config.max_position_embeddings) {
    fields.fail("sliding_window",
                "sliding-window attention is not supported, expected null or at least "
                "max_position_embeddings " +
                    std::to_string(config.max_position_embeddings) + ", found " +
                    std::to_string(window) +
                    (by_default ? " (the default of a missing field)" : ""));
  }
}

void refuse_unsupported(const Fields& fields, const ModelConfig& config) {
  if (const json* quantization = fields.object("quantization_config")) {
    const auto method = quantization->find("quant_method");
    fields.fail("quantization_config",
                "quantised weights are not supported, found method " +
                    (method == quantization->end() ? "unknown" : describe(*method)));
  }
  const std::string activation = fields.string_or("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    fields.fail("hidden_act", "expected \"silu\", found " + describe(json(activation)));
  }
  refuse_sliding_window(fields, config);
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

  const Architecture& architecture = read_architecture(fields);
  ModelConfig config;
  config.model_type = architecture.model_type;
  config.hidden_size = fields.integer("hidden_size", 1, kInt32Max);
  config.intermediate_size = fields.integer("intermediate_size", 1, kInt32Max);
  config.n_layers = fields.integer("num_hidden_layers", 1, kInt32Max);
  config.vocab_size = fields.integer("vocab_size", 1, kInt32Max);
  config.max_position_embeddings =
      fields.integer_or("max_position_embeddings", 1, kInt32Max, architecture.default_context);
  config.rms_norm_eps = fields.number_or("rms_norm_eps", 0, 1, 1e-6);
  read_heads(fields, config);
  read_rope(fields, config);
  refuse_unsupported(fields, config);

  // Mistral has no biases and Qwen2 those of q, k and v, whatever the file says.
  const bool llama = config.model_type == "llama";
  const bool attention_bias = fields.boolean_or("attention_bias", false) && llama;
  config.qkv_bias = config.model_type == "qwen2" || attention_bias;
  config.o_bias = attention_bias;
  config.mlp_bias = fields.boolean_or("mlp_bias", false) && llama;
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

// As transformers computes them: every step in f32, and a division by a tensor as multiplication by
// its reciprocal. The power is taken in f64 and rounded, which is what an f32 pow gives at its
// best; PyTorch's vectorised pow differs from it in one unit of the last place here and there.
std::vector<float> ModelConfig::rope_inverse_frequencies() const {
  std::vector<float> frequencies(static_cast<size_t>(head_dim / 2));
  const float base = static_cast<float>(rope_theta);
  for (int32_t i = 0; i < head_dim / 2; i++) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    const float inverse = 1.0f / static_cast<float>(std::pow(double{base}, double{exponent}));
    float& frequency = frequencies[static_cast<size_t>(i)];
    frequency = inverse;
    const float factor = static_cast<float>(rope_factor);
    if (rope_scaling == RopeScaling::kLinear) frequency = inverse / factor;
    if (rope_scaling != RopeScaling::kLlama3) continue;
    const float two_pi = static_cast<float>(2.0 * M_PI);
    const float wavelength = (1.0f / inverse) * two_pi;
    const float longest = static_cast<float>(rope_original_context / rope_low_freq_factor);
    const float shortest = static_cast<float>(rope_original_context / rope_high_freq_factor);
    if (wavelength > longest) {
      frequency = inverse / factor;
    } else if (!(wavelength < shortest)) {
      const float low = static_cast<float>(rope_low_freq_factor);
      const float span = static_cast<float>(rope_high_freq_factor - rope_low_freq_factor);
      const float turns = (1.0f / wavelength) * static_cast<float>(rope_original_context);
      const float smooth = (turns - low) / span;
      frequency = (1.0f - smooth) * inverse / factor + smooth * inverse;
    }
  }
  return frequencies;
}

}  // namespace mustafar
