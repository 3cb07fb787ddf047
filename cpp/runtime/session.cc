#include "mustafar/session.h"

#include <algorithm>
#include <deque>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/held.h"
#include "mustafar/error.h"
#include "runtime/session_impl.h"

namespace mustafar {

Session::Session(const Model& model, const KVConfig& kv, std::optional<int32_t> max_tokens)
    : impl_(Impl::make(model, kv, max_tokens)) {}
Session::Session(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() = default;
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;

const std::shared_ptr<Session::Impl>& Session::shared_impl() const {
  held(impl_, "session");
  return impl_;
}

std::span<const float> Session::prefill(std::span<const int32_t> token_ids,
                                        const std::function<void(int64_t, int64_t)>& progress) {
  Impl::Use use(impl());
  return impl_->prefill(token_ids, progress);
}

std::span<const float> Session::decode(int32_t token_id) {
  Impl::Use use(impl());
  return impl_->decode(token_id);
}

std::vector<float> Session::decode_batch(std::span<Session* const> sessions,
                                         std::span<const int32_t> token_ids) {
  const size_t n = sessions.size();
  if (n == 0 || token_ids.size() != n) {
    throw std::invalid_argument("decode_batch was given " + std::to_string(n) + " sessions and " +
                                std::to_string(token_ids.size()) +
                                " tokens, needs one token for each of at least one session");
  }
  std::deque<Impl::Use> uses;  // the same session twice is refused here
  std::vector<SequenceCache*> caches;
  Impl& first = sessions[0]->impl();
  for (size_t i = 0; i < n; i++) {
    Impl& session = sessions[i]->impl();
    uses.emplace_back(session);
    if (session.engine != first.engine) {
      throw std::invalid_argument("decode_batch was given sessions of different models");
    }
    session.check_tokens(token_ids.subspan(i, 1));
    session.check_room(1);
    session.reserve_tokens(1);
    session.next.room(session.vocab_size());
    caches.push_back(&*session.cache);
  }
  const int64_t vocab = first.vocab_size();
  std::vector<float> logits(n * vocab);
  first.next.fetch(*first.engine->backend, vocab);  // the call may fail
  first.next.forget_device_row();
  for (Session* session : sessions) session->impl_->check_interrupt();
  first.engine->llama->decode(caches, token_ids, logits.data(), *first.buffers);
  first.count_workspace();
  for (size_t i = 0; i < n; i++) {
    Impl& session = *sessions[i]->impl_;
    session.append_tokens(token_ids.subspan(i, 1));
    std::copy_n(logits.begin() + static_cast<int64_t>(i) * vocab, vocab, session.next.room(vocab));
    session.next.set_from_room();
  }
  return logits;
}

std::span<const float> Session::logits() const {
  Impl::Use use(impl());
  return impl_->logits();
}

void Session::score_logits(
    std::span<const int32_t> token_ids,
    const std::function<void(int64_t, std::span<const float>)>& visit) const {
  Impl::Use use(impl());
  Scorer scorer = impl_->scorer(token_ids);
  Backend& backend = *impl_->engine->backend;
  const int64_t vocab = impl_->vocab_size();
  const std::vector<int32_t> ids(token_ids.begin(), token_ids.end());
  std::vector<float> host;
  scorer.run({&ids, 1}, [&](std::span<const Scorer::Row> rows, const float* logits) {
    if (!backend.host_memory()) {
      host.resize(rows.size() * vocab);
      backend.download(host.data(), logits, static_cast<int64_t>(host.size()) * 4);
      logits = host.data();
    }
    for (size_t i = 0; i < rows.size(); i++) {
      visit(rows[i].position, {logits + i * vocab, static_cast<size_t>(vocab)});
    }
  });
}

std::vector<float> Session::score(std::span<const int32_t> token_ids) const {
  Impl::Use use(impl());
  const std::vector<int32_t> ids(token_ids.begin(), token_ids.end());
  return std::move(impl_->scorer(token_ids).score({&ids, 1})[0].log_probs);
}

int64_t Session::position() const {
  const Impl& session = impl();
  std::lock_guard lock(session.tokens_mutex);
  return static_cast<int64_t>(session.tokens.size());
}
std::vector<int32_t> Session::tokens() const { return impl().copy_tokens(); }
int64_t Session::max_tokens() const { return impl().max_tokens; }
const Model& Session::model() const { return impl().model; }
const KVConfig& Session::kv_config() const { return impl().kv; }

MemoryUsage Session::memory() const {
  const Impl& session = impl();
  if (session.ownership.closed()) Ownership::require(Ownership::Entry::kClosed);
  std::lock_guard lock(session.tokens_mutex);
  return session.usage;
}

void Session::rewind(int64_t position) {
  Impl::Use use(impl());
  impl_->rewind(position);
}

Session Session::fork() const {
  Impl::Use use(impl());
  return Session(impl_->fork());
}

void Session::reset() {
  Impl::Use use(impl());
  impl_->reset();
}

void Session::close() {
  Impl& session = impl();
  const Ownership::Entry entry = session.ownership.enter_to_close();
  if (entry == Ownership::Entry::kClosed) return;
  Ownership::require(entry);
  const Impl::Use use(session, std::adopt_lock);
  session.cache.reset();
  session.buffers.reset();
  session.count_workspace();
  {
    std::lock_guard lock(session.tokens_mutex);
    session.tokens = {};
  }
  session.next = {};
}

void Session::save(const std::filesystem::path& file) const {
  Impl::Use use(impl());
  impl_->save(file);
}

void Session::cancel() { impl().ownership.cancel(); }
void Session::set_interrupt_check(std::function<void()> check) {
  Ownership::require(impl().ownership.enter_beside_owner());
  const Impl::Use use(*impl_, std::adopt_lock);
  impl_->interrupt_check = std::move(check);
}
void Session::set_prefill_progress(std::function<void(int64_t, int64_t)> progress) {
  Ownership::require(impl().ownership.enter_beside_owner());
  const Impl::Use use(*impl_, std::adopt_lock);
  impl_->prefill_progress = std::move(progress);
}

}  // namespace mustafar
