// What a Chat holds, for the library's own use.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/fork.h"
#include "mustafar/chat.h"
#include "runtime/chat_anchors.h"
#include "runtime/chat_messages.h"
#include "runtime/session_impl.h"

namespace mustafar {

// All but the messages is looked at and changed inside a call of the session's.
struct Chat::Impl {
  Session session;  // a handle of its own
  ChatTemplate chat_template;
  ChatOptions options;
  std::vector<ChatMessage> messages;
  // Held where messages change, and by those on other threads who look at them meanwhile.
  mutable ForkSafeMutex messages_mutex;
  std::vector<int32_t> end_tokens;
  ChatAnchors cached;
  std::atomic<int64_t> dropped_turns{0};
  // Where prompts are kept: a copy of the session as it was before the newest reply's first token.
  bool keeps_prompts = false;
  std::shared_ptr<Session::Impl> kept_prompt;

  Impl(Session s, ChatTemplate t, ChatOptions o)
      : session(std::move(s)), chat_template(std::move(t)), options(std::move(o)) {}
  // One that is not destroyed where its session is lost.
  static std::shared_ptr<Impl> make(Session session, ChatTemplate chat_template,
                                    ChatOptions options);

  // Makes the session what kept_prompt is; false where that is of another prompt, or has no room.
  bool take_kept_prompt(const std::vector<int32_t>& ids);
  // Where there is room for that beside a session that grows to so many tokens.
  void keep_prompt(int64_t most_tokens);

  // A call of the session's.
  struct Use : Session::Impl::Use {
    explicit Use(const Impl& chat) : Session::Impl::Use(chat.session.impl()) {}
  };

  const Tokenizer& tokenizer() const { return session.model().tokenizer(); }
  const std::vector<int32_t>& held() const { return session.impl().tokens; }
  std::vector<ChatMessage> copy_messages() const;  // from any thread
  // The messages become `changed`, which gets those before.
  void swap_messages(std::vector<ChatMessage>& changed) noexcept;
  enum class End : uint8_t {
    kMessages,  // behind the last message
    kPrompt,    // behind what starts the assistant's turn
    kInside,    // inside the last message
  };
  RenderedChat render(End end) const;
  std::vector<int32_t> encode(const RenderedChat& chat) const {
    return cached.encode(chat, held(), tokenizer());
  }

  // Takes other messages, with a cache shortened to what they begin with.
  void change_messages(std::vector<ChatMessage> changed);
  // Shortens the cache to what the messages as they stand begin with.
  void sync();
  // Throws std::invalid_argument where the last message is not a text of the assistant's.
  void check_last_continues() const;
  // Drops the oldest turn: from the first user message to the next one. False where only one is
  // left.
  bool drop_oldest_turn();
  // Starts a reply to `changed`, which become the messages, or goes on inside the last one; where
  // that fails the messages are as before.
  static ChatReply begin(const std::shared_ptr<Impl>& chat, const SamplingParams& params,
                         std::vector<ChatMessage> changed, End end = End::kPrompt);
};

}  // namespace mustafar
