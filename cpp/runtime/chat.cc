#include "mustafar/chat.h"

#include <algorithm>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "core/atomic_file.h"
#include "core/hash.h"
#include "mustafar/error.h"
#include "runtime/kv_fields.h"

namespace mustafar {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kMaxChatFileBytes = size_t{256} << 20;

// Tokens by which published models end a turn, beside those of config.json.
constexpr const char* kEndTokens[] = {
    "<|eot_id|>",    "<|eom_id|>",    "<|im_end|>",      "<|end|>",
    "<|endoftext|>", "<end_of_turn>", "<|end_of_text|>", "<｜end▁of▁sentence｜>",
    "</s>"};

Json parse(std::string_view text, const char* what) {
  Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded()) throw std::invalid_argument(std::string(what) + ": not JSON");
  return json;
}

// Not by nlohmann's operator: that makes a value of the text, and does not let its failing through.
bool is_text(const Json& json, std::string_view text) {
  return json.is_string() && json.get_ref<const std::string&>() == text;
}

Json to_json(const ChatMessage& message) {
  Json json = Json::object();
  json["role"] = message.role;
  json["content"] = message.content;
  if (!message.fields.empty()) {
    const Json fields = parse(message.fields, "message fields");
    if (!fields.is_object()) throw std::invalid_argument("message fields: expected an object");
    for (const auto& [key, value] : fields.items()) json[key] = value;
  }
  return json;
}

ChatMessage from_json(const Json& json) {
  if (!json.is_object()) throw std::invalid_argument("messages: expected objects");
  ChatMessage message;
  Json fields = Json::object();
  for (const auto& [key, value] : json.items()) {
    if (key == "role" && value.is_string()) {
      message.role = value.get<std::string>();
    } else if (key == "content" && value.is_string()) {
      message.content = value.get<std::string>();
    } else {
      fields[key] = value;
    }
  }
  if (!json.contains("role") || !json["role"].is_string()) {
    throw std::invalid_argument("messages: a message without a role");
  }
  if (!json.contains("content")) fields["content"] = nullptr;
  if (!fields.empty()) message.fields = fields.dump();
  return message;
}

std::vector<ChatMessage> messages_from(const Json& json) {
  if (!json.is_array()) throw std::invalid_argument("messages: expected a list");
  std::vector<ChatMessage> messages;
  for (const Json& each : json) messages.push_back(from_json(each));
  return messages;
}

std::string now() {
  const std::time_t time = std::time(nullptr);
  std::tm tm{};
  localtime_r(&time, &tm);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &tm);
  return text;
}

std::string hash_of(std::span<const int32_t> tokens) {
  Hash64 hash;
  hash.add(tokens.data(), tokens.size_bytes());
  return hash.hex();
}

size_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  return static_cast<size_t>(
      std::mismatch(a.begin(), a.begin() + std::min(a.size(), b.size()), b.begin()).first -
      a.begin());
}

Json pair(size_t first, size_t second) {
  Json json = Json::array();
  json.push_back(first);
  json.push_back(second);
  return json;
}

// With U+FFFD for what is not UTF-8.
std::string dump(const Json& json, int indent) {
  return json.dump(indent, ' ', false, Json::error_handler_t::replace);
}

// Whether both have the same marks on the first `bytes`.
bool same_ranges(std::span<const TextRange> a, std::span<const TextRange> b, size_t bytes) {
  for (size_t i = 0;; i++) {
    const bool in_a = i < a.size() && a[i].begin < bytes, in_b = i < b.size() && b[i].begin < bytes;
    if (!in_a || !in_b) return in_a == in_b;
    if (a[i].begin != b[i].begin || std::min(a[i].end, bytes) != std::min(b[i].end, bytes)) {
      return false;
    }
  }
}

// The ranges behind `begin`, relative to it.
std::vector<TextRange> ranges_from(std::span<const TextRange> ranges, size_t begin) {
  std::vector<TextRange> out;
  for (const TextRange& range : ranges) {
    if (range.end > begin) out.push_back({std::max(range.begin, begin) - begin, range.end - begin});
  }
  return out;
}

}  // namespace

struct Chat::Impl {
  // The first `tokens` of the cache spell the first `bytes` of `text`.
  struct Anchor {
    size_t bytes = 0, tokens = 0;
  };
  // What the cache holds as text, kept so that a reply's own tokens are used again even where the
  // tokenizer would have split its text another way.
  struct Cached {
    std::string text;
    std::vector<TextRange> outside;
    std::vector<Anchor> anchors;
    std::vector<int32_t> tokens;
  };

  Session* session = nullptr;
  ChatTemplate chat_template;
  ChatOptions options;
  std::vector<ChatMessage> messages;
  std::vector<int32_t> end_tokens;
  Cached cached;
  int64_t dropped_turns = 0;

  Impl(Session& s, ChatTemplate t, ChatOptions o)
      : session(&s), chat_template(std::move(t)), options(std::move(o)) {}

  const Tokenizer& tokenizer() const { return session->model().tokenizer(); }

  std::string messages_json() const {
    Json json = Json::array();
    for (const ChatMessage& message : messages) json.push_back(to_json(message));
    return dump(json, -1);
  }

  RenderedChat render(bool with_prompt) const {
    ChatTemplateOptions o;
    o.add_generation_prompt = with_prompt;
    o.tools = options.tools;
    o.variables = options.variables;
    o.date = options.date;
    return chat_template.render_marked(messages_json(), o);
  }

  // Ids of a rendered conversation. A reply's own tokens are used again where its text and all
  // before it are unchanged and a token of the template follows, whatever the tokenizer would make
  // of the text now.
  std::vector<int32_t> encode(const RenderedChat& chat) const {
    const std::vector<int32_t>& held = session->tokens();
    for (auto anchor = cached.anchors.rbegin(); anchor != cached.anchors.rend(); ++anchor) {
      const auto n_tokens = static_cast<int64_t>(anchor->tokens);
      if (anchor->bytes > chat.text.size() || anchor->tokens > held.size() ||
          chat.text.compare(0, anchor->bytes, cached.text, 0, anchor->bytes) != 0 ||
          !same_ranges(chat.outside, cached.outside, anchor->bytes) ||
          !std::equal(held.begin(), held.begin() + n_tokens, cached.tokens.begin())) {
        continue;
      }
      std::vector<int32_t> ids(held.begin(), held.begin() + n_tokens);
      const std::vector<int32_t> rest =
          tokenizer().encode_chat(std::string_view(chat.text).substr(anchor->bytes),
                                  ranges_from(chat.outside, anchor->bytes));
      if (!rest.empty() && !tokenizer().is_special(rest.front())) continue;
      ids.insert(ids.end(), rest.begin(), rest.end());
      return ids;
    }
    return tokenizer().encode_chat(chat.text, chat.outside);
  }

  // Takes other messages, with a cache shortened to what they begin with.
  void change_messages(std::vector<ChatMessage> changed) {
    std::swap(messages, changed);
    try {
      sync();
    } catch (...) {
      messages = std::move(changed);
      throw;
    }
  }

  // Shortens the cache to what the messages as they stand begin with.
  void sync() {
    if (session->position() == 0) return;
    std::vector<int32_t> ids;
    try {
      ids = encode(render(false));
    } catch (const TemplateError&) {
      // Some templates refuse a conversation that is empty or ends so; nothing of it is then kept.
    }
    const size_t keep = common_prefix(session->tokens(), ids);
    session->rewind(static_cast<int64_t>(keep));
    while (!cached.anchors.empty() && cached.anchors.back().tokens > keep)
      cached.anchors.pop_back();
  }

  // Drops the oldest turn: from the first user message to the next one. False where only one is
  // left.
  bool drop_oldest_turn() {
    const auto is_user = [](const ChatMessage& m) { return m.role == "user"; };
    const auto first = std::find_if(messages.begin(), messages.end(), is_user);
    if (first == messages.end()) return false;
    const auto next = std::find_if(first + 1, messages.end(), is_user);
    if (next == messages.end()) return false;
    messages.erase(first, next);
    dropped_turns++;
    return true;
  }

  ChatReply begin(const SamplingParams& params, std::vector<ChatMessage> before);
};

struct ChatReply::Impl {
  Chat::Impl* chat;
  RenderedChat prompt;
  int64_t cached_tokens = 0;
  std::optional<Generation> generation;
  bool finished = false;

  // Adds the message and remembers how its text and the cache's tokens belong together.
  void finish() {
    if (finished) return;
    finished = true;
    const GenerateResult& result = generation->result();
    chat->messages.push_back({"assistant", result.text, ""});
    const std::vector<int32_t>& tokens = chat->session->tokens();
    Chat::Impl::Cached& cached = chat->cached;
    std::vector<Chat::Impl::Anchor> anchors;
    for (const auto& anchor : cached.anchors) {
      if (anchor.bytes <= prompt.text.size() &&
          static_cast<int64_t>(anchor.tokens) <= cached_tokens) {
        anchors.push_back(anchor);
      }
    }
    cached.text = prompt.text + result.text;
    cached.outside = prompt.outside;
    if (!result.text.empty()) cached.outside.push_back({prompt.text.size(), cached.text.size()});
    cached.anchors = std::move(anchors);
    const bool ended =
        result.finish_reason == FinishReason::kStop && !result.token_ids.empty() &&
        std::count(chat->end_tokens.begin(), chat->end_tokens.end(), result.token_ids.back()) > 0;
    const size_t reply_end = tokens.size() - (ended ? 1 : 0);
    // Text that was held back when the reply was stopped is in the tokens, but not in the text.
    const std::vector<int32_t> said(tokens.begin() + static_cast<int64_t>(prompt_tokens),
                                    tokens.begin() + static_cast<int64_t>(reply_end));
    if (chat->tokenizer().decode(said, true) == result.text) {
      cached.anchors.push_back({cached.text.size(), reply_end});
    }
    cached.tokens = tokens;
  }

  size_t prompt_tokens = 0;  // position where the reply begins
};

ChatReply Chat::Impl::begin(const SamplingParams& params, std::vector<ChatMessage> before) {
  const int64_t dropped_before = dropped_turns;
  try {
    SamplingParams own = params;
    if (!own.ignore_eos) {
      own.stop_token_ids.insert(own.stop_token_ids.end(), end_tokens.begin(), end_tokens.end());
    }
    auto reply = std::make_unique<ChatReply::Impl>();
    reply->chat = this;
    std::vector<int32_t> ids;
    while (true) {
      reply->prompt = render(true);
      ids = encode(reply->prompt);
      if (ids.empty()) throw TemplateError("the chat template made an empty prompt");
      // Room for a reply, or a quarter of the context where the reply may be long.
      const int64_t room =
          std::min<int64_t>(std::max(own.max_new_tokens, 1), session->max_tokens() / 4 + 1);
      const int64_t needed = static_cast<int64_t>(ids.size()) + (options.context_shift ? room : 0);
      if (needed <= session->max_tokens()) break;
      if (options.context_shift && drop_oldest_turn()) continue;
      if (static_cast<int64_t>(ids.size()) < session->max_tokens()) break;
      throw ContextOverflow(
          "the conversation needs " + std::to_string(ids.size()) +
          " tokens, the context holds max_tokens = " + std::to_string(session->max_tokens()));
    }
    const size_t keep = std::min(common_prefix(session->tokens(), ids), ids.size() - 1);
    session->rewind(static_cast<int64_t>(keep));
    reply->cached_tokens = static_cast<int64_t>(keep);
    reply->prompt_tokens = ids.size();
    reply->generation.emplace(session->start(
        std::vector<int32_t>(ids.begin() + static_cast<int64_t>(keep), ids.end()), own));
    return ChatReply(std::move(reply));
  } catch (...) {
    messages = std::move(before);
    dropped_turns = dropped_before;
    throw;
  }
}

Chat::Chat(Session& session, ChatOptions options) {
  const Model& model = session.model();
  const Tokenizer& tokenizer = model.tokenizer();
  ChatTemplate chat_template =
      options.chat_template ? *options.chat_template : ChatTemplate::from_folder(model.folder());
  impl_ = std::make_unique<Impl>(session, std::move(chat_template), std::move(options));
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
  if (impl_->options.system) impl_->messages.push_back({"system", *impl_->options.system, ""});
}

Chat::~Chat() = default;
Chat::Chat(Chat&&) noexcept = default;
Chat& Chat::operator=(Chat&&) noexcept = default;

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
  std::vector<ChatMessage> before = impl_->messages;
  impl_->messages.push_back({"user", text, ""});
  return impl_->begin(params, std::move(before));
}

ChatReply Chat::reply(const SamplingParams& params) {
  return impl_->begin(params, impl_->messages);
}

ChatReply Chat::regenerate(const SamplingParams& params) {
  std::vector<ChatMessage> before = impl_->messages;
  if (before.empty() || before.back().role != "assistant") {
    throw std::invalid_argument("there is no reply to make again");
  }
  impl_->messages.pop_back();
  return impl_->begin(params, std::move(before));
}

std::optional<std::string> Chat::undo() {
  const std::vector<ChatMessage>& messages = impl_->messages;
  const auto last = std::find_if(messages.rbegin(), messages.rend(),
                                 [](const ChatMessage& m) { return m.role == "user"; });
  if (last == messages.rend()) return std::nullopt;
  const std::string text = last->content;
  impl_->change_messages({messages.begin(), last.base() - 1});
  return text;
}

void Chat::clear() {
  std::vector<ChatMessage> kept;
  for (const ChatMessage& message : impl_->messages) {
    if (message.role == "system") kept.push_back(message);
  }
  impl_->change_messages(std::move(kept));
}

void Chat::add(ChatMessage message) {
  to_json(message);  // throws for bad fields
  impl_->messages.push_back(std::move(message));
}

void Chat::set_messages(std::vector<ChatMessage> messages) {
  for (const ChatMessage& message : messages) to_json(message);  // throws for bad fields
  impl_->change_messages(std::move(messages));
}

void Chat::set_system(std::optional<std::string> text) {
  std::vector<ChatMessage> messages = impl_->messages;
  if (!messages.empty() && messages[0].role == "system") messages.erase(messages.begin());
  if (text) messages.insert(messages.begin(), {"system", *text, ""});
  impl_->change_messages(std::move(messages));
}

const std::vector<ChatMessage>& Chat::messages() const { return impl_->messages; }
std::string Chat::messages_json() const { return impl_->messages_json(); }
void Chat::set_messages_json(std::string_view json) {
  set_messages(messages_from(parse(json, "messages")));
}
std::vector<int32_t> Chat::prompt_tokens() const { return impl_->encode(impl_->render(true)); }
int64_t Chat::dropped_turns() const { return impl_->dropped_turns; }
const std::vector<int32_t>& Chat::end_tokens() const { return impl_->end_tokens; }
const ChatTemplate& Chat::chat_template() const { return impl_->chat_template; }
Session& Chat::session() const { return *impl_->session; }

void Chat::save(const std::filesystem::path& file) const {
  const std::vector<int32_t>& tokens = impl_->session->tokens();
  Json anchors = Json::array();
  for (const auto& anchor : impl_->cached.anchors) {
    if (anchor.tokens <= tokens.size()) anchors.push_back(pair(anchor.bytes, anchor.tokens));
  }
  Json outside = Json::array();
  for (const TextRange& range : impl_->cached.outside) {
    outside.push_back(pair(range.begin, range.end));
  }
  // Field by field: lists in braces leak where memory runs out half-way through them.
  Json saved = Json::object();
  saved["tokens"] = tokens.size();
  saved["hash"] = hash_of(tokens);
  saved["text"] = impl_->cached.text;
  saved["outside"] = std::move(outside);
  saved["anchors"] = std::move(anchors);
  Json json = Json::object();
  json["format"] = "mustafar chat 1";
  json["messages"] = Json::parse(impl_->messages_json());
  json["date"] = *impl_->options.date;
  json["cache"] = std::move(saved);
  const std::filesystem::path cache = file.string() + ".cache";
  impl_->session->save(cache);
  const std::string text = dump(json, 1) + "\n";
  AtomicFile out(file);
  out.write(text.data(), text.size());
  out.commit();
}

bool Chat::load(const std::filesystem::path& file) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(file, error)) throw Error(file.string() + ": no such file");
  if (std::filesystem::file_size(file, error) > kMaxChatFileBytes || error) {
    throw Error(file.string() + ": too large for a saved chat");
  }
  std::ifstream in(file, std::ios::binary);
  std::ostringstream content;
  content << in.rdbuf();
  const Json json = Json::parse(content.str(), nullptr, false);
  if (!in || !json.is_object() || !json.contains("format") ||
      !is_text(json["format"], "mustafar chat 1") || !json.contains("messages") ||
      !json.contains("date") || !json["date"].is_string()) {
    throw Error(file.string() + ": not a saved chat");
  }
  std::vector<ChatMessage> messages;
  try {
    messages = messages_from(json["messages"]);
  } catch (const std::invalid_argument& e) {
    throw Error(file.string() + ": " + e.what());
  }

  // The cache is a help only: whatever is wrong with it, the conversation itself is loaded.
  Impl::Cached cached;
  bool usable = false;
  try {
    const Json& saved = json.at("cache");
    Session session = Session::load(impl_->session->model(), file.string() + ".cache",
                                    impl_->session->kv_config().profile);
    cached.text = saved.at("text").get<std::string>();
    cached.tokens = session.tokens();
    if (is_text(saved.at("hash"), hash_of(session.tokens())) &&
        same_kv_fields(session.kv_config(), impl_->session->kv_config()) &&
        session.max_tokens() == impl_->session->max_tokens()) {
      for (const Json& range : saved.at("outside")) {
        cached.outside.push_back({range.at(0).get<size_t>(), range.at(1).get<size_t>()});
      }
      for (const Json& anchor : saved.at("anchors")) {
        cached.anchors.push_back({anchor.at(0).get<size_t>(), anchor.at(1).get<size_t>()});
        if (cached.anchors.back().bytes > cached.text.size() ||
            cached.anchors.back().tokens > cached.tokens.size()) {
          throw Error("anchor out of range");
        }
      }
      *impl_->session = std::move(session);
      usable = true;
    }
  } catch (const OutOfMemory&) {
    throw;
  } catch (const Error&) {
  } catch (const nlohmann::json::exception&) {
  } catch (const std::invalid_argument&) {
  }
  impl_->messages = std::move(messages);
  impl_->options.date = json["date"].get<std::string>();
  impl_->cached = usable ? std::move(cached) : Impl::Cached{};
  impl_->sync();
  return usable;
}

ChatReply::ChatReply(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ChatReply::~ChatReply() {
  if (!impl_) return;
  try {
    stop();
  } catch (...) {  // a destructor has no one to tell
  }
}
ChatReply::ChatReply(ChatReply&&) noexcept = default;
ChatReply& ChatReply::operator=(ChatReply&&) noexcept = default;

bool ChatReply::step(std::string& piece) {
  if (impl_->finished) return false;
  if (impl_->generation->step(piece)) return true;
  impl_->finish();
  return false;
}

void ChatReply::stop() {
  impl_->generation->stop();
  impl_->finish();
}

const GenerateResult& ChatReply::result() const { return impl_->generation->result(); }
int64_t ChatReply::cached_tokens() const { return impl_->cached_tokens; }

}  // namespace mustafar
