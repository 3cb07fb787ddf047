#include "text/continued_message.h"

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

namespace mustafar {
namespace {

using jinja::Dict;
using jinja::Text;
using jinja::Value;

// The space tells whether the template trims what it is given.
constexpr std::string_view kTag = "CONTINUE_FINAL_MESSAGE_TAG ";
constexpr std::string_view kTagWord = kTag.substr(0, kTag.size() - 1);

// The same text under other names; a template may read any of them.
constexpr std::array<std::string_view, 3> kReasoning = {"reasoning_content", "thinking",
                                                        "reasoning"};

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("continue_final_message: " + what);
}

Value tagged(const Text& text) {
  Text out = text;
  out.append(kTag, /*outside=*/true);
  return Value(std::move(out));
}

Value with_field(const Value& dict, std::string_view field, Value value, jinja::Budget& budget) {
  auto out = std::make_shared<Dict>(dict.dict());
  out->set(Value(field), std::move(value), budget);
  return Value(std::shared_ptr<const Dict>(std::move(out)));
}

}  // namespace

ContinuedMessage::ContinuedMessage(const Value& messages, const std::string& field,
                                   const std::string& source, jinja::Budget& budget) {
  if (messages.items().empty()) refuse("there is no message to continue");
  std::vector<Value> changed = messages.items();
  Value& last = changed.back();
  const Value* found = last.dict().find(field);
  if (!found || found->is_none()) refuse("the last message has no '" + field + "'");
  const Value given = *found;

  std::vector<std::string_view> fields = {field};
  if (std::find(kReasoning.begin(), kReasoning.end(), field) != kReasoning.end()) {
    fields.assign(kReasoning.begin(), kReasoning.end());
  }
  const auto is_read = [&](std::string_view name) {
    return source.find(name) != std::string::npos;
  };
  if (std::none_of(fields.begin(), fields.end(), is_read)) {
    refuse("the chat template does not read '" + field + "'");
  }

  if (given.is_list()) {
    std::vector<Value> parts = given.items();
    const auto part = std::find_if(parts.rbegin(), parts.rend(), [](const Value& each) {
      const Value* text = each.is_dict() ? each.dict().find("text") : nullptr;
      return text && text->is_text();
    });
    if (part == parts.rend()) refuse("the last message has no text to continue");
    final_text_ = part->dict().find("text")->text();
    *part = with_field(*part, "text", tagged(final_text_), budget);
    last = with_field(last, field, Value::list(std::move(parts)), budget);
  } else if (given.is_text()) {
    final_text_ = given.text();
    for (const std::string_view name : fields) {
      const Value* same = last.dict().find(name);
      if (same && same->is_text() && same->bytes() == final_text_.bytes) {
        last = with_field(last, name, tagged(final_text_), budget);
      }
    }
  } else {
    refuse("the last message's '" + field + "' is no text");
  }
  messages_ = Value::list(std::move(changed));
}

Text ContinuedMessage::cut(const Text& rendered) const {
  const size_t at = rendered.bytes.rfind(kTagWord);
  const Text words = jinja::strip(final_text_, nullptr, true, true);
  if (at == std::string::npos || rendered.bytes.find(words.bytes) == std::string::npos) {
    refuse("the chat template leaves out (a part of) the last message");
  }
  const Text before = rendered.sub(0, at);
  const bool spaces_kept = rendered.bytes.compare(at, kTag.size(), kTag) == 0;
  return spaces_kept ? before : jinja::strip(before, nullptr, false, true);
}

}  // namespace mustafar
