#include "runtime/session_impl.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "mustafar/error.h"
#include "runtime/prompt_ids.h"

namespace mustafar {

Session::Impl::Impl(const Model& model, const KVConfig& kv, std::optional<int32_t> limit)
    : model(model), engine(model.impl()), kv(kv) {
  const int64_t context = engine->config.max_position_embeddings;
  max_tokens = limit.value_or(context);
  if (max_tokens < 1 || max_tokens > context) {
    throw std::invalid_argument("max_tokens is " + std::to_string(max_tokens) +
                                ", must be between 1 and the model's context of " +
                                std::to_string(context) + " tokens");
  }
  spec = engine->cache_spec(kv);
  cache.emplace(engine->new_cache(spec, max_tokens));
  buffers = std::make_unique<ForwardBuffers>(*engine->backend);
  count_workspace();
  publish_usage();
}

Session::Impl::~Impl() {
  buffers.reset();
  count_workspace();
}

std::shared_ptr<Session::Impl> Session::Impl::make(const Model& model, const KVConfig& kv,
                                                   std::optional<int32_t> max_tokens) {
  return {new Impl(model, kv, max_tokens), [](Impl* impl) {
            if (!impl->ownership.lost()) delete impl;
          }};
}

void Session::Impl::count_workspace() {
  const int64_t now = buffers != nullptr ? buffers->bytes() : 0;
  engine->workspace_bytes += now - counted_workspace;
  counted_workspace = now;
}

void Session::Impl::check_interrupt() {
  if (ownership.take_cancel()) throw Cancelled("cancelled by the caller");
  if (interrupt_check) interrupt_check();
}

void Session::Impl::check_tokens(std::span<const int32_t> token_ids) const {
  check_token_ids(token_ids, vocab_size());
}

void Session::Impl::check_room(int64_t n) const {
  const int64_t position = static_cast<int64_t>(tokens.size());
  if (position + n > max_tokens) {
    throw ContextOverflow(std::to_string(n) + " tokens after the " + std::to_string(position) +
                          " cached exceed max_tokens = " + std::to_string(max_tokens));
  }
}

void Session::Impl::reserve_tokens(size_t n) {
  std::lock_guard lock(tokens_mutex);
  tokens.reserve(tokens.size() + n);
}

void Session::Impl::append_tokens(std::span<const int32_t> token_ids) {
  std::lock_guard lock(tokens_mutex);
  tokens.insert(tokens.end(), token_ids.begin(), token_ids.end());
  usage = cache->memory();
}

void Session::Impl::cut_tokens(int64_t length) {
  std::lock_guard lock(tokens_mutex);
  tokens.resize(length);
  usage = cache->memory();
}

void Session::Impl::publish_usage() {
  std::lock_guard lock(tokens_mutex);
  if (cache) usage = cache->memory();
}

std::vector<int32_t> Session::Impl::copy_tokens() const {
  std::lock_guard lock(tokens_mutex);
  return tokens;
}

std::span<const float> Session::Impl::prefill(
    std::span<const int32_t> token_ids, const std::function<void(int64_t, int64_t)>& progress) {
  if (token_ids.empty()) throw std::invalid_argument("prefill needs at least one token");
  check_tokens(token_ids);
  check_room(static_cast<int64_t>(token_ids.size()));
  append(token_ids, progress);
  return next.values();
}

std::span<const float> Session::Impl::decode(int32_t token_id) {
  check_tokens({&token_id, 1});
  check_room(1);
  append_decode(token_id);
  return next.values();
}

std::span<const float> Session::Impl::logits() {
  if (tokens.empty()) throw StateError("the session is empty: there are no logits yet");
  ensure_logits();
  return next.values();
}

void Session::Impl::take_contents(Impl&& other) {
  std::lock_guard lock(tokens_mutex);
  cache = std::move(other.cache);
  std::swap(buffers, other.buffers);  // where a row of logits may be
  std::swap(counted_workspace, other.counted_workspace);
  tokens = std::move(other.tokens);
  next = std::move(other.next);
  usage = cache->memory();
}

void Session::Impl::append(std::span<const int32_t> token_ids,
                           const std::function<void(int64_t, int64_t)>& progress,
                           int32_t top_needed) {
  reserve_tokens(token_ids.size());
  const bool top_alone = NextLogits::top_suffices(*engine->backend, top_needed);
  float* const room = top_alone ? nullptr : next.room(vocab_size());
  TopLogits top;
  Prefill prefill(*engine->llama, *cache, {token_ids.begin(), token_ids.end()}, *buffers);
  const auto between = [&](int64_t done, int64_t total) {
    check_interrupt();
    if (progress) progress(done, total);
  };
  while (prefill.step(between)) {
  }
  next.forget_device_row();
  const int64_t last = static_cast<int64_t>(token_ids.size()) - 1;
  if (top_alone) {
    top = prefill.top_logits(last, top_needed);
  } else {
    prefill.logits(last, 1, room);
  }
  count_workspace();
  prefill.finish();
  append_tokens(token_ids);
  set_next(top_alone, std::move(top));
}

void Session::Impl::append_decode(int32_t token_id, int32_t top_needed) {
  check_interrupt();
  reserve_tokens(1);
  SequenceCache* const caches[] = {&*cache};
  const int32_t ids[] = {token_id};
  const bool top_alone = NextLogits::top_suffices(*engine->backend, top_needed);
  TopLogits top;
  next.forget_device_row();
  if (top_alone) {
    engine->llama->decode_top(caches, ids, top_needed, {&top, 1}, *buffers);
  } else {
    engine->llama->decode(caches, ids, next.room(vocab_size()), *buffers);
  }
  count_workspace();
  append_tokens(ids);
  set_next(top_alone, std::move(top));
}

void Session::Impl::set_next(bool top_alone, TopLogits top) {
  if (top_alone) {
    next.set_top(std::move(top), buffers->logits(vocab_size()));
  } else {
    next.set_from_room();
  }
}

void Session::Impl::ensure_logits() {
  next.fetch(*engine->backend, vocab_size());
  if (next.whole() || tokens.empty()) return;
  const int32_t last = tokens.back();
  SequenceCache before = cache->fork();
  try {
    rewind(static_cast<int64_t>(tokens.size()) - 1);
    append_decode(last);
  } catch (...) {
    std::lock_guard lock(tokens_mutex);
    cache = std::move(before);
    // The call may have failed before it cut the token off; there is room for it.
    if (static_cast<int64_t>(tokens.size()) < cache->length()) tokens.push_back(last);
    throw;
  }
}

void Session::Impl::rewind(int64_t position) {
  const int64_t length = static_cast<int64_t>(tokens.size());
  if (position < 0 || position > length) {
    throw std::invalid_argument("cannot rewind to position " + std::to_string(position) +
                                ": the session holds " + std::to_string(length) + " tokens");
  }
  if (position == length) return;
  if (position == 0) {
    reset();
    return;
  }
  // Query magnitudes, which some policies rank by, are not restored: tokens that are cut have
  // overwritten those of older ones. No block asks for them: the window of the next one to be
  // compressed starts later.
  if (spec->compressed(position) == cache->compressed()) {
    cache->cut_tail(position);
    cut_tokens(position);
    next.drop();
    return;
  }
  // Where a sliding window has dropped what would be seen again, all is computed again.
  SequenceCache kept =
      cache->can_cut(position) ? cache->cut_store(position) : engine->new_cache(spec, max_tokens);
  const int64_t first = kept.length();
  const bool recompute = first < position;
  if (recompute) {
    float* const room = next.room(vocab_size());
    Prefill prefill(*engine->llama, kept, {tokens.begin() + first, tokens.begin() + position},
                    *buffers);
    while (prefill.step([&](int64_t, int64_t) { check_interrupt(); })) {
    }
    next.forget_device_row();
    prefill.logits(position - first - 1, 1, room);
    prefill.finish();
    count_workspace();
  }
  cache = std::move(kept);
  cut_tokens(position);
  next.drop();
  if (recompute) next.set_from_room();
}

std::shared_ptr<Session::Impl> Session::Impl::fork() const {
  auto other = make(model, kv, static_cast<int32_t>(max_tokens));
  other->cache = cache->fork();
  other->tokens = tokens;
  other->next = next.copy_to_host(*engine->backend, vocab_size());
  other->interrupt_check = interrupt_check;
  other->publish_usage();
  return other;
}

void Session::Impl::reset() {
  SequenceCache empty = engine->new_cache(spec, max_tokens);  // the call may fail
  cache = std::move(empty);
  cut_tokens(0);
  next.drop();
}

Scorer Session::Impl::scorer(std::span<const int32_t> token_ids) {
  check_tokens(token_ids);
  const int64_t n = static_cast<int64_t>(token_ids.size());
  if (n < 2) throw std::invalid_argument("scoring needs at least two tokens");
  if (n > max_tokens) {
    throw ContextOverflow(std::to_string(n) +
                          " tokens exceed max_tokens = " + std::to_string(max_tokens));
  }
  Scorer scorer(*engine, spec);
  scorer.between = [this](int64_t, int64_t) { check_interrupt(); };
  return scorer;
}

}  // namespace mustafar
