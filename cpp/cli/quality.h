// What cache settings cost on a text: perplexity, and the divergence of every next token's
// distribution from the dense cache's.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "mustafar/kv_config.h"
#include "mustafar/model.h"

namespace mustafar::cli {

// Per-token figures of one cache setting over all chunks.
struct Figures {
  std::vector<double> nll;         // nats, of the text's own next token
  std::vector<double> divergence;  // nats, KL of the dense cache's distribution from this one
  int64_t same_top = 0;            // tokens whose most probable successor is the dense cache's
};

// ppl, kld and same_top with their errors. figures: of at least one token.
nlohmann::ordered_json to_json(const Figures& figures);

// bytes_per_token, of_dense (at 2 bytes a value), the effective k_sparsity and v_sparsity, and of a
// budget predicted_kld.
nlohmann::ordered_json store_json(const Model& model, const KVConfig& config);

// A text in chunks of `tokens` tokens, each with what the tokenizer puts before a text; the rest is
// left out. max_chunks: -1 for all. name: of the text, for errors. Throws std::invalid_argument
// where there is not one chunk.
std::vector<std::vector<int32_t>> chunks_of(const Model& model, const std::string& text,
                                            const std::string& name, int64_t tokens,
                                            int64_t max_chunks);

struct Quality {
  Figures dense;
  std::vector<Figures> settings;  // one per setting asked for
};

// Figures of single chunks that were measured before, and those that are being measured.
class KnownFigures {
 public:
  virtual ~KnownFigures() = default;
  // Of a chunk under a setting, or null. dense_setting() is the dense cache.
  virtual const Figures* find(const KVConfig& setting, size_t chunk) const = 0;
  virtual void add(const KVConfig& setting, size_t chunk, const Figures& figures) = 0;
};

// Scores the chunks under a dense cache, once, and under every setting. progress: tokens scored so
// far and in all, dense and settings together; what it throws ends the work. known: chunks that it
// has are not scored again, others are added to it.
Quality measure_quality(const Model& model, const std::vector<KVConfig>& settings,
                        const std::vector<std::vector<int32_t>>& chunks,
                        const std::function<void(int64_t done, int64_t total)>& progress,
                        KnownFigures* known = nullptr);

KVConfig dense_setting();

}  // namespace mustafar::cli
