// One sequence of tokens and its cache.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "mustafar/kv_config.h"
#include "mustafar/memory_usage.h"
#include "mustafar/model.h"
#include "mustafar/sampling.h"

namespace mustafar {

class Generation;

struct PromptOptions {
  // Special tokens spelled in a text become those tokens, as Tokenizer::encode has it.
  bool parse_special = false;
  // The text made is one of its own, as a chat's reply is. Otherwise it continues the text of the
  // tokens before it: prompt and text one behind the other are the whole.
  bool own_text = false;
};

// One call at a time: a second one, from any thread or from a callback, gets StateError and
// disturbs nothing. Between the steps of a generation the session is the generation's. What may be
// called at any time: position, tokens, memory and what never changes, and cancel. Every call that
// throws leaves the session as it was before.
//
// A handle: generations and chats hold on to the session's contents, wherever the handle is moved
// and even once it is destroyed. All but destroying and assigning to a handle that was moved from
// throws StateError, as it does for every class of the library that can be moved from.
class Session {
 public:
  // max_tokens: context limit; none: the model's.
  explicit Session(const Model& model, const KVConfig& kv = {},
                   std::optional<int32_t> max_tokens = std::nullopt);
  ~Session();
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;

  // Appends tokens in one forward call; returns the logits [vocab] after the last, valid until the
  // next call. Throws std::invalid_argument for a bad id or an empty prompt, ContextOverflow,
  // OutOfMemory, Cancelled.
  // progress: called now and then with (tokens x layers done, in all), on the calling thread.
  std::span<const float> prefill(std::span<const int32_t> token_ids,
                                 const std::function<void(int64_t, int64_t)>& progress = {});
  std::span<const float> decode(int32_t token_id);
  // One decode step of several different sessions of one model: appends token_ids[i] to
  // sessions[i]; returns logits [sessions.size()][vocab]. All or none.
  static std::vector<float> decode_batch(std::span<Session* const> sessions,
                                         std::span<const int32_t> token_ids);
  // Logits after the last token; throws StateError for an empty session.
  std::span<const float> logits() const;

  // Appends the prompt (BOS only at position 0) and continues it. on_piece gets text as it becomes
  // certain; returning false stops. Every token returned is in the cache, but text that a stop text
  // cuts off is rewound.
  using PieceCallback = std::function<bool(std::string_view piece)>;
  GenerateResult generate(const Prompt& prompt, const SamplingParams& params = {},
                          const PieceCallback& on_piece = {}, const PromptOptions& options = {});
  // The same, a step at a time. The session is the generation's until that has ended, was stopped
  // or destroyed; then the tokens made are in the session.
  Generation start(const Prompt& prompt, const SamplingParams& params = {},
                   const PromptOptions& options = {});

  // Natural log-probabilities [n - 1] of token i + 1 given those up to i, on a fresh cache of this
  // session's configuration, where query i sees what decode would have compressed by then.
  std::vector<float> score(std::span<const int32_t> token_ids) const;
  // As score, handing the logits [vocab] of every position but the last to visit.
  void score_logits(
      std::span<const int32_t> token_ids,
      const std::function<void(int64_t position, std::span<const float> logits)>& visit) const;

  // These may be asked at any time; while a call runs they tell how things stood after the last
  // token.
  int64_t position() const;             // tokens in the cache
  std::vector<int32_t> tokens() const;  // those; a copy
  MemoryUsage memory() const;

  int64_t max_tokens() const;
  const Model& model() const;
  const KVConfig& kv_config() const;

  // Keeps the first `position` tokens. A compressed block that reaches beyond what would be
  // compressed at that length goes as a whole; its tokens that stay, at most window + 63, are made
  // again; all are, where the store has dropped blocks that a sliding window would see again.
  void rewind(int64_t position);
  Session fork() const;  // shares compressed pages, copies the tail
  void reset();
  // Frees the cache; later calls throw StateError. It does not wait: where a call runs it throws
  // StateError (cancel that call first). A generation between two steps ends.
  void close();

  // The whole session as a file, written aside and renamed. Throws Error naming path and reason.
  void save(const std::filesystem::path& file) const;
  // Throws StateError where the file is damaged or does not fit the model. profile: needed where
  // the session had a calibrated one; it must be the same.
  static Session load(const Model& model, const std::filesystem::path& file,
                      std::shared_ptr<const Profile> profile = nullptr);

  // Makes the call that runs, or the generation that is under way, throw Cancelled soon; one that
  // is about to end may end well. Where there is neither it does nothing: no later call hears of
  // it. Safe from any thread.
  void cancel();
  // Asked between the parts of a long call on the calling thread; throwing from it stops the call.
  // Both of these throw StateError while a call runs.
  void set_interrupt_check(std::function<void()> check);
  // Called while generate or start works on the prompt: tokens x layers done, in all.
  void set_prefill_progress(std::function<void(int64_t done, int64_t total)> progress);

  // For the library itself.
  struct Impl;
  explicit Session(std::shared_ptr<Impl> impl);
  Impl& impl() const { return *shared_impl(); }
  const std::shared_ptr<Impl>& shared_impl() const;  // throws StateError where moved from

 private:
  std::shared_ptr<Impl> impl_;
};

// A generation in progress: each step() makes one token. A step that throws, Cancelled among
// others, ends it; the tokens made before stay in the session.
class Generation {
 public:
  ~Generation();
  Generation(Generation&&) noexcept;
  Generation& operator=(Generation&&) noexcept;

  // False when it has ended. piece: text that became certain with this token, possibly empty.
  // Throws StateError where a step runs on another thread, or the session was closed.
  bool step(std::string& piece);
  // Ends it early, keeping the tokens made so far in the session. Safe from any thread: a step that
  // runs is the last.
  void stop();
  GenerateResult result() const;  // so far; may be asked from any thread

 private:
  friend class Session;
  friend class ChatReply;
  friend class Chat;
  struct Impl;
  explicit Generation(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace mustafar
