#include "io/rope_config.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace mustafar {
namespace {

using nlohmann::json;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr const char* kNames[] = {"none", "linear", "llama3", "yarn", "longrope", "dynamic"};

RopeScaling read_kind(const Fields& rope, const ModelConfig& config) {
  std::string kind = rope.string_or("rope_type", rope.string_or("type", "default"));
  if (kind == "default") return RopeScaling::kNone;
  // Phi-3 was published with two older names of longrope.
  if (config.model_type == "phi3" && (kind == "su" || kind == "yarn")) kind = "longrope";
  for (size_t i = 1; i < std::size(kNames); i++) {
    if (kind == kNames[i]) return static_cast<RopeScaling>(i);
  }
  rope.fail(rope.find("rope_type") ? "rope_type" : "type",
            "RoPE scaling " + describe(json(kind)) +
                " is not supported, expected \"default\", \"linear\", \"llama3\", \"yarn\", "
                "\"longrope\" or \"dynamic\"");
}

// The leading dims of a head that RoPE turns; only Phi-3 turns fewer than all.
void read_partial(const Fields& fields, ModelConfig& config) {
  const double part = fields.number_or("partial_rotary_factor", 0, kInfinity, 1.0);
  if (part == 1.0) {
    config.rotary_dim = 0;
    return;
  }
  const json& found = *fields.find("partial_rotary_factor");
  if (config.model_type != "phi3") {
    fields.fail("partial_rotary_factor",
                "partial rotation is not supported, expected 1, found " + describe(found));
  }
  const int32_t dims = part < 1.0 ? static_cast<int32_t>(config.head_dim * part) : 0;
  if (dims < 2 || dims % 2 != 0) {
    fields.fail("partial_rotary_factor",
                "expected a part of head_dim " + std::to_string(config.head_dim) +
                    " that is an even number of dims, found " + describe(found));
  }
  config.rotary_dim = dims;
}

std::vector<float> read_factors(const Fields& rope, const char* field, const ModelConfig& config) {
  const json* list = rope.find(field);
  const int32_t n = config.rope_dims() / 2;
  const std::string expected = "a list of " + std::to_string(n) + " numbers above 0";
  if (list == nullptr) rope.fail(field, "is missing; expected " + expected);
  std::vector<float> factors;
  for (const json& value : list->is_array() ? *list : json::array()) {
    const double number = value.is_number() ? value.get<double>() : 0;
    if (number > 0 && std::isfinite(number)) factors.push_back(static_cast<float>(number));
  }
  if (!list->is_array() || std::ssize(*list) != n || std::ssize(factors) != n) {
    rope.fail(field,
              expected + (list->is_array() ? " (it has " + std::to_string(list->size()) + ")" : ""),
              *list);
  }
  return factors;
}

// How many times as long as the original context the model's is.
double read_stretch(const Fields& rope, const ModelConfig& config) {
  const double stretch =
      static_cast<double>(config.max_position_embeddings) / config.rope_original_context;
  return rope.number_or("factor", 0, kInfinity, stretch);
}

double attention_factor_of(double scale, double mscale = 1) {
  return scale <= 1 ? 1.0 : 0.1 * mscale * std::log(scale) + 1.0;
}

void read_yarn(const Fields& rope, ModelConfig& config) {
  config.rope_factor = read_stretch(rope, config);
  const double mscale = rope.number_within("mscale", 0, 1e6, "a number from 0 to 1e6").value_or(0);
  const double all_dim =
      rope.number_within("mscale_all_dim", 0, 1e6, "a number from 0 to 1e6").value_or(0);
  const double own = mscale != 0 && all_dim != 0
                         ? attention_factor_of(config.rope_factor, mscale) /
                               attention_factor_of(config.rope_factor, all_dim)
                         : attention_factor_of(config.rope_factor);
  config.rope_attention_factor = rope.number_or("attention_factor", 0, kInfinity, own);
  const auto turns = [&](const char* field, double otherwise) {
    const double value = rope.number_within(field, 0, 1e9, "a number from 0 to 1e9").value_or(0);
    return value == 0 ? otherwise : value;
  };
  config.rope_beta_fast = turns("beta_fast", 32);
  config.rope_beta_slow = turns("beta_slow", 1);
  config.rope_truncate = rope.boolean_or("truncate", true);
  if (config.rope_theta <= 1)
    rope.fail("rope_theta",
              "expected more than 1 for yarn, found " + json(config.rope_theta).dump());
}

void read_longrope(const Fields& rope, ModelConfig& config) {
  config.rope_short_factors = read_factors(rope, "short_factor", config);
  config.rope_long_factors = read_factors(rope, "long_factor", config);
  config.rope_factor = read_stretch(rope, config);
  const int32_t original = config.rope_original_context;
  double own = 1;
  if (config.rope_factor > 1) {
    if (original < 2) rope.fail("original_max_position_embeddings", "expected 2 or more");
    own = std::sqrt(1 + std::log(config.rope_factor) / std::log(original));
  }
  config.rope_attention_factor = rope.number_or("attention_factor", 0, kInfinity, own);
}

void read_llama3(const Fields& rope, ModelConfig& config) {
  config.rope_low_freq_factor = rope.number("low_freq_factor", 0, kInfinity);
  config.rope_high_freq_factor = rope.number("high_freq_factor", 0, kInfinity);
  if (config.rope_high_freq_factor <= config.rope_low_freq_factor) {
    rope.fail("high_freq_factor", "expected more than low_freq_factor " +
                                      json(config.rope_low_freq_factor).dump() + ", found " +
                                      json(config.rope_high_freq_factor).dump());
  }
}

// The scaling of a rope_scaling or rope_parameters object. factor and the rest as transformers
// reads them: original_max_position_embeddings at the top wins, max_position_embeddings stands in.
void read_scaling(const Fields& top, const Fields& rope, ModelConfig& config) {
  if (rope.find("partial_rotary_factor")) read_partial(rope, config);
  config.rope_scaling = read_kind(rope, config);
  constexpr const char* kOriginal = "original_max_position_embeddings";
  const int32_t own = rope.integer_or(kOriginal, 1, kInt32Max, config.max_position_embeddings);
  config.rope_original_context =
      top.integer_or(kOriginal, 1, kInt32Max, config.model_type == "phi3" ? 4096 : own);
  switch (config.rope_scaling) {
    case RopeScaling::kNone:
      return;
    case RopeScaling::kYarn:
      return read_yarn(rope, config);
    case RopeScaling::kLongRope:
      return read_longrope(rope, config);
    case RopeScaling::kLlama3:
      read_llama3(rope, config);
      break;
    case RopeScaling::kLinear:
    case RopeScaling::kDynamic:
      break;
  }
  config.rope_factor = rope.number("factor", 0, kInfinity);
}

// Inverse frequency i of unscaled RoPE. The power is taken in f64 and rounded, which is what an f32
// pow gives at its best; PyTorch's vectorised pow differs from it in one unit of the last place
// here and there. factor: of the wavelength.
float plain_frequency(const ModelConfig& c, int32_t i, float factor = 1.0f) {
  const float exponent = static_cast<float>(2 * i) / static_cast<float>(c.rope_dims());
  const float base = static_cast<float>(c.rope_theta);
  return 1.0f / (factor * static_cast<float>(std::pow(double{base}, double{exponent})));
}

float llama3_frequency(const ModelConfig& c, int32_t i) {
  const float inverse = plain_frequency(c, i);
  const float factor = static_cast<float>(c.rope_factor);
  const float two_pi = static_cast<float>(2.0 * M_PI);
  const float wavelength = (1.0f / inverse) * two_pi;
  const float longest = static_cast<float>(c.rope_original_context / c.rope_low_freq_factor);
  const float shortest = static_cast<float>(c.rope_original_context / c.rope_high_freq_factor);
  if (wavelength > longest) return inverse / factor;
  if (wavelength < shortest) return inverse;
  const float low = static_cast<float>(c.rope_low_freq_factor);
  const float span = static_cast<float>(c.rope_high_freq_factor - c.rope_low_freq_factor);
  const float turns = (1.0f / wavelength) * static_cast<float>(c.rope_original_context);
  const float smooth = (turns - low) / span;
  return (1.0f - smooth) * inverse / factor + smooth * inverse;
}

// Dims that turn more than beta_fast times over the original context stay as they are, those that
// turn less than beta_slow times are stretched, and those between are mixed by a ramp.
float yarn_frequency(const ModelConfig& c, int32_t i) {
  const int32_t dims = c.rope_dims();
  const auto dim_of = [&](double turns) {
    return dims * std::log(c.rope_original_context / (turns * 2 * M_PI)) /
           (2 * std::log(c.rope_theta));
  };
  double low = dim_of(c.rope_beta_fast), high = dim_of(c.rope_beta_slow);
  if (c.rope_truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dims - 1.0);
  if (low == high) high += 0.001;
  const float at =
      (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low);
  const float kept = 1.0f - std::clamp(at, 0.0f, 1.0f);
  return plain_frequency(c, i, static_cast<float>(c.rope_factor)) * (1.0f - kept) +
         plain_frequency(c, i) * kept;
}

}  // namespace

const char* rope_scaling_name(RopeScaling scaling) { return kNames[static_cast<size_t>(scaling)]; }

void read_rope(const Fields& fields, double default_theta, ModelConfig& config) {
  config.rope_theta = fields.number_or("rope_theta", 0, kInfinity, default_theta);
  read_partial(fields, config);
  const json* scaling = fields.object("rope_scaling");
  const json* parameters = fields.object("rope_parameters");
  if (scaling != nullptr) read_scaling(fields, fields.within("rope_scaling", *scaling), config);
  if (parameters != nullptr) {
    const Fields rope = fields.within("rope_parameters", *parameters);
    for (const auto& [name, value] : parameters->items()) {
      if (value.is_object()) rope.fail(name, "RoPE per layer type is not supported");
    }
    // Where a folder has both spellings, they must not disagree.
    const ModelConfig classic = config;
    config.rope_theta = rope.number_or("rope_theta", 0, kInfinity, config.rope_theta);
    read_scaling(fields, rope, config);
    if (scaling != nullptr && (classic.rope_scaling != config.rope_scaling ||
                               classic.rope_factor != config.rope_factor)) {
      fields.fail("rope_parameters", "disagrees with \"rope_scaling\": expected " +
                                         describe(*scaling) + ", found " + describe(*parameters));
    }
  }
  if (config.rope_scaling == RopeScaling::kYarn) {
    const double reach = config.rope_factor * config.rope_original_context;
    const double longest = std::max<double>(reach, config.max_position_embeddings);
    config.max_position_embeddings =
        static_cast<int32_t>(std::min(longest, static_cast<double>(kInt32Max)));
  }
}

// As transformers computes them: every step in f32, and a division by a tensor as multiplication by
// its reciprocal. dynamic changes nothing within the context.
std::vector<float> ModelConfig::rope_inverse_frequencies(bool long_context) const {
  std::vector<float> frequencies;
  for (int32_t i = 0; i < rope_dims() / 2; i++) {
    const auto frequency = [&] {
      switch (rope_scaling) {
        case RopeScaling::kLinear:
          return plain_frequency(*this, i) / static_cast<float>(rope_factor);
        case RopeScaling::kLlama3:
          return llama3_frequency(*this, i);
        case RopeScaling::kYarn:
          return yarn_frequency(*this, i);
        case RopeScaling::kLongRope:
          return plain_frequency(
              *this, i, (long_context ? rope_long_factors : rope_short_factors)[size_t(i)]);
        case RopeScaling::kNone:
        case RopeScaling::kDynamic:
          break;
      }
      return plain_frequency(*this, i);
    };
    frequencies.push_back(frequency());
  }
  return frequencies;
}

}  // namespace mustafar
