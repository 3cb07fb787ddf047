// How a conversation shows itself in a terminal.
#pragma once

#include <cstdint>
#include <string>

#include "mustafar/kv_config.h"
#include "mustafar/memory_usage.h"

namespace mustafar::cli {

// Escape sequences, empty where colours are not wanted.
struct Style {
  explicit Style(bool terminal);
  std::string prompt(const char* text) const;
  const char *dim = "", *bold = "", *off = "";
};

std::string bytes_text(int64_t bytes);
std::string speed_text(int64_t tokens, double seconds);
std::string sparsity_text(const KVConfig& kv);  // or the bits or budget of coded rows
// "KV 1.20 MiB of 2.40 MiB dense | sparsity 0.45": what is used, and the share of the whole cache's
// values that is not stored.
std::string memory_text(const MemoryUsage& memory);

}  // namespace mustafar::cli
