#include "runtime/token_loop.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace mustafar {
namespace {

std::vector<int32_t> all_end_ids(const SamplingParams& params, std::span<const int32_t> eos_ids) {
  std::vector<int32_t> ids = params.stop_token_ids;
  if (!params.ignore_eos) ids.insert(ids.end(), eos_ids.begin(), eos_ids.end());
  return ids;
}

// Special tokens have no text: the stop texts that spell one need it shown to the matcher.
std::vector<bool> stops_with_special_tokens(const std::vector<std::string>& stops,
                                            const Tokenizer* tokenizer) {
  std::vector<bool> with_special;
  for (const std::string& stop : stops) {
    bool found = false;
    if (tokenizer != nullptr) {
      for (const int32_t id :
           tokenizer->encode(stop, /*add_special=*/false, /*parse_special=*/true)) {
        found = found || tokenizer->is_special(id);
      }
    }
    with_special.push_back(found);
  }
  return with_special;
}

}  // namespace

TokenLoop::TokenLoop(const SamplingParams& params, const ModelConfig& model,
                     const Tokenizer* tokenizer)
    : params_(params.with_defaults(model.sampling)),
      end_ids_(all_end_ids(params, model.eos_token_ids)),
      sampler_(model.vocab_size, params_, end_ids_),
      tokenizer_(tokenizer),
      matcher_(params.stop, stops_with_special_tokens(params.stop, tokenizer)) {
  if (tokenizer != nullptr) {
    stream_.emplace(*tokenizer);
  } else if (!params.stop.empty()) {
    throw std::invalid_argument(
        "stop texts need a tokenizer, which the model folder does not have");
  }
  if (params.constraint) {
    constraint_ = params.constraint();
    allowed_.resize(static_cast<size_t>(model.vocab_size) / 32 + 1);
  }
  if (params.max_new_tokens == 0) finish(FinishReason::kLength);
}

void TokenLoop::start_after(std::span<const int32_t> before) {
  if (tokenizer_ != nullptr && !done_) stream_.emplace(*tokenizer_, /*skip_special=*/true, before);
}

bool TokenLoop::is_end(int32_t token) const {
  return std::find(end_ids_.begin(), end_ids_.end(), token) != end_ids_.end();
}

void TokenLoop::mark_allowed(int64_t room) {
  constraint_->set_tokens_left(std::min<int64_t>(params_.max_new_tokens - made_, room));
  std::fill(allowed_.begin(), allowed_.end(), 0);
  if (!constraint_->allow(allowed_)) return;
  for (const int32_t id : end_ids_) allowed_[id / 32] |= uint32_t{1} << (id % 32);
}

int32_t TokenLoop::choose(std::span<const float> logits, std::span<const int32_t> history,
                          int64_t room) {
  if (constraint_) mark_allowed(room);
  chosen_ = sampler_.sample(logits, history, made_, allowed_);
  return chosen_->token_id;
}

int32_t TokenLoop::choose(const TopLogits& top) {
  chosen_ = sampler_.sample(top);
  return chosen_->token_id;
}

std::string TokenLoop::accept(int32_t token) {
  made_++;
  result.token_ids.push_back(token);
  if (params_.logprobs >= 0) result.logprobs.push_back(std::move(*chosen_));
  chosen_.reset();
  if (is_end(token)) return finish(FinishReason::kStop);  // its own text is not part of the output

  std::string text;
  if (stream_) {
    text = take_text(token);
    if (matcher_.matched()) {
      result.text += text;
      result.token_ids.resize(matcher_.kept_tokens());
      if (!result.logprobs.empty()) result.logprobs.resize(result.token_ids.size());
      result.finish_reason = FinishReason::kStop;
      done_ = true;
      return text;
    }
    result.text += text;
  }
  if (constraint_ && !constraint_->accept(token)) {
    const bool early = constraint_->ended_early();
    return text + finish(early ? FinishReason::kLength : FinishReason::kStop);
  }
  if (made_ >= params_.max_new_tokens) text += finish(FinishReason::kLength);
  return text;
}

std::string TokenLoop::take_text(int32_t token) {
  if (!matcher_.sees_hidden() || !tokenizer_->is_special(token)) {
    return matcher_.push(stream_->push(token));
  }
  std::string text = matcher_.push(stream_->settle(), /*is_token=*/false);
  text += matcher_.push(stream_->push(token));
  return text + matcher_.push_hidden(tokenizer_->id_to_token(token));
}

std::string TokenLoop::finish(FinishReason reason) {
  if (done_) return {};
  done_ = true;
  result.finish_reason = reason;
  if (!stream_) return {};
  std::string text = matcher_.push(stream_->flush(), /*is_token=*/false);
  text += matcher_.flush();
  result.text += text;
  return text;
}

}  // namespace mustafar
