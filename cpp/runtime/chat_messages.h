// Messages of a conversation as JSON.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "core/json_tree.h"
#include "mustafar/chat.h"

namespace mustafar {

struct ChatJson {
  using Json = nlohmann::ordered_json;
  using Tree = JsonTree<Json>;

  // Throw std::invalid_argument for what is no message, or no list of them.
  static ChatMessage message(const Json& object);
  static std::vector<ChatMessage> messages(const Json& list);
  // As one list, on one line.
  static std::string text(std::span<const ChatMessage> messages);
  // The same for a template: the arguments of tool calls as objects, which OpenAI's API gives as
  // JSON text. Text that is no JSON stays text.
  static std::string template_text(std::span<const ChatMessage> messages);

  // On one line, with U+FFFD for what is not UTF-8.
  static std::string dump(const Json& json) {
    return json.dump(-1, ' ', false, Json::error_handler_t::replace);
  }
  // Of a message, whose text is known to be JSON.
  static Tree parse(const ChatMessage& message) { return parse_json_tree<Json>(message.json()); }
};

}  // namespace mustafar
