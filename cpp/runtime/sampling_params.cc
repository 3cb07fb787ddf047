#include <cmath>
#include <sstream>
#include <stdexcept>

#include "mustafar/sampling.h"

namespace mustafar {
namespace {

template <typename T>
[[noreturn]] void refuse(const char* field, T value, const char* range) {
  std::ostringstream message;
  message << field << " must be " << range << ", not " << value;
  throw std::invalid_argument(message.str());
}

// Of a field that may be left to its default. fits: written so that NaN does not.
template <typename T, typename Fits>
void check(const char* field, const std::optional<T>& value, const char* range, const Fits& fits) {
  if (value && !fits(*value)) refuse(field, *value, range);
}

void check_id(const char* field, int32_t id, int64_t vocab_size) {
  if (id >= 0 && id < vocab_size) return;
  refuse(field, id, ("a token id in [0, " + std::to_string(vocab_size) + ")").c_str());
}

}  // namespace

SamplingParams SamplingParams::with_defaults(const SamplingDefaults& model) const {
  SamplingParams all = *this;
  const auto decide = [](auto& field, const auto& of_model, auto otherwise) {
    if (!field) field = of_model.value_or(otherwise);
  };
  // transformers looks at the whole sequence, which is what a folder's penalty was chosen for.
  const bool own_penalty = !repetition_penalty && model.repetition_penalty;
  if (!all.penalty_window) all.penalty_window = own_penalty ? -1 : 64;
  decide(all.temperature, model.temperature, 0.8);
  decide(all.top_k, model.top_k, 40);
  decide(all.top_p, model.top_p, 0.95);
  decide(all.min_p, model.min_p, 0.05);
  decide(all.repetition_penalty, model.repetition_penalty, 1.0);
  decide(all.presence_penalty, model.presence_penalty, 0.0);
  decide(all.frequency_penalty, model.frequency_penalty, 0.0);
  return all;
}

void SamplingParams::validate(int64_t vocab_size) const {
  if (max_new_tokens < 0) refuse("max_new_tokens", max_new_tokens, "at least 0");
  if (min_new_tokens < 0) refuse("min_new_tokens", min_new_tokens, "at least 0");
  if (min_new_tokens > max_new_tokens) {
    refuse("min_new_tokens", min_new_tokens,
           ("at most max_new_tokens (" + std::to_string(max_new_tokens) + ")").c_str());
  }
  check("temperature", temperature, "finite and at least 0",
        [](double t) { return t >= 0.0 && std::isfinite(t); });
  check("top_k", top_k, "at least 0 (0: off)", [](int32_t k) { return k >= 0; });
  check("top_p", top_p, "in [0, 1] (1: off)", [](double p) { return p >= 0.0 && p <= 1.0; });
  check("min_p", min_p, "in [0, 1] (0: off)", [](double p) { return p >= 0.0 && p <= 1.0; });
  check("repetition_penalty", repetition_penalty, "finite and more than 0 (1: off)",
        [](double p) { return p > 0.0 && std::isfinite(p); });
  const auto finite = [](double p) { return std::isfinite(p); };
  check("presence_penalty", presence_penalty, "finite", finite);
  check("frequency_penalty", frequency_penalty, "finite", finite);
  check("penalty_window", penalty_window, "at least -1 (-1: all tokens)",
        [](int32_t n) { return n >= -1; });
  for (const auto& [id, bias] : logit_bias) {
    check_id("logit_bias", id, vocab_size);
    if (!(bias < INFINITY)) refuse("logit_bias", bias, "a number below infinity");
  }
  for (const std::string& text : stop) {
    if (text.empty()) throw std::invalid_argument("stop must not contain an empty text");
  }
  for (const int32_t id : stop_token_ids) check_id("stop_token_ids", id, vocab_size);
  if (logprobs < -1 || logprobs > vocab_size) {
    refuse("logprobs", logprobs,
           ("in [-1, " + std::to_string(vocab_size) + "] (-1: none)").c_str());
  }
}

const char* name_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::kLength:
      return "length";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kContext:
      return "context";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kTimeout:
      return "timeout";
  }
  return "?";
}

}  // namespace mustafar
