#include "cli/chat/display.h"

#include <cstdlib>

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

std::string sparsity_text(const KVConfig& kv) {
  if (kv.budget_bytes_per_token) {
    return "coded, " + format_number(*kv.budget_bytes_per_token, 0) + " bytes a token";
  }
  if (kv.max_kld) return "coded, divergence at most " + format_number(*kv.max_kld, 4);
  if (kv.coded()) {
    return "coded, bits K " + format_number(kv.effective_k_bits(), 2) + " V " +
           format_number(kv.effective_v_bits(), 2);
  }
  return "sparsity K " + format_number(kv.effective_k_sparsity(), 2) + " V " +
         format_number(kv.effective_v_sparsity(), 2);
}

std::string memory_text(const MemoryUsage& memory) {
  const double tokens = static_cast<double>(memory.compressed_tokens + memory.dense_tokens);
  const double share = tokens > 0 ? static_cast<double>(memory.compressed_tokens) / tokens : 0;
  const double sparsity = share * (memory.k_sparsity + memory.v_sparsity) / 2;
  return "KV " + bytes_text(memory.used) + " of " + bytes_text(memory.dense_equivalent) +
         " dense | sparsity " + format_number(sparsity, 2);
}

}  // namespace mustafar::cli
