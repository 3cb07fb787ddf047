#include "mustafar/chat.h"

#include <algorithm>
#include <ctime>
#include <stdexcept>
#include <utility>

#include "core/held.h"
#include "mustafar/error.h"
#include "runtime/chat_impl.h"
#include "runtime/generation_impl.h"

namespace mustafar {
namespace {

// Tokens by which published models end a turn, beside those of config.json.
constexpr const char* kEndTokens[] = {
    "<|eot_id|>",    "<|eom_id|>",    "<|im_end|>",      "<|end|>",
    "<|endoftext|>", "<end_of_turn>", "<|end_of_text|>", "<｜end▁of▁sentence｜>",
    "</s>"};

std::string now() {
  const std::time_t time = std::time(nullptr);
  std::tm tm{};
  localtime_r(&time, &tm);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &tm);
  return text;
}

}  // namespace

RenderedChat Chat::Impl::render(End end) const {
  ChatTemplateOptions o;
  o.add_generation_prompt = end == End::kPrompt;
  if (end == End::kInside) o.continue_final_message = "content";
  o.tools = options.tools;
  o.variables = options.variables;
  o.date = options.date;
  const std::string with_objects = ChatJson::template_text(messages);
  const std::string as_given = ChatJson::text(messages);
  try {
    return chat_template.render_marked(with_objects, o);
  } catch (const TemplateError&) {
    if (with_objects == as_given) throw;
  }
  return chat_template.render_marked(as_given, o);  // some templates join the arguments as text
}

std::vector<ChatMessage> Chat::Impl::copy_messages() const {
  const std::lock_guard lock(messages_mutex);
  return messages;
}

void Chat::Impl::swap_messages(std::vector<ChatMessage>& changed) noexcept {
  const std::lock_guard lock(messages_mutex);
  std::swap(messages, changed);
}

std::shared_ptr<Chat::Impl> Chat::Impl::make(Session session, ChatTemplate chat_template,
                                             ChatOptions options) {
  return {new Impl(std::move(session), std::move(chat_template), std::move(options)),
          [](Impl* impl) {
            if (!impl->session.impl().ownership.lost()) delete impl;
          }};
}

void Chat::Impl::change_messages(std::vector<ChatMessage> changed) {
  swap_messages(changed);
  try {
    sync();
  } catch (...) {
    swap_messages(changed);
    throw;
  }
}

void Chat::Impl::sync() {
  if (held().empty()) return;
  std::vector<int32_t> ids;
  try {
    ids = encode(render(End::kMessages));
  } catch (const TemplateError&) {
    // Some templates refuse a conversation that is empty or ends so; nothing of it is then kept.
  }
  const size_t keep = common_prefix(held(), ids);
  session.impl().rewind(static_cast<int64_t>(keep));
  cached.cut(keep);
}

void Chat::Impl::check_last_continues() const {
  if (messages.empty() || messages.back().role() != "assistant" ||
      !ChatJson::parse(messages.back())->at("content").is_string()) {
    throw std::invalid_argument(
        "continue_final_message: the last message is not a text of the assistant's");
  }
}

bool Chat::Impl::take_kept_prompt(const std::vector<int32_t>& ids) {
  if (kept_prompt == nullptr || kept_prompt->tokens != ids) return false;
  try {
    session.impl().take_contents(std::move(*kept_prompt->fork()));
    return true;
  } catch (const OutOfMemory&) {
    kept_prompt.reset();
    return false;
  }
}

void Chat::Impl::keep_prompt(int64_t most_tokens) {
  if (!keeps_prompts) return;
  kept_prompt.reset();
  const Session::Impl& own = session.impl();
  const int64_t n = std::min(most_tokens, own.max_tokens);
  if (own.engine->budget->available() < SequenceCache::bytes_for(*own.spec, 0, n)) return;
  try {
    kept_prompt = session.impl().fork();
  } catch (const OutOfMemory&) {  // another reply to this prompt computes it again
  }
}

bool Chat::Impl::drop_oldest_turn() {
  const auto is_user = [](const ChatMessage& m) { return m.role() == "user"; };
  const auto first = std::find_if(messages.begin(), messages.end(), is_user);
  if (first == messages.end()) return false;
  const auto next = std::find_if(first + 1, messages.end(), is_user);
  if (next == messages.end()) return false;
  const std::lock_guard lock(messages_mutex);
  messages.erase(first, next);
  dropped_turns++;
  return true;
}

struct ChatReply::Impl {
  std::shared_ptr<Chat::Impl> chat;
  RenderedChat prompt;
  size_t prompt_tokens = 0;   // position where the reply begins
  int64_t cached_tokens = 0;  // of those, that were there already
  std::unique_ptr<Generation::Impl> generation;
  bool continues = false;  // the last message, rather than being one of its own

  // The text of ids that come after others.
  std::string text_of(const std::vector<int32_t>& ids, const std::vector<int32_t>& before) const {
    Tokenizer::Stream stream(chat->tokenizer(), /*skip_special=*/true, before);
    std::string text;
    for (const int32_t id : ids) text += stream.push(id);
    return text + stream.flush();
  }

  // The last message with more text. A template that trims left its last spaces out of the prompt.
  void extend_last(const std::string& more) {
    ChatJson::Tree tree = ChatJson::parse(chat->messages.back());
    ChatJson::Json& content = (*tree)["content"];
    std::string text = content.get<std::string>();
    if (!prompt.text.ends_with(text)) text.erase(text.find_last_not_of(" \t\r\n") + 1);
    content = text + more;
    ChatMessage longer = ChatJson::message(*tree);
    const std::lock_guard lock(chat->messages_mutex);
    chat->messages.back() = std::move(longer);
  }

  // At the generation's end: adds the message and remembers how its text and the cache's tokens
  // belong together.
  void finish() {
    const GenerateResult result = generation->result();
    if (continues) {
      extend_last(result.text);
    } else {
      ChatMessage message("assistant", result.text);
      const std::lock_guard lock(chat->messages_mutex);
      chat->messages.push_back(std::move(message));
    }
    const std::vector<int32_t>& tokens = chat->held();
    if (tokens.size() < prompt_tokens) return;  // the session was closed meanwhile
    const bool ended =
        result.finish_reason == FinishReason::kStop && !result.token_ids.empty() &&
        std::count(chat->end_tokens.begin(), chat->end_tokens.end(), result.token_ids.back()) > 0;
    const size_t reply_end = tokens.size() - (ended ? 1 : 0);
    // Text that was held back when the reply was stopped is in the tokens, but not in the text.
    const std::vector<int32_t> said(tokens.begin() + static_cast<int64_t>(prompt_tokens),
                                    tokens.begin() + static_cast<int64_t>(reply_end));
    const std::vector<int32_t> before(tokens.begin(),
                                      tokens.begin() + static_cast<int64_t>(prompt_tokens));
    const bool spelled = text_of(said, continues ? before : std::vector<int32_t>()) == result.text;
    chat->cached.add_reply(prompt, result.text, static_cast<size_t>(cached_tokens),
                           spelled ? std::optional<size_t>(reply_end) : std::nullopt, tokens);
  }
};

ChatReply Chat::Impl::begin(const std::shared_ptr<Impl>& chat, const SamplingParams& params,
                            std::vector<ChatMessage> changed, End end) {
  Impl& self = *chat;
  const int64_t max_tokens = self.session.max_tokens();
  const int64_t dropped_before = self.dropped_turns;
  self.swap_messages(changed);
  try {
    SamplingParams own = params;
    if (!own.ignore_eos) {
      own.stop_token_ids.insert(own.stop_token_ids.end(), self.end_tokens.begin(),
                                self.end_tokens.end());
    }
    auto reply = std::make_unique<ChatReply::Impl>();
    reply->chat = chat;
    reply->continues = end == End::kInside;
    std::vector<int32_t> ids;
    while (true) {
      reply->prompt = self.render(end);
      ids = self.encode(reply->prompt);
      if (ids.empty()) throw TemplateError("the chat template made an empty prompt");
      // Room for a reply, or a quarter of the context where the reply may be long.
      const int64_t room = std::min<int64_t>(std::max(own.max_new_tokens, 1), max_tokens / 4 + 1);
      const int64_t needed =
          static_cast<int64_t>(ids.size()) + (self.options.context_shift ? room : 0);
      if (needed <= max_tokens) break;
      if (self.options.context_shift && self.drop_oldest_turn()) continue;
      if (static_cast<int64_t>(ids.size()) < max_tokens) break;
      throw ContextOverflow(
          "the conversation needs " + std::to_string(ids.size()) +
          " tokens, the context holds max_tokens = " + std::to_string(max_tokens));
    }
    const size_t keep = std::min(common_prefix(self.held(), ids), ids.size() - 1);
    reply->cached_tokens = static_cast<int64_t>(keep);
    reply->prompt_tokens = ids.size();
    const bool again = self.take_kept_prompt(ids);
    if (again) {
      ids.clear();
    } else {
      self.session.impl().rewind(static_cast<int64_t>(keep));
      ids.erase(ids.begin(), ids.begin() + static_cast<int64_t>(keep));
    }
    reply->generation = Generation::Impl::begin(self.session.shared_impl(), ids, own,
                                                PromptOptions{.own_text = !reply->continues});
    if (!again) {
      self.keep_prompt(static_cast<int64_t>(reply->prompt_tokens) + own.max_new_tokens);
    }
    reply->generation->at_end = [raw = reply.get()] { raw->finish(); };
    reply->generation->own_session();
    return ChatReply(std::move(reply));
  } catch (...) {
    self.swap_messages(changed);
    self.dropped_turns = dropped_before;
    throw;
  }
}

Chat::Chat(Session& session, ChatOptions options) {
  const Model& model = session.model();
  const Tokenizer& tokenizer = model.tokenizer();
  ChatTemplate chat_template =
      options.chat_template ? *options.chat_template : ChatTemplate::from_folder(model.folder());
  impl_ = Impl::make(Session(session.shared_impl()), std::move(chat_template), std::move(options));
  if (!impl_->options.date) impl_->options.date = now();
  std::vector<int32_t>& ends = impl_->end_tokens;
  ends = model.config().eos_token_ids;
  const auto add_end = [&](const std::string& token) {
    const auto id = token.empty() ? std::nullopt : tokenizer.token_to_id(token);
    if (id && tokenizer.is_special(*id) && std::count(ends.begin(), ends.end(), *id) == 0) {
      ends.push_back(*id);
    }
  };
  for (const char* token : kEndTokens) add_end(token);
  add_end(impl_->chat_template.eos_token());
  if (impl_->options.system) impl_->messages.emplace_back("system", *impl_->options.system);
}

Chat::Chat(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Chat::~Chat() = default;
Chat::Chat(Chat&&) noexcept = default;
Chat& Chat::operator=(Chat&&) noexcept = default;
Chat::Impl& Chat::impl() const { return held(impl_, "chat"); }

GenerateResult Chat::send(const std::string& text, const SamplingParams& params,
                          const Session::PieceCallback& on_piece) {
  ChatReply reply = start(text, params);
  std::string piece;
  while (reply.step(piece)) {
    if (on_piece && !piece.empty() && !on_piece(piece)) break;
  }
  reply.stop();
  return reply.result();
}

ChatReply Chat::start(const std::string& text, const SamplingParams& params) {
  const Impl::Use use(impl());
  std::vector<ChatMessage> messages = impl_->messages;
  messages.emplace_back("user", text);
  return Impl::begin(impl_, params, std::move(messages));
}

ChatReply Chat::reply(const SamplingParams& params) {
  const Impl::Use use(impl());
  return Impl::begin(impl_, params, impl_->messages);
}

ChatReply Chat::continue_last(const SamplingParams& params) {
  const Impl::Use use(impl());
  impl_->check_last_continues();
  return Impl::begin(impl_, params, impl_->messages, Impl::End::kInside);
}

ChatReply Chat::regenerate(const SamplingParams& params) {
  const Impl::Use use(impl());
  std::vector<ChatMessage> messages = impl_->messages;
  if (messages.empty() || messages.back().role() != "assistant") {
    throw std::invalid_argument("there is no reply to make again");
  }
  messages.pop_back();
  return Impl::begin(impl_, params, std::move(messages));
}

void Chat::keep_prompts() {
  const Impl::Use use(impl());
  impl_->keeps_prompts = true;
}

Chat Chat::fork(Session& forked) const {
  const Impl::Use use(impl());
  auto copy = Impl::make(Session(forked.shared_impl()), impl_->chat_template, impl_->options);
  copy->messages = impl_->messages;
  copy->end_tokens = impl_->end_tokens;
  copy->cached = impl_->cached;
  copy->dropped_turns = impl_->dropped_turns.load();
  return Chat(std::move(copy));
}

void Chat::cancel() { impl().session.cancel(); }

std::optional<std::string> Chat::undo() {
  const Impl::Use use(impl());
  const std::vector<ChatMessage>& messages = impl_->messages;
  const auto last = std::find_if(messages.rbegin(), messages.rend(),
                                 [](const ChatMessage& m) { return m.role() == "user"; });
  if (last == messages.rend()) return std::nullopt;
  std::string text = last->content();
  impl_->change_messages({messages.begin(), last.base() - 1});
  return text;
}

void Chat::clear() {
  const Impl::Use use(impl());
  std::vector<ChatMessage> kept;
  for (const ChatMessage& message : impl_->messages) {
    if (message.role() == "system") kept.push_back(message);
  }
  impl_->change_messages(std::move(kept));
}

void Chat::add(ChatMessage message) {
  const Impl::Use use(impl());
  const std::lock_guard lock(impl_->messages_mutex);
  impl_->messages.push_back(std::move(message));
}

void Chat::set_messages(std::vector<ChatMessage> messages) {
  const Impl::Use use(impl());
  impl_->change_messages(std::move(messages));
}

void Chat::set_system(std::optional<std::string> text) {
  const Impl::Use use(impl());
  std::vector<ChatMessage> messages = impl_->messages;
  if (!messages.empty() && messages[0].role() == "system") messages.erase(messages.begin());
  if (text) messages.emplace(messages.begin(), "system", *text);
  impl_->change_messages(std::move(messages));
}

std::vector<ChatMessage> Chat::messages() const { return impl().copy_messages(); }
std::string Chat::messages_json() const { return ChatJson::text(messages()); }
void Chat::set_messages_json(std::string_view json) {
  const auto list = try_parse_json_tree<ChatJson::Json>(json);
  if (!list) throw std::invalid_argument("messages: not JSON");
  set_messages(ChatJson::messages(**list));
}
std::vector<int32_t> Chat::prompt_tokens(bool continues_last) const {
  const Impl::Use use(impl());
  if (continues_last) impl_->check_last_continues();
  return impl_->encode(impl_->render(continues_last ? Impl::End::kInside : Impl::End::kPrompt));
}
int64_t Chat::dropped_turns() const { return impl().dropped_turns; }
const std::vector<int32_t>& Chat::end_tokens() const { return impl().end_tokens; }
const ChatTemplate& Chat::chat_template() const { return impl().chat_template; }
Session& Chat::session() const { return impl().session; }

ChatReply::ChatReply(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ChatReply::~ChatReply() { drop(); }
ChatReply::ChatReply(ChatReply&&) noexcept = default;
ChatReply& ChatReply::operator=(ChatReply&& other) noexcept {
  if (this != &other) {
    drop();
    impl_ = std::move(other.impl_);
  }
  return *this;
}

void ChatReply::drop() noexcept {
  if (!impl_) return;
  try {
    if (impl_->generation->session->ownership.lost()) {
      static_cast<void>(impl_.release());  // another thread was changing it
      return;
    }
    impl_->generation->stop();
  } catch (...) {  // a destructor has no one to tell
  }
}

bool ChatReply::step(std::string& piece) { return held(impl_, "reply").generation->step(piece); }
void ChatReply::stop() { held(impl_, "reply").generation->stop(); }
GenerateResult ChatReply::result() const { return held(impl_, "reply").generation->result(); }
int64_t ChatReply::cached_tokens() const { return held(impl_, "reply").cached_tokens; }

}  // namespace mustafar
