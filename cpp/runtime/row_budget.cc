#include "runtime/row_budget.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "format/coded.h"
#include "mustafar/profile.h"

namespace mustafar {
namespace {

constexpr int32_t kWordBytes = 4;

[[noreturn]] void refuse(const char* field, double value, const char* what, double bound) {
  std::ostringstream message;
  message.precision(10);
  message << field << " is " << value << ", but " << what << " " << bound;
  throw std::invalid_argument(message.str());
}

}  // namespace

std::vector<float> unscaled_sigmas(const std::vector<float>& sigmas,
                                   const std::vector<float>& weights, int64_t first,
                                   int32_t head_dim) {
  std::vector<float> out(sigmas.begin() + first, sigmas.begin() + first + head_dim);
  if (weights.empty()) return out;
  for (int32_t d = 0; d < head_dim; d++) out[d] *= weights[first + d];
  return out;
}

RowErrors row_errors(const Profile& profile) {
  const int32_t d = profile.head_dim, heads = profile.n_kv_heads;
  RowErrors out;
  out.n_words = coded_row_bytes(d, kMaxWidth) / kWordBytes;
  out.errors.assign(size_t{2} * profile.n_layers * out.n_words, 0.0);
  std::vector<double> of_head(out.n_words);
  for (int32_t i = 0; i < 2 * profile.n_layers; i++) {
    const std::vector<float>& sigma = i % 2 == 0 ? profile.k_sigma : profile.v_sigma;
    const std::vector<float>& weight = i % 2 == 0 ? profile.k_weight : profile.v_weight;
    for (int32_t head = 0; head < heads; head++) {
      const int64_t at = (int64_t{i / 2} * heads + head) * d;
      const std::vector<float> unscaled = unscaled_sigmas(sigma, weight, at, d);
      coded_errors(unscaled.data(), d, out.n_words, of_head.data());
      for (int32_t w = 0; w < out.n_words; w++) out.errors[i * out.n_words + w] += of_head[w];
    }
  }
  return out;
}

RowSizes deal_rows(const KVConfig& config) {
  const char* const field = config.budget_bytes_per_token ? "budget_bytes_per_token" : "max_kld";
  const Profile* const profile = config.profile.get();
  if (profile == nullptr || !profile->has_costs() || profile->k_sigma.empty() ||
      profile->v_sigma.empty()) {
    throw std::invalid_argument(
        std::string(field) + " needs a profile with k_sigma, v_sigma, k_cost and v_cost, " +
        (profile == nullptr ? "none was given"
                            : "this one of kind " + profile->kind + " lacks some") +
        "; \"mustafar calibrate --budget\" makes one");
  }
  const RowErrors errors = row_errors(*profile);
  const int32_t n = 2 * profile->n_layers;  // of layers and kinds, keys first
  const auto cost = [&](int32_t i) {
    return static_cast<double>((i % 2 == 0 ? profile->k_cost : profile->v_cost)[i / 2]);
  };
  std::vector<int32_t> words(n, 1);
  // The divergence that is predicted of layer and kind i where its rows have so many words.
  const auto predicted_of = [&](int32_t i, int32_t n_words) {
    return cost(i) * errors.errors[int64_t{i} * errors.n_words + n_words - 1];
  };
  const auto predicted = [&] {
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += predicted_of(i, words[i]);
    return sum;
  };
  const auto gain = [&](int32_t i) {
    if (words[i] == errors.n_words) return -1.0;
    return predicted_of(i, words[i]) - predicted_of(i, words[i] + 1);
  };
  std::vector<double> gains(n);
  for (int32_t i = 0; i < n; i++) gains[i] = gain(i);
  // Gives a word to the layer and kind that it serves most; false where all rows are of the largest
  // size.
  const auto add_word = [&] {
    const auto best = std::max_element(gains.begin(), gains.end());
    if (*best < 0) return false;
    const int32_t i = static_cast<int32_t>(best - gains.begin());
    words[i]++;
    *best = gain(i);
    return true;
  };

  if (config.budget_bytes_per_token) {
    const double budget = *config.budget_bytes_per_token;
    const double step = static_cast<double>(profile->n_kv_heads) * kWordBytes;
    double bytes = static_cast<double>(profile->n_kv_heads) * n * (kWordBytes + kScaleBytes);
    if (budget < bytes) refuse(field, budget, "the smallest rows take", bytes);
    for (bytes += step; bytes <= budget && add_word(); bytes += step) {
    }
  } else {
    while (predicted() > *config.max_kld) {
      if (!add_word()) refuse(field, *config.max_kld, "the largest rows predict", predicted());
    }
  }
  RowSizes out;
  for (int32_t i = 0; i < n; i++) {
    (i % 2 == 0 ? out.k_row_bytes : out.v_row_bytes).push_back(words[i] * kWordBytes);
  }
  out.predicted_kld = predicted();
  return out;
}

CacheSpec dealt_cache_spec(const ModelConfig& model, DType tail_dtype, const KVConfig& config) {
  if (!config.budgeted()) return make_cache_spec(model, tail_dtype, config);
  const RowSizes rows = deal_rows(config);
  return make_cache_spec(model, tail_dtype, config, &rows);
}

}  // namespace mustafar
