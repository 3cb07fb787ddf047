// The part of a generation that does not depend on how logits are computed: choose a token, keep
// the text, know when to end. Sessions and the batch scheduler drive the same loop.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "mustafar/model_config.h"
#include "mustafar/sampling.h"
#include "mustafar/tokenizer.h"
#include "runtime/sampler.h"
#include "runtime/stop_matcher.h"

namespace mustafar {

class TokenLoop {
 public:
  // params: what they leave open is the model's to say. tokenizer: null where the model has none
  // (then stop texts are refused and text stays empty).
  TokenLoop(const SamplingParams& params, const ModelConfig& model, const Tokenizer* tokenizer);

  // The text made continues that of these tokens.
  void start_after(std::span<const int32_t> before);

  // Chooses the next token. history: the whole sequence so far; room: tokens that the context has
  // left.
  int32_t choose(std::span<const float> logits, std::span<const int32_t> history, int64_t room);
  // The same from the largest logits alone, where top_needed() says how many are enough.
  int32_t choose(const TopLogits& top);
  // How many of the largest logits the choice of a token needs before which `ahead` more are made;
  // 0: the whole row.
  int32_t top_needed(int64_t ahead = 0) const {
    return constraint_ ? 0 : sampler_.top_needed(made_ + ahead);
  }
  // Takes the chosen token once it is in the cache; returns text that became certain. Ends the
  // generation where the token, the text or the count says so.
  std::string accept(int32_t token);
  // Ends it for another reason; returns text that was held back.
  std::string finish(FinishReason reason);

  bool done() const { return done_; }
  // After the end: how many of the tokens made stay in the cache (fewer than all after a stop
  // text).
  int64_t kept_tokens() const { return static_cast<int64_t>(result.token_ids.size()); }
  int64_t made_tokens() const { return made_; }

  GenerateResult result;

 private:
  bool is_end(int32_t token) const;
  // Sets allowed_ to what the constraint lets follow.
  void mark_allowed(int64_t room);
  // Takes a token's text; returns what became certain.
  std::string take_text(int32_t token);

  SamplingParams params_;
  std::vector<int32_t> end_ids_;
  Sampler sampler_;
  const Tokenizer* tokenizer_;
  std::optional<Tokenizer::Stream> stream_;
  StopMatcher matcher_;
  std::unique_ptr<TokenConstraint> constraint_;  // null: anything may follow
  std::vector<uint32_t> allowed_;  // [vocab / 32 + 1] bits, empty without a constraint
  std::optional<TokenLogprob> chosen_;
  int64_t made_ = 0;
  bool done_ = false;
};

}  // namespace mustafar
