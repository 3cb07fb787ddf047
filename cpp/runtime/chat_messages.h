// Messages of a conversation as JSON.
#pragma once

#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "mustafar/chat.h"

namespace mustafar {

struct ChatJson {
  using Json = nlohmann::ordered_json;

  // Throw std::invalid_argument for what is no message, or no list of them.
  static ChatMessage message(const Json& object);
  static std::vector<ChatMessage> messages(const Json& list);
  // As one list, on one line.
  static std::string text(std::span<const ChatMessage> messages);
  // The same for a template: the arguments of tool calls as objects, which OpenAI's API gives as
  // JSON text. Text that is no JSON stays text.
  static std::string template_text(std::span<const ChatMessage> messages);

  // With U+FFFD for what is not UTF-8. indent: spaces; -1: on one line.
  static std::string dump(const Json& json, int indent = -1) {
    return json.dump(indent, ' ', false, Json::error_handler_t::replace);
  }
};

}  // namespace mustafar
