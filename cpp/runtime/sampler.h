// Chooses the next token from logits.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "mustafar/sampling.h"

namespace mustafar {

// In this order: logits_processor, constraint, logit_bias, penalties, min_new_tokens, temperature,
// top-k, top-p (of what top-k left), min-p, draw. The same seed and logits give the same tokens on
// any machine. One per generation; not for several threads at once.
class Sampler {
 public:
  // params: what they leave open is the library's default. end_ids: what min_new_tokens holds back
  // (end-of-sequence and stop ids). Throws std::invalid_argument where params.validate() does.
  Sampler(int64_t vocab_size, const SamplingParams& params, std::span<const int32_t> end_ids);

  // logits: [vocab] of the model. history: ids of the whole sequence, of which the last n_generated
  // were generated. allowed: bits of the tokens that may be chosen, as TokenConstraint::allow()
  // marks them; empty: all. Returns the token, its log-probability and the alternatives asked for.
  // Throws Error where a logit is NaN or +infinity or no token can be chosen, std::invalid_argument
  // for a wrong size or id; a call that throws can be repeated with the same outcome.
  TokenLogprob sample(std::span<const float> logits, std::span<const int32_t> history,
                      int64_t n_generated, std::span<const uint32_t> allowed = {});

  // How many of the largest logits are enough for the next token, where all may be chosen; 0: all
  // logits are needed.
  int32_t top_needed(int64_t n_generated) const;
  // The same token as from the whole row. top: regular, with at least top_needed() logits.
  TokenLogprob sample(const TopLogits& top);

  uint64_t seed() const { return seed_; }

 private:
  // Changes the model's logits before the temperature.
  bool adjusts(int64_t n_generated) const;
  std::span<const float> adjust(std::span<const float> logits, std::span<const int32_t> history,
                                int64_t n_generated, std::span<const uint32_t> allowed);
  void penalise(std::span<const int32_t> history, int64_t n_generated);
  int32_t draw(std::span<const float> logits, int32_t best);
  // A token of `ids`, whose logits `values` descend, cut by top-p (a share of `all`; 0: of these)
  // and min-p; none where the cut lies beyond them, unless they are all there is.
  std::optional<int32_t> draw_sorted(std::span<const float> values, std::span<const int32_t> ids,
                                     double all, bool complete);
  int32_t draw_from(std::span<const double> weights, double total, std::span<const int32_t> ids);
  void report(std::span<const float> logits, float top, TokenLogprob& out);

  int64_t vocab_size_;
  SamplingParams params_;
  std::vector<int32_t> end_ids_;
  uint64_t seed_;
  uint64_t draws_ = 0;

  // Scratch, [vocab] once needed.
  std::vector<float> adjusted_;
  std::vector<double> weights_;
  std::vector<int32_t> order_;
  std::vector<float> sorted_;    // logits of order_
  std::vector<int32_t> counts_;  // of every token in the part of history that is looked at
};

}  // namespace mustafar
