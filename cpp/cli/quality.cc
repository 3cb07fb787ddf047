#include "cli/quality.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>

#include "kv/sequence_cache.h"
#include "runtime/model_impl.h"
#include "runtime/row_budget.h"
#include "runtime/scorer.h"

namespace mustafar::cli {
namespace {

using Json = nlohmann::ordered_json;

// The dense cache's log-probabilities of the chunks in work take at most this, and a quarter of
// what the machine has to spare; one chunk's are always taken.
constexpr int64_t kBaselineBytes = int64_t{2} << 30;

double mean(const std::vector<double>& x) {
  return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

// Standard error of the mean.
double error_of(const std::vector<double>& x) {
  if (x.size() < 2) return 0;
  const double m = mean(x);
  double squares = 0;
  for (double value : x) squares += (value - m) * (value - m);
  const double n = static_cast<double>(x.size());
  return std::sqrt(squares / (n - 1) / n);
}

double quantile(std::vector<double> x, double q) {
  const size_t at = static_cast<size_t>(q * static_cast<double>(x.size() - 1) + 0.5);
  std::nth_element(x.begin(), x.begin() + at, x.end());
  return x[at];
}

// Chunks whose log-probabilities are kept together.
size_t group_size(const Model& model, size_t chunk_tokens) {
  const int64_t available = model.impl()->backend->host_memory()
                                ? model.impl()->backend->available_bytes()
                                : 4 * kBaselineBytes;
  const int64_t chunk =
      LogProbTable::bytes_for(static_cast<int64_t>(chunk_tokens) - 1, model.config().vocab_size);
  return static_cast<size_t>(std::max<int64_t>(1, std::min(kBaselineBytes, available / 4) / chunk));
}

// Of a chunk. dense: the scores under the dense cache.
Figures figures_of(const TokenScores& scores, const TokenScores& dense) {
  Figures figures;
  for (size_t p = 0; p < scores.log_probs.size(); p++) {
    figures.nll.push_back(-scores.log_probs[p]);
    figures.divergence.push_back(scores.divergence.empty() ? 0 : scores.divergence[p]);
    figures.same_top += scores.top[p] == dense.top[p];
  }
  return figures;
}

void append(Figures& figures, const Figures& chunk) {
  figures.nll.insert(figures.nll.end(), chunk.nll.begin(), chunk.nll.end());
  figures.divergence.insert(figures.divergence.end(), chunk.divergence.begin(),
                            chunk.divergence.end());
  figures.same_top += chunk.same_top;
}

// Appends the figures of chunks [first, first + n) if all of them are known.
bool append_known(const KnownFigures* known, const KVConfig& setting, size_t first, size_t n,
                  Figures& figures) {
  if (known == nullptr) return false;
  for (size_t chunk = first; chunk < first + n; chunk++) {
    if (known->find(setting, chunk) == nullptr) return false;
  }
  for (size_t chunk = first; chunk < first + n; chunk++) {
    append(figures, *known->find(setting, chunk));
  }
  return true;
}

}  // namespace

Json to_json(const Figures& f) {
  const double tokens = static_cast<double>(f.nll.size());
  const double perplexity = std::exp(mean(f.nll));
  const double same = static_cast<double>(f.same_top) / tokens;
  return {{"tokens", f.nll.size()},
          {"ppl", perplexity},
          {"ppl_error", perplexity * error_of(f.nll)},
          {"kld_mean", mean(f.divergence)},
          {"kld_mean_error", error_of(f.divergence)},
          {"kld_median", quantile(f.divergence, 0.5)},
          {"kld_99_9", quantile(f.divergence, 0.999)},
          {"same_top_p", same},
          {"same_top_p_error", std::sqrt(same * (1 - same) / tokens)}};
}

Json store_json(const Model& model, const KVConfig& config) {
  const ModelConfig& c = model.config();
  const CacheSpec spec = dealt_cache_spec(c, model.impl()->dtype, config);
  const double bytes = static_cast<double>(spec.layout.page_bytes) / kBlockTokens;
  const double dense = 4.0 * c.n_layers * c.n_kv_heads * c.head_dim;
  Json json = {{"bytes_per_token", bytes},
               {"of_dense", bytes / dense},
               {"k_sparsity", 1.0 - static_cast<double>(spec.layout.k.row_keep) / c.head_dim},
               {"v_sparsity", 1.0 - static_cast<double>(spec.layout.v.row_keep) / c.head_dim}};
  if (config.budgeted()) json["predicted_kld"] = spec.predicted_kld;
  return json;
}

std::vector<std::vector<int32_t>> chunks_of(const Model& model, const std::string& text,
                                            const std::string& name, int64_t tokens,
                                            int64_t max_chunks) {
  const Tokenizer& tokenizer = model.tokenizer();
  const std::vector<int32_t> prefix = tokenizer.special_prefix();
  const std::vector<int32_t> ids = tokenizer.encode(text, false);
  const int64_t size = std::min<int64_t>(tokens, model.config().max_position_embeddings);
  const int64_t step = size - static_cast<int64_t>(prefix.size());
  if (step < 2) throw std::invalid_argument("-c is " + std::to_string(size) + " tokens: too few");
  std::vector<std::vector<int32_t>> chunks;
  const int64_t n = static_cast<int64_t>(ids.size());
  for (int64_t at = 0; at + step <= n; at += step) {
    if (max_chunks >= 0 && static_cast<int64_t>(chunks.size()) == max_chunks) break;
    chunks.push_back(prefix);
    chunks.back().insert(chunks.back().end(), ids.begin() + at, ids.begin() + at + step);
  }
  if (chunks.empty()) {
    throw std::invalid_argument(name + " has " + std::to_string(n) +
                                " tokens, fewer than one chunk of " + std::to_string(step) +
                                ": give a longer text or a smaller -c");
  }
  return chunks;
}

KVConfig dense_setting() { return find_kv_preset("dense").config; }

Quality measure_quality(const Model& model, const std::vector<KVConfig>& settings,
                        const std::vector<std::vector<int32_t>>& chunks,
                        const std::function<void(int64_t, int64_t)>& progress,
                        KnownFigures* known) {
  Model::Impl& engine = *model.impl();
  Quality quality;
  quality.settings.resize(settings.size());
  std::vector<std::shared_ptr<const CacheSpec>> specs;  // bad settings are refused at once
  for (const KVConfig& setting : settings) specs.push_back(engine.cache_spec(setting));
  const auto dense_spec = engine.cache_spec(dense_setting());

  int64_t positions = 0, done = 0;
  for (const auto& chunk : chunks) positions += static_cast<int64_t>(chunk.size()) - 1;
  const int64_t total = positions * (static_cast<int64_t>(settings.size()) + 1);
  const auto score = [&](const auto& spec, std::span<const std::vector<int32_t>> group,
                         LogProbTable* keep, const LogProbTable* reference) {
    Scorer scorer(engine, spec);
    scorer.between = [&](int64_t part, int64_t) { progress(done + part, total); };
    std::vector<TokenScores> scores = scorer.score(group, keep, reference);
    for (const auto& chunk : group) done += static_cast<int64_t>(chunk.size()) - 1;
    return scores;
  };

  const size_t step = group_size(model, chunks[0].size());
  for (size_t first = 0; first < chunks.size(); first += step) {
    const auto group = std::span(chunks).subspan(first, std::min(step, chunks.size() - first));
    int64_t group_tokens = 0;
    for (const auto& chunk : group) group_tokens += static_cast<int64_t>(chunk.size()) - 1;
    std::vector<size_t> missing;
    for (size_t i = 0; i < settings.size(); i++) {
      if (append_known(known, settings[i], first, group.size(), quality.settings[i])) {
        done += group_tokens;
      } else {
        missing.push_back(i);
      }
    }
    // The dense cache's distributions are needed for whatever else is.
    Figures known_dense;
    const bool has_dense = append_known(known, dense_setting(), first, group.size(), known_dense);
    if (missing.empty() && has_dense) {
      append(quality.dense, known_dense);
      done += group_tokens;
      continue;
    }
    const auto keep = [&](const KVConfig& setting, const std::vector<TokenScores>& scores,
                          const std::vector<TokenScores>& dense, Figures& figures) {
      for (size_t i = 0; i < scores.size(); i++) {
        const Figures chunk = figures_of(scores[i], dense[i]);
        append(figures, chunk);
        if (known != nullptr) known->add(setting, first + i, chunk);
      }
    };
    LogProbTable baseline(group, engine.config.vocab_size);
    const std::vector<TokenScores> dense = score(dense_spec, group, &baseline, nullptr);
    keep(dense_setting(), dense, dense, quality.dense);
    for (const size_t i : missing) {
      keep(settings[i], score(specs[i], group, nullptr, &baseline), dense, quality.settings[i]);
    }
  }
  return quality;
}

}  // namespace mustafar::cli
