#include "runtime/layer_costs.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

#include "format/coded.h"
#include "runtime/model_impl.h"
#include "runtime/row_budget.h"
#include "runtime/scorer.h"

namespace mustafar {
namespace {

constexpr int64_t kMostTokens = 1024;
constexpr int64_t kFewestTokens = 200;  // with fewer, too few rows leave the window to say anything
constexpr double kCoarseBits = 2;       // of the rows whose cost is measured
// Where noise hides a smaller divergence than this (nats a token), it counts as this.
constexpr double kLeastDivergence = 1e-6;
constexpr double kLeastCost = 1e-30, kMostCost = 1e30;  // so that every cost is a positive float

std::vector<int32_t> scored_text(std::span<const std::vector<int32_t>> pieces) {
  const auto longest =
      std::max_element(pieces.begin(), pieces.end(),
                       [](const auto& a, const auto& b) { return a.size() < b.size(); });
  if (longest == pieces.end() || static_cast<int64_t>(longest->size()) < kFewestTokens) {
    throw std::invalid_argument("calibrating for a budget needs a text of at least " +
                                std::to_string(kFewestTokens) + " tokens in one piece");
  }
  const int64_t n = std::min(kMostTokens, static_cast<int64_t>(longest->size()));
  return {longest->begin(), longest->begin() + n};
}

// One with every layer's keys or values coarse, one with 7 bits everywhere, one of the dense cache.
int64_t n_scorings(const ModelConfig& config) { return 2 * int64_t{config.n_layers} + 2; }

}  // namespace

int64_t cost_measure_tokens(const Model& model, std::span<const std::vector<int32_t>> pieces) {
  const int64_t positions = static_cast<int64_t>(scored_text(pieces).size()) - 1;
  return positions * n_scorings(model.config());
}

void measure_costs(const Model& model, std::span<const std::vector<int32_t>> pieces,
                   Profile& profile, const std::function<void(int64_t, int64_t)>& between) {
  Model::Impl& engine = *model.impl();
  const ModelConfig& c = model.config();
  const std::vector<std::vector<int32_t>> text = {scored_text(pieces)};
  const int64_t total = cost_measure_tokens(model, pieces);
  int64_t done = 0;
  const auto score = [&](std::shared_ptr<const CacheSpec> spec, LogProbTable* keep,
                         const LogProbTable* reference) {
    Scorer scorer(engine, std::move(spec));
    scorer.between = [&](int64_t part, int64_t) { between(done + part, total); };
    const std::vector<double> divergence = scorer.score(text, keep, reference)[0].divergence;
    done += static_cast<int64_t>(text[0].size()) - 1;
    return std::accumulate(divergence.begin(), divergence.end(), 0.0) /
           static_cast<double>(std::max<size_t>(1, divergence.size()));
  };

  KVConfig config = find_kv_preset("dense").config;
  LogProbTable dense(text, c.vocab_size);
  score(engine.cache_spec(config), &dense, nullptr);

  config.value_dtype = ValueType::kCoded;
  config.profile = std::make_shared<const Profile>(profile);
  const int32_t coarse = coded_row_bytes(c.head_dim, kCoarseBits);
  const RowSizes fine = {std::vector<int32_t>(c.n_layers, coded_row_bytes(c.head_dim, kMaxWidth)),
                         std::vector<int32_t>(c.n_layers, coded_row_bytes(c.head_dim, kMaxWidth)),
                         0};
  const auto fine_spec = engine.cache_spec(config, &fine);  // keeps the transform for the others
  const double least = score(fine_spec, nullptr, &dense);

  const RowErrors errors = row_errors(profile);
  profile.k_cost.assign(c.n_layers, 0.0f);
  profile.v_cost.assign(c.n_layers, 0.0f);
  for (int32_t layer = 0; layer < c.n_layers; layer++) {
    for (const bool is_key : {true, false}) {
      RowSizes rows = fine;
      (is_key ? rows.k_row_bytes : rows.v_row_bytes)[layer] = coarse;
      const double divergence = score(engine.cache_spec(config, &rows), nullptr, &dense) - least;
      const double cost = std::max(divergence, kLeastDivergence) / errors.at(layer, is_key, coarse);
      (is_key ? profile.k_cost : profile.v_cost)[layer] =
          static_cast<float>(std::clamp(cost, kLeastCost, kMostCost));
    }
  }
  between(total, total);
}

}  // namespace mustafar
