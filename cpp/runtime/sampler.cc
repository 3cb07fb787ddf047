#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>

#include "mustafar/error.h"
#include "runtime/portable_math.h"
#include "runtime/top_select.h"

namespace mustafar {
namespace {

// Tokens that are sorted at first where top-k sets no number; mostly enough for top-p and min-p.
constexpr int64_t kFirstSorted = 256;

constexpr float kMasked = -std::numeric_limits<float>::infinity();

uint64_t system_seed() {
  std::random_device device;
  return (uint64_t{device()} << 32) | device();
}

// The index of the largest logit, ties to the lower. Throws Error for NaN, +infinity, or where all
// are -infinity.
int32_t checked_argmax(std::span<const float> logits, const char* what) {
  constexpr int64_t kLanes = 16;
  const int64_t n = static_cast<int64_t>(logits.size());
  // A vectorisable pass for the maximum and for the sum, which NaN or +infinity makes not finite.
  float lanes[kLanes];
  float poison[kLanes] = {};
  std::fill(lanes, lanes + kLanes, kMasked);
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; j++) {
      const float x = logits[i + j];
      lanes[j] = x > lanes[j] ? x : lanes[j];
      poison[j] += x > kMasked ? x * 0.0f : (x == kMasked ? 0.0f : x);
    }
  }
  float best = kMasked;
  float bad = 0.0f;
  for (int64_t i = n / kLanes * kLanes; i < n; i++) {
    best = std::max(best, logits[i]);
    if (logits[i] != kMasked) bad += logits[i] * 0.0f;
  }
  for (int64_t j = 0; j < kLanes; j++) {
    best = std::max(best, lanes[j]);
    bad += poison[j];
  }
  if (!(bad == 0.0f)) {
    for (int64_t i = 0; i < n; i++) {
      if (std::isnan(logits[i]) || logits[i] == INFINITY) {
        throw Error(std::string(what) + ": the logit of token " + std::to_string(i) + " is " +
                    (std::isnan(logits[i]) ? "NaN" : "+infinity") +
                    " (expected a finite number, or -infinity for a token that must not follow)");
      }
    }
  }
  if (best == kMasked) {
    throw Error(std::string(what) + ": no token can be chosen, all " + std::to_string(n) +
                " logits are -infinity");
  }
  return static_cast<int32_t>(std::find(logits.begin(), logits.end(), best) - logits.begin());
}

// Weights e^((logit - top) / temperature) in double; returns their sum, added in a fixed order. In
// simple loops over a chunk, which compilers vectorise.
template <typename Get>
double fill_weights(int64_t n, double top, double temperature, const Get& logit, double* weights) {
  for (int64_t i = 0; i < n; i++) {
    const double x = (double{logit(i)} - top) / temperature;
    weights[i] = x > kLeastExponent ? x : kLeastExponent;
  }
  for (int64_t i = 0; i < n; i++) weights[i] = portable_exp(weights[i]);
  double total = 0;
  for (int64_t i = 0; i < n; i++) total += weights[i];
  return total;
}

// Sum of e^(logit - top) over all logits, relative error below 1e-6: for reports, where single
// precision is four times as fast.
double exp_sum(std::span<const float> logits, float top) {
  constexpr int64_t kChunk = 512;
  constexpr int64_t kLanes = 16;
  float weights[kChunk];
  double total = 0;
  while (!logits.empty()) {
    const int64_t n = std::min<int64_t>(kChunk, static_cast<int64_t>(logits.size()));
    for (int64_t i = 0; i < n; i++) {
      const float x = logits[i] - top;
      weights[i] = x > kLeastExponentF ? x : kLeastExponentF;
    }
    std::fill(weights + n, weights + kChunk, kLeastExponentF);
    for (int64_t i = 0; i < kChunk; i++) weights[i] = portable_expf(weights[i]);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      for (int64_t j = 0; j < kLanes; j++) lanes[j] += weights[i + j];
    }
    for (const float lane : lanes) total += double{lane};
    logits = logits.subspan(n);
  }
  return total;
}

// Masks the logits [vocab] of tokens without a bit in allowed [vocab / 32 + 1].
void mask_all_but(std::span<const uint32_t> allowed, std::span<float> logits) {
  constexpr size_t kBits = 32;
  for (size_t begin = 0; begin < logits.size(); begin += kBits) {
    const uint32_t bits = allowed[begin / kBits];
    if (bits == ~uint32_t{0}) continue;
    const std::span<float> part = logits.subspan(begin, std::min(kBits, logits.size() - begin));
    if (bits == 0) {  // most of the vocabulary, mostly
      std::fill(part.begin(), part.end(), kMasked);
      continue;
    }
    for (size_t i = 0; i < part.size(); i++) part[i] = (bits >> i & 1) != 0 ? part[i] : kMasked;
  }
}

bool penalises(const SamplingParams& params) {
  return *params.repetition_penalty != 1.0 || *params.presence_penalty != 0.0 ||
         *params.frequency_penalty != 0.0;
}

constexpr float kLargest = std::numeric_limits<float>::max();

// Penalties may lie beyond f32, or take a logit there: that is the largest number, no infinity.
double in_f32(double penalty) { return std::clamp<double>(penalty, -kLargest, kLargest); }

void set_finite(float& logit, float changed) {
  if (std::isfinite(logit)) logit = static_cast<float>(in_f32(changed));
}

}  // namespace

Sampler::Sampler(int64_t vocab_size, const SamplingParams& params, std::span<const int32_t> end_ids)
    : vocab_size_(vocab_size),
      params_(params.with_defaults()),
      end_ids_(end_ids.begin(), end_ids.end()) {
  if (vocab_size < 1 || vocab_size > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("vocab_size must be between 1 and 2^31 - 1, not " +
                                std::to_string(vocab_size));
  }
  params_.validate(vocab_size);
  for (const int32_t id : end_ids_) {
    if (id < 0 || id >= vocab_size) {
      throw std::invalid_argument("end_ids must be token ids in [0, " + std::to_string(vocab_size) +
                                  "), not " + std::to_string(id));
    }
  }
  seed_ = params_.seed ? *params_.seed : system_seed();
}

TokenLogprob Sampler::sample(std::span<const float> logits, std::span<const int32_t> history,
                             int64_t n_generated, std::span<const uint32_t> allowed) {
  if (static_cast<int64_t>(logits.size()) != vocab_size_) {
    throw std::invalid_argument("expected " + std::to_string(vocab_size_) + " logits, not " +
                                std::to_string(logits.size()));
  }
  if (n_generated < 0 || n_generated > static_cast<int64_t>(history.size())) {
    throw std::invalid_argument("n_generated must be in [0, " + std::to_string(history.size()) +
                                "], the length of history, not " + std::to_string(n_generated));
  }
  const size_t allowed_words = static_cast<size_t>(vocab_size_) / 32 + 1;
  if (!allowed.empty() && allowed.size() != allowed_words) {
    throw std::invalid_argument("expected " + std::to_string(allowed_words) +
                                " words of allowed tokens, not " + std::to_string(allowed.size()));
  }
  const std::span<const float> adjusted = adjust(logits, history, n_generated, allowed);
  const bool changed = adjusted.data() != logits.data();
  const int32_t best = checked_argmax(adjusted, changed ? "sampling" : "the model's output");

  TokenLogprob out;
  out.token_id = *params_.temperature == 0.0 ? best : draw(adjusted, best);
  if (params_.logprobs >= 0) {
    const int32_t raw_best = changed ? checked_argmax(logits, "the model's output") : best;
    report(logits, logits[raw_best], out);
  }
  draws_++;
  return out;
}

bool Sampler::adjusts(int64_t n_generated) const {
  return params_.logits_processor || !params_.logit_bias.empty() || penalises(params_) ||
         (n_generated < params_.min_new_tokens && !end_ids_.empty());
}

int32_t Sampler::top_needed(int64_t n_generated) const {
  if (adjusts(n_generated)) return 0;
  const bool greedy = *params_.temperature == 0.0;
  if (!greedy && (*params_.top_k <= 0 || *params_.top_k >= vocab_size_)) return 0;
  const int32_t needed = std::max({greedy ? 1 : *params_.top_k, params_.logprobs, 1});
  return static_cast<int32_t>(std::min<int64_t>(needed, vocab_size_));
}

TokenLogprob Sampler::sample(const TopLogits& top) {
  TokenLogprob out;
  if (*params_.temperature == 0.0) {
    out.token_id = top.ids[0];
  } else {
    const size_t k = std::min<size_t>(*params_.top_k, top.ids.size());
    out.token_id = *draw_sorted({top.values.data(), k}, {top.ids.data(), k}, 0, /*complete=*/true);
  }
  if (params_.logprobs >= 0) {
    const double log_sum = top.values[0] + std::log(top.exp_sum);
    const size_t at = std::find(top.ids.begin(), top.ids.end(), out.token_id) - top.ids.begin();
    out.logprob = static_cast<float>(top.values[at] - log_sum);
    const size_t n = std::min<size_t>(params_.logprobs, top.ids.size());
    for (size_t i = 0; i < n; i++) {
      out.top.emplace_back(top.ids[i], static_cast<float>(top.values[i] - log_sum));
    }
  }
  draws_++;
  return out;
}

// The logits with everything applied that comes before the temperature: the model's own where
// nothing is asked for, else a changed copy.
std::span<const float> Sampler::adjust(std::span<const float> logits,
                                       std::span<const int32_t> history, int64_t n_generated,
                                       std::span<const uint32_t> allowed) {
  if (allowed.empty() && !adjusts(n_generated)) return logits;
  adjusted_.assign(logits.begin(), logits.end());
  if (params_.logits_processor) params_.logits_processor(history, adjusted_);
  if (!allowed.empty()) mask_all_but(allowed, adjusted_);
  for (const auto& [id, bias] : params_.logit_bias) adjusted_[id] += bias;
  if (penalises(params_)) penalise(history, n_generated);
  if (n_generated < params_.min_new_tokens) {
    for (const int32_t id : end_ids_) adjusted_[id] = kMasked;
  }
  return adjusted_;
}

void Sampler::penalise(std::span<const int32_t> history, int64_t n_generated) {
  for (const int32_t id : history) {
    if (id < 0 || id >= vocab_size_) {
      throw std::invalid_argument("history must hold token ids in [0, " +
                                  std::to_string(vocab_size_) + "), not " + std::to_string(id));
    }
  }
  counts_.resize(vocab_size_, 0);
  const auto for_each_distinct = [&](std::span<const int32_t> ids, const auto& apply) {
    for (const int32_t id : ids) counts_[id]++;
    for (const int32_t id : ids) {
      if (counts_[id] > 0) apply(adjusted_[id], counts_[id]);
      counts_[id] = 0;
    }
  };
  const size_t seen = *params_.penalty_window < 0
                          ? history.size()
                          : std::min<size_t>(history.size(), *params_.penalty_window);
  if (*params_.repetition_penalty != 1.0) {
    const double least = std::numeric_limits<float>::min();
    const float penalty = static_cast<float>(std::max(least, in_f32(*params_.repetition_penalty)));
    for_each_distinct(history.last(seen), [&](float& logit, int32_t) {
      set_finite(logit, logit > 0 ? logit / penalty : logit * penalty);
    });
  }
  if (*params_.presence_penalty != 0.0 || *params_.frequency_penalty != 0.0) {
    for_each_distinct(history.last(n_generated), [&](float& logit, int32_t count) {
      const double penalty =
          in_f32(*params_.presence_penalty) + in_f32(*params_.frequency_penalty) * count;
      set_finite(logit, logit - static_cast<float>(in_f32(penalty)));
    });
  }
}

// A token from the softmax at the temperature, cut by top-k, top-p and min-p. All three keep a
// beginning of the tokens sorted by probability, so only as much of that order is made as they
// need.
int32_t Sampler::draw(std::span<const float> logits, int32_t best) {
  const double top = logits[best];
  const double temperature = *params_.temperature;
  const int64_t n = vocab_size_;
  const bool cut_k = *params_.top_k > 0 && *params_.top_k < n;
  const bool cut_p = *params_.top_p < 1.0;
  const bool cut_min = *params_.min_p > 0.0;

  if (!cut_k && !cut_p && !cut_min) {
    weights_.resize(n);
    const double total =
        fill_weights(n, top, temperature, [&](int64_t i) { return logits[i]; }, weights_.data());
    return draw_from(weights_, total, {});
  }

  // top-p asks for a share of the weight of all tokens, of which only a beginning is sorted below.
  double all = 0;
  if (!cut_k && cut_p) {
    weights_.resize(n);
    all = fill_weights(n, top, temperature, [&](int64_t i) { return logits[i]; }, weights_.data());
  }
  const int64_t most = cut_k ? *params_.top_k : n;
  int64_t count = cut_k ? most : std::min<int64_t>(most, kFirstSorted);
  for (;;) {
    top_select(logits, count, order_);
    sorted_.resize(order_.size());
    for (size_t i = 0; i < order_.size(); i++) sorted_[i] = logits[order_[i]];
    const auto token = draw_sorted(sorted_, order_, all, count == most);
    if (token) return *token;
    count = std::min(most, 8 * count);
  }
}

std::optional<int32_t> Sampler::draw_sorted(std::span<const float> values,
                                            std::span<const int32_t> ids, double all,
                                            bool complete) {
  const size_t count = values.size();
  weights_.resize(std::max(weights_.size(), count));
  const double total = fill_weights(
      static_cast<int64_t>(count), values[0], *params_.temperature,
      [&](int64_t i) { return values[i]; }, weights_.data());
  if (all == 0) all = total;
  size_t kept = 0;
  double sum = 0;
  while (kept < count) {
    if (*params_.min_p > 0.0 && weights_[kept] < *params_.min_p) {  // the best token's weight is 1
      complete = true;
      break;
    }
    sum += weights_[kept++];
    if (*params_.top_p < 1.0 && sum >= *params_.top_p * all) {
      complete = true;
      break;
    }
  }
  if (!complete) return std::nullopt;
  return draw_from({weights_.data(), kept}, sum, ids);
}

// ids empty: the index itself.
int32_t Sampler::draw_from(std::span<const double> weights, double total,
                           std::span<const int32_t> ids) {
  const double target = uniform(seed_, draws_) * total;
  double sum = 0;
  size_t chosen = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    if (weights[i] == 0.0) continue;
    chosen = i;  // rounding may leave the sum below the target at the end: then the last one
    sum += weights[i];
    if (sum > target) break;
  }
  return ids.empty() ? static_cast<int32_t>(chosen) : ids[chosen];
}

void Sampler::report(std::span<const float> logits, float top, TokenLogprob& out) {
  const double log_sum = top + std::log(exp_sum(logits, top));
  const auto logprob = [&](int32_t id) { return static_cast<float>(logits[id] - log_sum); };
  out.logprob = logprob(out.token_id);
  if (params_.logprobs == 0) return;
  top_select(logits, params_.logprobs, order_);
  out.top.reserve(order_.size());
  for (const int32_t id : order_) out.top.emplace_back(id, logprob(id));
}

}  // namespace mustafar
