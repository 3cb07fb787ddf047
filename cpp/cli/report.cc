#include "cli/report.h"

#include "cli/terminal.h"
#include "runtime/kv_fields.h"

namespace mustafar::cli {

using Json = nlohmann::ordered_json;

Json to_json(const MemoryUsage& memory) {
  return {{"used", memory.used},
          {"allocated", memory.allocated},
          {"dense_equivalent", memory.dense_equivalent},
          {"masks", memory.masks},
          {"values", memory.values},
          {"scales", memory.scales},
          {"padding", memory.padding},
          {"tail", memory.tail},
          {"policy", memory.policy},
          {"compressed_tokens", memory.compressed_tokens},
          {"dense_tokens", memory.dense_tokens},
          {"k_sparsity", memory.k_sparsity},
          {"v_sparsity", memory.v_sparsity}};
}

Json to_json(const KVConfig& config) {
  Json json = Json::object();
  const auto add = [&](bool coded_only) {
    for_each_kv_field([&]<typename T>(const KVField<T>& field) {
      if constexpr (!kIsOverall<T>) {  // those for keys and for values say it
        if (field.coded_only != coded_only || !has_kv_value(config, field)) return;
        if constexpr (kIsPerKind<T>) {  // a budget takes the place of bits
          if (config.budgeted() && field.otherwise == &KVConfig::bits) return;
        }
        json[field.name] = kv_value(config, field);
      }
    });
  };
  add(/*coded_only=*/false);
  json["profile"] = config.profile != nullptr;
  if (config.coded()) add(/*coded_only=*/true);
  return json;
}

Json to_json(const GenerateStats& stats) {
  return {{"prompt_tokens", stats.prompt_tokens},
          {"generated_tokens", stats.generated_tokens},
          {"prefill_seconds", stats.prefill_seconds},
          {"decode_seconds", stats.decode_seconds},
          {"prompt_tokens_per_second",
           per_second(static_cast<double>(stats.prompt_tokens), stats.prefill_seconds)},
          {"generated_tokens_per_second",
           per_second(static_cast<double>(stats.generated_tokens), stats.decode_seconds)}};
}

Json to_json(const ModelConfig& config) {
  Json json = {{"model_type", config.model_type},
               {"hidden_size", config.hidden_size},
               {"intermediate_size", config.intermediate_size},
               {"n_layers", config.n_layers},
               {"n_heads", config.n_heads},
               {"n_kv_heads", config.n_kv_heads},
               {"head_dim", config.head_dim},
               {"vocab_size", config.vocab_size},
               {"max_position_embeddings", config.max_position_embeddings},
               {"rms_norm_eps", config.rms_norm_eps},
               {"rope_theta", config.rope_theta},
               {"rope_scaling", rope_scaling_name(config.rope_scaling)},
               {"sliding_window", config.sliding_window > 0 ? Json(config.sliding_window) : Json()},
               {"sliding_window_layers", config.layers_with_windows()},
               {"tie_word_embeddings", config.tie_word_embeddings},
               {"torch_dtype", config.torch_dtype}};
  json["bos_token_id"] = config.bos_token_id < 0 ? Json(nullptr) : Json(config.bos_token_id);
  json["eos_token_ids"] = config.eos_token_ids;
  return json;
}

Json sampling_json(const Model& model) {
  const SamplingParams p = model.default_sampling();
  const SamplingDefaults& own = model.config().sampling;
  Json json = Json::object();
  Json from_folder = Json::array();
  const auto add = [&](const char* name, const auto& value, bool is_own) {
    json[name] = *value;
    if (is_own) from_folder.push_back(name);
  };
  add("temperature", p.temperature, own.temperature.has_value());
  add("top_k", p.top_k, own.top_k.has_value());
  add("top_p", p.top_p, own.top_p.has_value());
  add("min_p", p.min_p, own.min_p.has_value());
  add("repetition_penalty", p.repetition_penalty, own.repetition_penalty.has_value());
  add("presence_penalty", p.presence_penalty, own.presence_penalty.has_value());
  add("frequency_penalty", p.frequency_penalty, own.frequency_penalty.has_value());
  add("penalty_window", p.penalty_window, false);
  json["from_folder"] = from_folder;
  return json;
}

std::string summary(const GenerateStats& stats, const MemoryUsage& memory) {
  const auto phase = [](const char* name, int64_t tokens, double seconds) {
    return std::string(name) + " " + std::to_string(tokens) + " tokens, " +
           format_number(per_second(static_cast<double>(tokens), seconds), 2) + " tokens/s";
  };
  std::string line = phase("prompt", stats.prompt_tokens, stats.prefill_seconds) + " | " +
                     phase("generated", stats.generated_tokens, stats.decode_seconds) + " | KV " +
                     format_bytes(static_cast<double>(memory.used)) + ", dense " +
                     format_bytes(static_cast<double>(memory.dense_equivalent));
  if (memory.compressed_tokens == 0) return line + ", nothing compressed yet";
  return line + ", sparsity K " + format_number(memory.k_sparsity, 3) + " V " +
         format_number(memory.v_sparsity, 3);
}

std::string dump(const Json& json, int indent) {
  return json.dump(indent, ' ', false, Json::error_handler_t::replace);
}

}  // namespace mustafar::cli
