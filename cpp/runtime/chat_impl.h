// What a Chat holds, for the library's own use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mustafar/chat.h"
#include "runtime/chat_anchors.h"
#include "runtime/chat_messages.h"

namespace mustafar {

struct Chat::Impl {
  Session* session = nullptr;
  ChatTemplate chat_template;
  ChatOptions options;
  std::vector<ChatMessage> messages;
  std::vector<int32_t> end_tokens;
  ChatAnchors cached;
  int64_t dropped_turns = 0;

  Impl(Session& s, ChatTemplate t, ChatOptions o)
      : session(&s), chat_template(std::move(t)), options(std::move(o)) {}

  const Tokenizer& tokenizer() const { return session->model().tokenizer(); }
  enum class End : uint8_t {
    kMessages,  // behind the last message
    kPrompt,    // behind what starts the assistant's turn
    kInside,    // inside the last message
  };
  RenderedChat render(End end) const;
  std::vector<int32_t> encode(const RenderedChat& chat) const {
    return cached.encode(chat, session->tokens(), tokenizer());
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
  // Starts a reply to the messages, or goes on inside the last one; where that fails they become
  // `before`.
  ChatReply begin(const SamplingParams& params, std::vector<ChatMessage> before,
                  End end = End::kPrompt);
};

}  // namespace mustafar
