#include <chrono>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "core/held.h"
#include "mustafar/error.h"
#include "runtime/generation_impl.h"
#include "runtime/prompt_ids.h"

namespace mustafar {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

Generation::Impl::Impl(std::shared_ptr<Session::Impl> of, const SamplingParams& params)
    : session(std::move(of)),
      loop_(params, session->engine->config,
            session->engine->tokenizer ? &*session->engine->tokenizer : nullptr) {}

std::unique_ptr<Generation::Impl> Generation::Impl::begin(
    const std::shared_ptr<Session::Impl>& session, const Prompt& prompt,
    const SamplingParams& params, const PromptOptions& options) {
  auto generation = std::make_unique<Impl>(session, params);
  const auto& tokenizer = session->engine->tokenizer;
  const std::vector<int32_t> ids =
      prompt_ids(prompt, tokenizer ? &*tokenizer : nullptr,
                 static_cast<int64_t>(session->tokens.size()), options.parse_special);
  if (ids.empty() && session->tokens.empty()) {
    throw std::invalid_argument("the prompt is empty and so is the session: nothing to continue");
  }
  session->check_tokens(ids);
  session->check_room(static_cast<int64_t>(ids.size()));
  const auto start = Clock::now();
  if (!ids.empty()) {
    session->append(ids, session->prefill_progress, generation->loop_.top_needed());
  }
  if (!options.own_text) generation->loop_.start_after(session->tokens);
  generation->loop_.result.stats.prompt_tokens = static_cast<int64_t>(ids.size());
  generation->loop_.result.stats.prefill_seconds = seconds_since(start);
  return generation;
}

void Generation::Impl::own_session() {
  if (loop_.done()) {  // no token was asked for
    end();
  } else {
    session->ownership.give_to(this);
  }
}

bool Generation::Impl::make_token(std::string& piece) {
  piece.clear();
  if (loop_.done()) return false;
  const int64_t position = static_cast<int64_t>(session->tokens.size());
  if (position >= session->max_tokens) {
    const std::lock_guard lock(result_mutex_);
    piece = loop_.finish(FinishReason::kContext);
    return !piece.empty();
  }
  const auto start = Clock::now();
  int32_t token;
  if (session->next.has_top(loop_.top_needed())) {
    token = loop_.choose(session->next.top());
  } else {
    session->ensure_logits();
    token = loop_.choose(session->next.values(), session->tokens, session->max_tokens - position);
  }
  session->append_decode(token, loop_.top_needed(/*ahead=*/1));
  {
    const std::lock_guard lock(result_mutex_);
    piece = loop_.accept(token);
    loop_.result.stats.generated_tokens = loop_.made_tokens();
  }
  if (const int64_t cut = loop_.made_tokens() - loop_.kept_tokens(); cut > 0) {
    session->rewind(position + 1 - cut);
  }
  const std::lock_guard lock(result_mutex_);
  loop_.result.stats.decode_seconds += seconds_since(start);
  return true;
}

void Generation::Impl::finish(FinishReason reason) {
  const std::lock_guard lock(result_mutex_);
  loop_.finish(reason);
}

void Generation::Impl::end() {
  ended_ = true;
  session->ownership.take_from(this);
  if (at_end) std::exchange(at_end, {})();
}

bool Generation::Impl::step(std::string& piece) {
  piece.clear();
  if (ended_) return false;
  bool more = false;
  const Ownership::Entry entry = session->ownership.enter(this);
  if (entry == Ownership::Entry::kNotYours) return false;  // stopped by another thread just now
  Ownership::require(entry);
  {
    const Session::Impl::Use use(*session, std::adopt_lock);
    try {
      if (!stop_wanted_) more = make_token(piece);
    } catch (...) {
      try {
        finish(FinishReason::kCancelled);
        end();
      } catch (...) {  // the first error is the one to tell
      }
      throw;
    }
    if (stop_wanted_) finish(FinishReason::kCancelled);
    if (loop_.done()) end();
  }
  if (stop_wanted_) stop();  // asked for while this call was ending
  return more;
}

void Generation::Impl::stop() {
  if (ended_) return;
  stop_wanted_ = true;
  switch (session->ownership.enter(this)) {
    case Ownership::Entry::kEntered: {
      const Session::Impl::Use use(*session, std::adopt_lock);
      finish(FinishReason::kCancelled);
      end();
      break;
    }
    case Ownership::Entry::kClosed:
      finish(FinishReason::kCancelled);
      end();
      break;
    default:  // the step that runs ends it
      break;
  }
}

GenerateResult Generation::Impl::result() const {
  const std::lock_guard lock(result_mutex_);
  return loop_.result;
}

Generation::Generation(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Generation::~Generation() {
  // What another thread was changing when this process was forked is left as it is.
  if (impl_ != nullptr && impl_->session->ownership.lost()) static_cast<void>(impl_.release());
}
Generation::Generation(Generation&&) noexcept = default;
Generation& Generation::operator=(Generation&& other) noexcept {
  const Generation old(std::move(*this));
  impl_ = std::move(other.impl_);
  return *this;
}

bool Generation::step(std::string& piece) { return held(impl_, "generation").step(piece); }
void Generation::stop() { held(impl_, "generation").stop(); }
GenerateResult Generation::result() const { return held(impl_, "generation").result(); }

Generation Session::start(const Prompt& prompt, const SamplingParams& params,
                          const PromptOptions& options) {
  const Impl::Use use(impl());
  auto generation = Generation::Impl::begin(impl_, prompt, params, options);
  generation->own_session();
  return Generation(std::move(generation));
}

GenerateResult Session::generate(const Prompt& prompt, const SamplingParams& params,
                                 const PieceCallback& on_piece, const PromptOptions& options) {
  const Impl::Use use(impl());
  Impl& session = *impl_;
  // What to return to if the call fails half-way: pages are shared, so this costs a tail's copy.
  const std::shared_ptr<Impl> before = session.fork();
  try {
    const auto generation = Generation::Impl::begin(impl_, prompt, params, options);
    std::string piece;
    while (generation->make_token(piece)) {
      if (on_piece && !piece.empty() && !on_piece(piece)) {
        generation->finish(FinishReason::kCancelled);
        break;
      }
    }
    return generation->result();
  } catch (...) {
    {
      std::lock_guard lock(session.tokens_mutex);
      session.cache = std::move(before->cache);
      session.tokens = std::move(before->tokens);
    }
    session.next = std::move(before->next);
    throw;
  }
}

}  // namespace mustafar
