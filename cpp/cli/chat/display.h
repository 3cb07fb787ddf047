// How a conversation shows itself in a terminal.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "mustafar/chat.h"
#include "mustafar/kv_config.h"
#include "mustafar/memory_usage.h"
#include "mustafar/model.h"

namespace mustafar::cli {

// Escape sequences, empty where colours are not wanted.
struct Style {
  explicit Style(bool terminal);
  std::string prompt(const char* text) const;
  const char *dim = "", *bold = "", *off = "";
};

std::string bytes_text(int64_t bytes);
std::string speed_text(int64_t tokens, double seconds);
// What is asked for, and behind it what the block format makes of that where it differs; or the
// bits or budget of coded rows.
std::string sparsity_text(const Model& model, const KVConfig& kv);
// "cache int8, nothing pruned"; "cache int8, sparsity K 0.50 V 0.50"
std::string cache_text(const Model& model, const KVConfig& kv);
// Fractions that the block format prunes of every row.
struct StoredSparsity {
  double k = 0, v = 0;
};
StoredSparsity stored_sparsity(const Model& model, const KVConfig& kv);
// "KV 1.20 MiB of 2.40 MiB dense | sparsity 0.45": what is used, and the share of the whole cache's
// values that is not stored.
std::string memory_text(const MemoryUsage& memory);
// The figures behind a reply.
std::string turn_text(const Session& session, const GenerateStats& stats, int64_t cached_tokens);
// Several lines; total: of all replies so far.
std::string stats_text(const Chat& chat, const GenerateStats& total);

// What helps against a full context; context_shift: what --context-shift says.
std::string context_advice(const Session& session, bool context_shift);
// The same where a message did not fit, unless that alone is too long: then only less text helps.
std::string overflow_advice(const Session& session, const std::string& message, bool context_shift);

// Of --json; after the reply's end.
nlohmann::ordered_json reply_json(const Chat& chat, const ChatReply& reply);
// Whether a text is a JSON list of messages, as OpenAI's API has them.
bool is_conversation(const std::string& text);

}  // namespace mustafar::cli
