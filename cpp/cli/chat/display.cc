#include "cli/chat/display.h"

#include <algorithm>
#include <cstdlib>

#include "cli/quality.h"
#include "cli/report.h"
#include "cli/terminal.h"

namespace mustafar::cli {

Style::Style(bool terminal) {
  const char* no_color = std::getenv("NO_COLOR");
  const char* term = std::getenv("TERM");
  if (!terminal || (no_color && *no_color) || (term && std::string(term) == "dumb")) return;
  dim = "\033[2m";
  bold = "\033[1;32m";
  off = "\033[0m";
}

std::string Style::prompt(const char* text) const {
  return *bold ? std::string("\1") + bold + "\1" + text + "\1" + off + "\1" : text;
}

std::string bytes_text(int64_t bytes) { return format_bytes(static_cast<double>(bytes)); }

std::string speed_text(int64_t tokens, double seconds) {
  return std::to_string(tokens) + " tokens " +
         format_number(per_second(static_cast<double>(tokens), seconds), 1) + " t/s";
}

StoredSparsity stored_sparsity(const Model& model, const KVConfig& kv) {
  const nlohmann::ordered_json store = store_json(model, kv);
  return {store.at("k_sparsity").get<double>(), store.at("v_sparsity").get<double>()};
}

std::string sparsity_text(const Model& model, const KVConfig& kv) {
  if (kv.budget_bytes_per_token) {
    return "coded, " + format_number(*kv.budget_bytes_per_token, 0) + " bytes a token";
  }
  if (kv.max_kld) return "coded, divergence at most " + format_number(*kv.max_kld, 4);
  if (kv.coded()) {
    return "coded, bits K " + format_number(kv.effective_k_bits(), 2) + " V " +
           format_number(kv.effective_v_bits(), 2);
  }
  const auto both = [](double k, double v) {
    return "K " + format_number(k, 2) + " V " + format_number(v, 2);
  };
  const StoredSparsity stored = stored_sparsity(model, kv);
  const std::string asked = both(kv.effective_k_sparsity(), kv.effective_v_sparsity());
  const std::string kept = both(stored.k, stored.v);
  return "sparsity " + asked + (kept == asked ? "" : " (as stored: " + kept + ")");
}

std::string cache_text(const Model& model, const KVConfig& kv) {
  if (kv.coded()) return "cache " + sparsity_text(model, kv);
  const std::string type =
      kv.value_dtype == ValueType::kAuto ? model.dtype() : std::string(name_of(kv.value_dtype));
  const bool pruned = kv.effective_k_sparsity() > 0 || kv.effective_v_sparsity() > 0;
  return "cache " + type + ", " + (pruned ? sparsity_text(model, kv) : "nothing pruned");
}

std::string memory_text(const MemoryUsage& memory) {
  const double tokens = static_cast<double>(memory.compressed_tokens + memory.dense_tokens);
  const double share = tokens > 0 ? static_cast<double>(memory.compressed_tokens) / tokens : 0;
  const double sparsity = share * (memory.k_sparsity + memory.v_sparsity) / 2;
  return "KV " + bytes_text(memory.used) + " of " + bytes_text(memory.dense_equivalent) +
         " dense | sparsity " + format_number(sparsity, 2);
}

namespace {

std::string context_text(const Session& session) {
  return "context " + std::to_string(session.position()) + "/" +
         std::to_string(session.max_tokens());
}

}  // namespace

std::string turn_text(const Session& session, const GenerateStats& stats, int64_t cached_tokens) {
  std::string line = "prompt " + speed_text(stats.prompt_tokens, stats.prefill_seconds);
  if (cached_tokens > 0) line += " (" + std::to_string(cached_tokens) + " cached)";
  return line + " | reply " + speed_text(stats.generated_tokens, stats.decode_seconds) + " | " +
         context_text(session) + " | " + memory_text(session.memory());
}

std::string stats_text(const Chat& chat, const GenerateStats& total) {
  const Session& session = chat.session();
  const MemoryUsage m = session.memory();
  const StoredSparsity stored = stored_sparsity(session.model(), session.kv_config());
  return "messages " + std::to_string(chat.messages().size()) + " | " + context_text(session) +
         " | compressed " + std::to_string(m.compressed_tokens) + " tokens, dense " +
         std::to_string(m.dense_tokens) + "\n" + memory_text(m) + " (K " +
         format_number(stored.k, 2) + " V " + format_number(stored.v, 2) +
         " where compressed)\nmasks " + bytes_text(m.masks) + " | values " + bytes_text(m.values) +
         " | scales " + bytes_text(m.scales) + " | dense tail " + bytes_text(m.tail) +
         " | allocated " + bytes_text(m.allocated) + "\nin all: prompt " +
         speed_text(total.prompt_tokens, total.prefill_seconds) + " | reply " +
         speed_text(total.generated_tokens, total.decode_seconds);
}

std::string context_advice(const Session& session, bool context_shift) {
  const int64_t most = session.model().config().max_position_embeddings;
  std::string advice = "/undo takes the last turn back, /clear starts over";
  if (!context_shift) advice += ", --context-shift drops the oldest turns by itself";
  if (session.max_tokens() < most) {
    advice += ", -c sets a larger context (this model's is " + std::to_string(most) + ")";
  }
  return advice + ".";
}

std::string overflow_advice(const Session& session, const std::string& message,
                            bool context_shift) {
  const Model& model = session.model();
  const auto tokens =
      static_cast<int64_t>(model.tokenizer().encode(message, /*add_special=*/false).size());
  if (tokens < session.max_tokens()) return context_advice(session, context_shift);
  const int64_t most = model.config().max_position_embeddings;
  std::string advice =
      "The message alone is " + std::to_string(tokens) + " tokens: send a part of it";
  if (session.max_tokens() < most) {
    advice += ", or set a larger context with -c (this model's is " + std::to_string(most) + ")";
  }
  return advice + "; the conversation is as it was.";
}

nlohmann::ordered_json reply_json(const Chat& chat, const ChatReply& reply) {
  const Session& session = chat.session();
  const GenerateResult& result = reply.result();
  return {{"text", result.text},
          {"token_ids", result.token_ids},
          {"finish_reason", name_of(result.finish_reason)},
          {"stats", to_json(result.stats)},
          {"cached_tokens", reply.cached_tokens()},
          {"messages", nlohmann::ordered_json::parse(chat.messages_json())},
          {"kv", to_json(session.memory())},
          {"kv_config", to_json(session.kv_config())},
          {"model", session.model().folder().string()},
          {"device", session.model().device_description()}};
}

bool is_conversation(const std::string& text) {
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  return json.is_array() && !json.empty() &&
         std::all_of(json.begin(), json.end(), [](const nlohmann::json& message) {
           return message.is_object() && message.contains("role") && message["role"].is_string();
         });
}

}  // namespace mustafar::cli
