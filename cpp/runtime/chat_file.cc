// A conversation on disk: messages, date and anchors as JSON, the session's state beside it.
#include <optional>
#include <stdexcept>
#include <utility>

#include "core/atomic_file.h"
#include "core/hash.h"
#include "core/json_tree.h"
#include "core/read_file.h"
#include "mustafar/error.h"
#include "runtime/chat_impl.h"
#include "runtime/kv_fields.h"

namespace mustafar {
namespace {

using Json = ChatJson::Json;

constexpr const char* kFormat = "mustafar chat 1";
constexpr size_t kMaxChatFileBytes = size_t{256} << 20;

// Not by nlohmann's operator: that makes a value of the text, and does not let its failing through.
bool is_text(const Json& json, std::string_view text) {
  return json.is_string() && json.get_ref<const std::string&>() == text;
}

std::string hash_of(std::span<const int32_t> tokens) {
  Hash64 hash;
  hash.add(tokens.data(), tokens.size_bytes());
  return hash.hex();
}

std::string pair(size_t first, size_t second) {
  return "[" + std::to_string(first) + "," + std::to_string(second) + "]";
}

// Throws Error where there is no such number.
size_t size_at(const Json& list, size_t index) {
  const std::optional<int64_t> number = whole_number(list.at(index));
  if (!number || *number < 0) throw Error("not a size");
  return static_cast<size_t>(*number);
}

}  // namespace

void Chat::save(const std::filesystem::path& file) const {
  const Impl::Use use(impl());
  const std::vector<int32_t>& tokens = impl_->held();
  JsonListText anchors, outside;
  for (const auto& anchor : impl_->cached.anchors) {
    if (anchor.tokens <= tokens.size()) anchors.add_text(pair(anchor.bytes, anchor.tokens));
  }
  for (const TextRange& range : impl_->cached.outside) {
    outside.add_text(pair(range.begin, range.end));
  }
  JsonObjectText saved, chat;
  saved.add("tokens", tokens.size());
  saved.add("hash", hash_of(tokens));
  saved.add("text", impl_->cached.text);
  saved.add_text("outside", outside.take());
  saved.add_text("anchors", anchors.take());
  chat.add("format", kFormat);
  chat.add_text("messages", ChatJson::text(impl_->messages));
  chat.add("date", *impl_->options.date);
  chat.add_text("cache", saved.take());
  const std::string text = chat.take() + "\n";
  const std::filesystem::path cache = file.string() + ".cache";
  impl_->session.impl().save(cache);
  AtomicFile out(file);
  out.write(text.data(), text.size());
  out.commit();
}

bool Chat::load(const std::filesystem::path& file) {
  const Impl::Use use(impl());
  std::error_code error;
  if (!std::filesystem::exists(file, error)) {
    throw Missing<Error>(file.string() + ": no such file");
  }
  if (!std::filesystem::is_regular_file(file, error)) {
    throw Error(file.string() + ": not a regular file");
  }
  const uintmax_t bytes = std::filesystem::file_size(file, error);
  if (error || bytes > kMaxChatFileBytes) {
    throw Error(file.string() + ": too large for a saved chat");
  }
  const std::optional<std::string> content = read_file(file, bytes);
  if (!content) throw Error(file.string() + ": cannot be read");
  const auto tree = try_parse_json_tree<Json>(*content);
  if (!tree) throw Error(file.string() + ": not a saved chat");
  const Json& json = **tree;
  if (!json.is_object() || !json.contains("format") || !is_text(json["format"], kFormat) ||
      !json.contains("messages") || !json.contains("date") || !json["date"].is_string()) {
    throw Error(file.string() + ": not a saved chat");
  }
  std::vector<ChatMessage> messages;
  try {
    messages = ChatJson::messages(json["messages"]);
  } catch (const std::invalid_argument& e) {
    throw Error(file.string() + ": " + e.what());
  }

  // The cache is a help only: whatever is wrong with it, the conversation itself is loaded.
  ChatAnchors cached;
  bool usable = false;
  try {
    const Json& saved = json.at("cache");
    Session session = Session::load(impl_->session.model(), file.string() + ".cache",
                                    impl_->session.kv_config().profile);
    cached.text = saved.at("text").get<std::string>();
    cached.tokens = session.tokens();
    if (is_text(saved.at("hash"), hash_of(cached.tokens)) &&
        same_kv_fields(session.kv_config(), impl_->session.kv_config()) &&
        session.max_tokens() == impl_->session.max_tokens()) {
      for (const Json& range : saved.at("outside")) {
        cached.outside.push_back({size_at(range, 0), size_at(range, 1)});
      }
      for (const Json& anchor : saved.at("anchors")) {
        cached.anchors.push_back({size_at(anchor, 0), size_at(anchor, 1)});
        if (cached.anchors.back().bytes > cached.text.size() ||
            cached.anchors.back().tokens > cached.tokens.size()) {
          throw Error("anchor out of range");
        }
      }
      impl_->session.impl().take_contents(std::move(session.impl()));
      usable = true;
    }
  } catch (const OutOfMemory&) {
    throw;
  } catch (const Error&) {
  } catch (const nlohmann::json::exception&) {
  } catch (const std::invalid_argument&) {
  }
  impl_->swap_messages(messages);
  impl_->options.date = json["date"].get<std::string>();
  impl_->cached = usable ? std::move(cached) : ChatAnchors{};
  impl_->sync();
  return usable;
}

}  // namespace mustafar
