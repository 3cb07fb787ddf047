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

void check_id(const char* field, int32_t id, int64_t vocab_size) {
  if (id >= 0 && id < vocab_size) return;
  refuse(field, id, ("a token id in [0, " + std::to_string(vocab_size) + ")").c_str());
}

}  // namespace

void SamplingParams::validate(int64_t vocab_size) const {
  // Written so that NaN fails each comparison.
  if (max_new_tokens < 0) refuse("max_new_tokens", max_new_tokens, "at least 0");
  if (min_new_tokens < 0) refuse("min_new_tokens", min_new_tokens, "at least 0");
  if (min_new_tokens > max_new_tokens) {
    refuse("min_new_tokens", min_new_tokens,
           ("at most max_new_tokens (" + std::to_string(max_new_tokens) + ")").c_str());
  }
  if (!(temperature >= 0.0 && std::isfinite(temperature))) {
    refuse("temperature", temperature, "finite and at least 0");
  }
  if (top_k < 0) refuse("top_k", top_k, "at least 0 (0: off)");
  if (!(top_p >= 0.0 && top_p <= 1.0)) refuse("top_p", top_p, "in [0, 1] (1: off)");
  if (!(min_p >= 0.0 && min_p <= 1.0)) refuse("min_p", min_p, "in [0, 1] (0: off)");
  if (!(repetition_penalty > 0.0 && std::isfinite(repetition_penalty))) {
    refuse("repetition_penalty", repetition_penalty, "finite and more than 0 (1: off)");
  }
  if (!std::isfinite(presence_penalty)) refuse("presence_penalty", presence_penalty, "finite");
  if (!std::isfinite(frequency_penalty)) refuse("frequency_penalty", frequency_penalty, "finite");
  if (penalty_window < -1) {
    refuse("penalty_window", penalty_window, "at least -1 (-1: all tokens)");
  }
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
  }
  return "?";
}

}  // namespace mustafar
