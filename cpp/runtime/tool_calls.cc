#include "mustafar/tool_calls.h"

#include <algorithm>
#include <array>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <stdexcept>
#include <utility>

#include "core/held.h"
#include "core/json_tree.h"
#include "text/python_calls.h"

namespace mustafar {
namespace {

using Calls = std::vector<ToolCall>;

// What may stand before a call.
constexpr std::string_view kHermes = "<tool_call>", kMistral = "[TOOL_CALLS]",
                           kLlama = "<|python_tag|>";
constexpr std::array kMarks = {kHermes, kMistral, kLlama};
// Within one and behind it.
constexpr std::string_view kHermesEnd = "</tool_call>", kMistralId = "[CALL_ID]",
                           kMistralArguments = "[ARGS]";
// First keys of a call that stands alone.
constexpr std::array<std::string_view, 5> kFirstKeys = {"name", "type", "function", "parameters",
                                                        "arguments"};
constexpr std::string_view kSpace = " \t\n\r\f\v";

std::string_view strip_end(std::string_view text) {
  return text.substr(0, text.find_last_not_of(kSpace) + 1);
}
std::string_view strip_front(std::string_view text) {
  return text.substr(std::min(text.find_first_not_of(kSpace), text.size()));
}
std::string_view strip(std::string_view text) { return strip_front(strip_end(text)); }

std::string without(std::string text, std::string_view part) {
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos;) text.erase(at, part.size());
  return text;
}

// Where the value that begins at `at` ends, brackets and strings counted; the text's end at most.
// What it holds need not be JSON.
size_t value_end(std::string_view text, size_t at) {
  int depth = 0;
  bool in_string = false;
  for (; at < text.size(); at++) {
    const char c = text[at];
    if (in_string) {
      if (c == '\\') at++;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      depth++;
    } else if (c == '}' || c == ']') {
      depth--;
    } else if (c != ',' || depth > 0) {
      continue;
    }
    if (depth < 0 || (depth == 0 && !in_string && c == ',')) return at;
    if (depth == 0 && !in_string) return at + 1;
  }
  return text.size();
}

// The last member of an object by that key, as text; none where it has none. object: JSON, not to
// be read by value where numbers shall keep their digits.
std::optional<std::string_view> member_text(std::string_view object, std::string_view key) {
  std::optional<std::string_view> found;
  size_t at = 1;
  while (true) {
    at = object.find('"', at);
    if (at == std::string_view::npos) return found;
    const size_t key_end = value_end(object, at);
    const std::string name =
        nlohmann::json::parse(object.substr(at, key_end - at)).get<std::string>();
    at = object.find_first_not_of(kSpace, object.find(':', key_end) + 1);
    const char first = object[at];
    size_t end = at;
    if (first == '"' || first == '{' || first == '[') {
      end = value_end(object, at);
    } else {
      end = object.find_first_of(",}", at);
    }
    if (name == key) found = strip_end(object.substr(at, end - at));
    at = end;
  }
}

// Nine letters and digits, which is what Mistral's templates ask for.
std::string call_id(size_t n) {
  const std::string digits = std::to_string(n);
  return "call" + std::string(5 - std::min<size_t>(5, digits.size()), '0') + digits;
}

class StyleReader {
 public:
  explicit StyleReader(const std::set<std::string, std::less<>>& names) : names_(names) {}

  // What is said and what is called; no calls where the text is none.
  ToolCallReader::Rest read(std::string_view text) const {
    if (text.find(kHermes) != std::string_view::npos) return hermes(text);
    for (const std::string_view mark : {kMistral, kLlama}) {
      const size_t at = text.find(mark);
      if (at == std::string_view::npos) continue;
      const std::string_view rest = strip(text.substr(at + mark.size()));
      return {std::string(strip_end(text.substr(0, at))),
              mark == kMistral ? mistral(rest) : llama(rest)};
    }
    const std::string_view bare = strip(text);
    if (bare.starts_with('{')) return {"", llama(bare)};
    if (bare.starts_with('[')) return {"", pythonic(bare)};
    return {std::string(text), {}};
  }

 private:
  bool offered(std::string_view name) const { return names_.find(name) != names_.end(); }

  // {"name": ..., "arguments" or "parameters": {...}}, or one in "function". text: anything.
  std::optional<ToolCall> object(std::string_view text) const {
    text = strip(text);
    auto tree = try_parse_json_tree(text);
    if (!tree || !(*tree)->is_object()) return std::nullopt;
    const nlohmann::json* value = &**tree;
    if (value->contains("function") && (*value)["function"].is_object()) {
      text = *member_text(text, "function");
      value = &(*value)["function"];
    }
    if (!value->contains("name") || !(*value)["name"].is_string()) return std::nullopt;
    const std::string& name = (*value)["name"].get_ref<const std::string&>();
    if (!offered(name)) return std::nullopt;
    const char* const key = value->contains("arguments") ? "arguments" : "parameters";
    if (!value->contains(key)) return ToolCall{name, "{}"};
    const nlohmann::json& arguments = (*value)[key];
    if (arguments.is_string()) return with_arguments(name, arguments.get<std::string>());
    if (!arguments.is_object()) return std::nullopt;
    return ToolCall{name, std::string(*member_text(text, key))};
  }

  std::optional<ToolCall> with_arguments(std::string_view name, std::string_view arguments) const {
    const auto tree = try_parse_json_tree(arguments);
    if (!offered(name) || !tree || !(*tree)->is_object()) return std::nullopt;
    return ToolCall{std::string(name), std::string(strip(arguments))};
  }

  ToolCallReader::Rest hermes(std::string_view text) const {
    size_t at = text.find(kHermes);
    ToolCallReader::Rest out{std::string(strip_end(text.substr(0, at))), {}};
    const auto say = [&](std::string_view said) {
      said = strip(said);
      if (said.empty()) return;
      if (!out.text.empty()) out.text += '\n';
      out.text += said;
    };
    while (at < text.size()) {
      const size_t next = std::min(text.find(kHermes, at + kHermes.size()), text.size());
      const std::string_view part = text.substr(at, next - at);
      const std::string_view body = part.substr(kHermes.size());
      const size_t close = body.find(kHermesEnd);
      // The last one may end with the reply.
      auto call = object(body.substr(0, close));
      if (call) {
        out.calls.push_back(std::move(*call));
        if (close != std::string_view::npos) say(body.substr(close + kHermesEnd.size()));
      } else {
        say(part);
      }
      at = next;
    }
    return out;
  }

  Calls llama(std::string_view text) const {
    Calls calls;
    while (!text.empty()) {
      const size_t end = value_end(text, 0);
      auto call = object(text.substr(0, end));
      if (!call) return {};
      calls.push_back(std::move(*call));
      text = strip_front(text.substr(end));
      if (text.starts_with(';')) text = strip_front(text.substr(1));
    }
    return calls;
  }

  Calls mistral(std::string_view text) const {
    Calls calls;
    const auto add = [&](std::optional<ToolCall> call) {
      if (call) calls.push_back(std::move(*call));
      return call.has_value();
    };
    if (text.starts_with('[')) {
      const auto tree = try_parse_json_tree(text);
      if (!tree || !(*tree)->is_array()) return {};
      size_t at = 1;
      for (size_t i = 0; i < (*tree)->size(); i++) {
        at = text.find_first_not_of(" \t\n\r\f\v,", at);
        const size_t end = value_end(text, at);
        if (!add(object(text.substr(at, end - at)))) return {};
        at = end;
      }
      return calls;
    }
    while (true) {
      const size_t next = text.find(kMistral);
      const std::string_view each = text.substr(0, next);
      const size_t mark = each.find(kMistralArguments);
      const size_t begin = mark == std::string_view::npos ? std::min(each.find('{'), each.size())
                                                          : mark + kMistralArguments.size();
      std::string_view name = each.substr(0, std::min(mark, begin));
      name = strip(name.substr(0, name.find(kMistralId)));
      if (!add(with_arguments(name, each.substr(begin)))) return {};
      if (next == std::string_view::npos) return calls;
      text = text.substr(next + kMistral.size());
    }
  }

  Calls pythonic(std::string_view text) const {
    Calls calls;
    auto read = text::read_python_calls(text);
    if (!read) return {};
    for (text::PythonCall& call : *read) {
      if (!offered(call.name)) return {};
      calls.push_back({std::move(call.name), std::move(call.arguments)});
    }
    return calls;
  }

  const std::set<std::string, std::less<>>& names_;
};

}  // namespace

struct ToolCallReader::Impl {
  std::set<std::string, std::less<>> names;   // of the tools
  std::map<int32_t, std::string_view> marks;  // special tokens that are one, or within a call
  std::string text;
  size_t given = 0;  // bytes that were handed out as text

  // How much of the text is certainly none of a call.
  size_t certain() const {
    if (may_be_bare(strip_front(text))) return 0;
    size_t end = text.size() - begun_mark();
    for (const std::string_view mark : kMarks) end = std::min(end, text.find(mark, given));
    return strip_end(std::string_view(text).substr(0, end)).size();  // none before a call
  }

  // Length of the longest end of the text that begins a mark.
  size_t begun_mark() const {
    for (size_t n = std::min(text.size(), kLlama.size()); n > 0; n--) {
      const std::string_view end = std::string_view(text).substr(text.size() - n);
      if (std::any_of(kMarks.begin(), kMarks.end(), [&](std::string_view mark) {
            return n < mark.size() && mark.starts_with(end);
          })) {
        return n;
      }
    }
    return 0;
  }

  // Whether a reply that begins so may be a call without a mark.
  bool may_be_bare(std::string_view begin) const {
    if (begin.empty()) return true;
    const std::string_view rest = strip_front(begin.substr(1));
    if (begin[0] == '[') {
      return std::any_of(names.begin(), names.end(), [&](const std::string& name) {
        const std::string call = name + "(";
        return call.starts_with(rest) || rest.starts_with(call);
      });
    }
    if (begin[0] != '{') return false;
    return rest.empty() ||
           std::any_of(kFirstKeys.begin(), kFirstKeys.end(), [&](std::string_view name) {
             const std::string key = "\"" + std::string(name) + "\"";
             return key.starts_with(rest) || rest.starts_with(key);
           });
  }

  std::string without_marks(std::string said) const {
    for (const auto& [id, mark] : marks) said = without(std::move(said), mark);
    return said;
  }
};

ToolCallReader::ToolCallReader(std::string_view tools) : impl_(std::make_unique<Impl>()) {
  if (strip(tools).empty()) return;
  const auto refuse = [](const char* what) {
    throw std::invalid_argument(std::string("tools must be a JSON array of objects, not ") + what);
  };
  const auto tree = try_parse_json_tree(tools);
  if (!tree) refuse("what is not JSON");
  if (!(*tree)->is_array()) refuse((*tree)->type_name());
  for (const nlohmann::json& tool : **tree) {
    if (!tool.is_object()) refuse("an array with others");
    // Some templates take the function by itself.
    const nlohmann::json& function =
        tool.contains("function") && tool["function"].is_object() ? tool["function"] : tool;
    if (function.contains("name") && function["name"].is_string()) {
      impl_->names.insert(function["name"].get<std::string>());
    }
  }
}

ToolCallReader::ToolCallReader(std::string_view tools, const Tokenizer& tokenizer)
    : ToolCallReader(tools) {
  if (impl_->names.empty()) return;
  for (const std::string_view mark :
       {kHermes, kHermesEnd, kMistral, kMistralId, kMistralArguments, kLlama}) {
    const std::optional<int32_t> id = tokenizer.token_to_id(mark);
    if (id && tokenizer.is_special(*id)) impl_->marks[*id] = mark;
  }
}

ToolCallReader::~ToolCallReader() = default;
ToolCallReader::ToolCallReader(ToolCallReader&&) noexcept = default;
ToolCallReader& ToolCallReader::operator=(ToolCallReader&&) noexcept = default;

ToolCallReader::Impl& ToolCallReader::impl() const { return held(impl_, "reader of tool calls"); }

std::string ToolCallReader::push(std::string_view piece, std::span<const int32_t> token_ids) {
  Impl& self = impl();
  if (self.names.empty()) return std::string(piece);
  self.text += piece;
  for (const int32_t id : token_ids) {
    if (const auto mark = self.marks.find(id); mark != self.marks.end()) self.text += mark->second;
  }
  const size_t safe = std::max(self.given, self.certain());
  std::string said = self.text.substr(self.given, safe - self.given);
  self.given = safe;
  return self.without_marks(std::move(said));
}

bool ToolCallReader::reads_tokens() const { return !impl().marks.empty(); }

ToolCallReader::Rest ToolCallReader::finish() const {
  const Impl& self = impl();
  if (self.names.empty()) return {};
  Rest rest = StyleReader(self.names).read(self.text);
  if (rest.calls.empty()) rest.text = self.text;
  rest.text = self.without_marks(rest.text.substr(std::min(self.given, rest.text.size())));
  return rest;
}

ChatMessage call_message(std::string_view text, std::span<const ToolCall> calls, size_t first_id) {
  JsonListText list;
  for (const ToolCall& call : calls) {
    JsonObjectText function, each;
    function.add("name", call.name);
    function.add_text("arguments", call.arguments);
    each.add("type", "function");
    each.add("id", call_id(first_id++));
    each.add_text("function", function.take());
    list.add_text(each.take());
  }
  JsonObjectText message;
  message.add("role", "assistant");
  message.add("content", text);
  message.add_text("tool_calls", list.take());
  return ChatMessage::from_json(message.take());
}

ChatMessage result_message(const ToolCall& call, size_t id, std::string_view content) {
  JsonObjectText message;
  message.add("role", "tool");
  message.add("name", call.name);
  message.add("tool_call_id", call_id(id));
  message.add("content", content);
  return ChatMessage::from_json(message.take());
}

}  // namespace mustafar
