#include <chrono>
#include <stdexcept>
#include <utility>

#include "mustafar/error.h"
#include "mustafar/session.h"
#include "runtime/prompt_ids.h"
#include "runtime/session_impl.h"
#include "runtime/token_loop.h"

namespace mustafar {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

struct Generation::Impl {
  Session::Impl* session;
  TokenLoop loop;
  int64_t expected_position = 0;  // of the session, while nobody else uses it

  Impl(Session::Impl& session, const SamplingParams& params)
      : session(&session),
        loop(params, session.engine->config,
             session.engine->tokenizer ? &*session.engine->tokenizer : nullptr) {}

  bool step(std::string& piece);
};

bool Generation::Impl::step(std::string& piece) {
  piece.clear();
  if (loop.done()) return false;
  Session::Impl::Use use(*session);
  if (static_cast<int64_t>(session->tokens.size()) != expected_position) {
    throw StateError("the session was used while a generation was in progress");
  }
  if (expected_position >= session->max_tokens) {
    piece = loop.finish(FinishReason::kContext);
    return !piece.empty();
  }
  const auto start = Clock::now();
  int32_t token;
  if (session->next.has_top(loop.top_needed())) {
    token = loop.choose(session->next.top());
  } else {
    session->ensure_logits();
    token = loop.choose(session->next.values(), session->tokens);
  }
  session->append_decode(token, loop.top_needed(/*ahead=*/1));
  piece = loop.accept(token);
  expected_position++;
  if (const int64_t cut = loop.made_tokens() - loop.kept_tokens(); cut > 0) {
    session->rewind(expected_position - cut);
    expected_position -= cut;
  }
  loop.result.stats.generated_tokens = loop.made_tokens();
  loop.result.stats.decode_seconds += seconds_since(start);
  return true;
}

Generation::Generation(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Generation::~Generation() = default;
Generation::Generation(Generation&&) noexcept = default;
Generation& Generation::operator=(Generation&&) noexcept = default;

bool Generation::step(std::string& piece) { return impl_->step(piece); }

void Generation::stop() {
  if (impl_->loop.done()) return;
  impl_->loop.finish(FinishReason::kCancelled);
}

const GenerateResult& Generation::result() const { return impl_->loop.result; }

Generation Session::start(const Prompt& prompt, const SamplingParams& params,
                          const PromptOptions& options) {
  Impl::Use use(*impl_);
  const Model::Impl& engine = *impl_->engine;
  auto generation = std::make_unique<Generation::Impl>(*impl_, params);
  const std::vector<int32_t> ids = prompt_ids(
      prompt, engine.tokenizer ? &*engine.tokenizer : nullptr, position(), options.parse_special);
  if (ids.empty() && impl_->tokens.empty()) {
    throw std::invalid_argument("the prompt is empty and so is the session: nothing to continue");
  }
  impl_->check_tokens(ids);
  impl_->check_room(static_cast<int64_t>(ids.size()));
  impl_->cancelled = false;
  const auto start = Clock::now();
  if (!ids.empty()) {
    impl_->append(ids, impl_->prefill_progress, generation->loop.top_needed());
  }
  if (!options.own_text) generation->loop.start_after(impl_->tokens);
  generation->expected_position = position();
  generation->loop.result.stats.prompt_tokens = static_cast<int64_t>(ids.size());
  generation->loop.result.stats.prefill_seconds = seconds_since(start);
  return Generation(std::move(generation));
}

GenerateResult Session::generate(const Prompt& prompt, const SamplingParams& params,
                                 const PieceCallback& on_piece, const PromptOptions& options) {
  // What to return to if the call fails half-way: pages are shared, so this costs a tail's copy.
  std::unique_ptr<Impl> before;
  {
    Impl::Use use(*impl_);
    if (!impl_->tokens.empty()) before = impl_->fork();
  }
  try {
    Generation generation = start(prompt, params, options);
    std::string piece;
    while (generation.step(piece)) {
      if (on_piece && !piece.empty() && !on_piece(piece)) {
        generation.stop();
        break;
      }
    }
    return generation.result();
  } catch (...) {
    if (before == nullptr) {
      impl_->reset();
      throw;
    }
    impl_->cache = std::move(before->cache);
    {
      std::lock_guard lock(impl_->tokens_mutex);
      impl_->tokens = std::move(before->tokens);
    }
    impl_->next = std::move(before->next);
    throw;
  }
}

}  // namespace mustafar
