// Conversations: messages, the prompt that a chat template makes of them, and a session that keeps
// what was already computed.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "mustafar/chat_template.h"
#include "mustafar/sampling.h"
#include "mustafar/session.h"

namespace mustafar {

// A JSON object with a role, a content and whatever else a template may look at (tool_calls,
// tool_call_id, ...).
class ChatMessage {
 public:
  // role: "system", "user", "assistant", "tool", ...
  ChatMessage(std::string role, std::string_view content);
  // Throws std::invalid_argument for what is no object with a role.
  static ChatMessage from_json(std::string_view object);

  const std::string& role() const { return role_; }
  std::string content() const;                       // its text; empty where it is not a text
  const std::string& json() const { return json_; }  // the object, on one line

 private:
  friend struct ChatJson;
  ChatMessage() = default;
  std::string role_, json_;
};

struct ChatOptions {
  std::optional<ChatTemplate> chat_template = {};  // none: the model folder's
  std::optional<std::string> system = {};          // first message
  std::string tools = {};                          // JSON array of tool definitions; empty: none
  std::string variables = {};            // JSON object of further template variables; or empty
  std::optional<std::string> date = {};  // as ChatTemplateOptions; none: when the chat started
  // A prompt that exceeds the context drops whole oldest turns instead of failing.
  bool context_shift = false;
};

class ChatReply;

// A call that throws before a reply has begun leaves the messages as they were; of a reply that
// breaks off, what was said stays. The cache holds a beginning of the conversation's tokens at all
// times, and what it holds is not computed again.
//
// A call uses the chat's session, and a reply in progress owns it: another call gets StateError.
// messages, messages_json and cancel may be called at any time.
class Chat {
 public:
  // The chat holds on to the session's contents, wherever the handle is moved. Throws TemplateError
  // for a model without a template, TokenizerError for one without a tokenizer.
  explicit Chat(Session& session, ChatOptions options = {});
  ~Chat();
  Chat(Chat&&) noexcept;
  Chat& operator=(Chat&&) noexcept;

  // Adds a user message and the reply to it. on_piece: as Session::generate; returning false ends
  // the reply, and what was said stays.
  GenerateResult send(const std::string& text, const SamplingParams& params = {},
                      const Session::PieceCallback& on_piece = {});
  // The same, a step at a time.
  ChatReply start(const std::string& text, const SamplingParams& params = {});
  // Replies to the messages as they stand (after add() of a tool's result, say).
  ChatReply reply(const SamplingParams& params = {});
  // Continues the last message, which the assistant began: what is made becomes a part of it, and
  // the result holds that alone. Throws std::invalid_argument where the last message is not a text
  // of the assistant's.
  ChatReply continue_last(const SamplingParams& params = {});
  // Drops the last reply and starts another. Throws std::invalid_argument where there is none.
  ChatReply regenerate(const SamplingParams& params = {});

  // From now on, another reply to the prompt of the one before begins with the same state, bit for
  // bit, where otherwise a part of the prompt is computed again over what the cache keeps of the
  // rest. A copy of that state, as Session::fork makes it, is held until there is another prompt;
  // where the budget has no room for it, it is not.
  void keep_prompts();

  // The same conversation in a session's fork; the two then go their ways.
  Chat fork(Session& forked) const;
  // As Session::cancel: makes the call that runs, or the reply in progress, throw Cancelled soon,
  // and is nothing to any other. Safe from any thread.
  void cancel();

  // Drops the last user message and all that follows; returns its text, or none.
  std::optional<std::string> undo();
  void clear();  // all messages but the system message
  void add(ChatMessage message);
  void set_messages(std::vector<ChatMessage> messages);
  // Sets or, with none, removes the system message; the conversation is computed anew.
  void set_system(std::optional<std::string> text);
  std::vector<ChatMessage> messages() const;  // a copy
  std::string messages_json() const;
  void set_messages_json(std::string_view json);  // throws std::invalid_argument

  // The conversation as JSON in `file`, the cache beside it in `file`.cache. A cache that is
  // missing, damaged, or of another model or configuration is not used: the next turn computes it.
  void save(const std::filesystem::path& file) const;
  // Throws Error for a file that can't be read. Returns whether the cache could be used.
  bool load(const std::filesystem::path& file);

  // Token ids of the next prompt: the messages and what starts a reply, or that of continue_last(),
  // which throws where that would.
  std::vector<int32_t> prompt_tokens(bool continues_last = false) const;
  int64_t dropped_turns() const;                   // by context_shift, in all
  const std::vector<int32_t>& end_tokens() const;  // every id that ends a reply
  const ChatTemplate& chat_template() const;
  Session& session() const;  // a handle of its own

  struct Impl;

 private:
  friend class ChatReply;
  explicit Chat(std::shared_ptr<Impl> impl);
  Impl& impl() const;
  std::shared_ptr<Impl> impl_;
};

// A reply in progress: as Generation. A reply that was destroyed before its end, or whose step
// threw, leaves in the conversation what was said.
class ChatReply {
 public:
  ~ChatReply();
  ChatReply(ChatReply&&) noexcept;
  ChatReply& operator=(ChatReply&&) noexcept;

  bool step(std::string& piece);  // as Generation::step
  void stop();                    // ends it; what was said stays
  GenerateResult result() const;
  int64_t cached_tokens() const;  // of the prompt, that were there already

 private:
  friend class Chat;
  struct Impl;
  explicit ChatReply(std::unique_ptr<Impl> impl);
  void drop() noexcept;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mustafar
