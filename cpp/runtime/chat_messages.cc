#include "runtime/chat_messages.h"

#include <stdexcept>
#include <utility>

namespace mustafar {
namespace {

using Json = ChatJson::Json;

// Role and content first, then the rest as it came.
Json empty_message(const std::string& role) {
  Json json = Json::object();
  json["role"] = role;
  json["content"] = nullptr;
  return json;
}

// function.arguments of every tool call: JSON text becomes what it says, no text an empty object.
void parse_arguments(Json* message) {
  if (!message->contains("tool_calls") || !(*message)["tool_calls"].is_array()) return;
  for (Json& call : (*message)["tool_calls"]) {
    if (!call.is_object()) continue;
    Json& function = call.contains("function") ? call["function"] : call;
    if (!function.is_object() || !function.contains("arguments")) continue;
    Json& arguments = function["arguments"];
    if (!arguments.is_string()) continue;
    const std::string text = arguments.get<std::string>();
    Json parsed = text.empty() ? Json::object() : Json::parse(text, nullptr, false);
    if (parsed.is_object() || parsed.is_array()) arguments = std::move(parsed);
  }
}

}  // namespace

ChatMessage::ChatMessage(std::string role, std::string_view content) : role_(std::move(role)) {
  Json json = empty_message(role_);
  json["content"] = content;
  json_ = ChatJson::dump(json);
}

ChatMessage ChatMessage::from_json(std::string_view object) {
  const Json json = Json::parse(object, nullptr, false);
  if (json.is_discarded()) throw std::invalid_argument("message: not JSON");
  return ChatJson::message(json);
}

std::string ChatMessage::content() const {
  const Json json = Json::parse(json_);
  const Json& content = json["content"];
  return content.is_string() ? content.get<std::string>() : std::string();
}

ChatMessage ChatJson::message(const Json& object) {
  if (!object.is_object()) throw std::invalid_argument("messages: expected objects");
  if (!object.contains("role") || !object["role"].is_string()) {
    throw std::invalid_argument("messages: a message without a role");
  }
  ChatMessage message;
  message.role_ = object["role"].get<std::string>();
  Json json = empty_message(message.role_);
  for (const auto& [key, value] : object.items()) json[key] = value;
  message.json_ = dump(json);
  return message;
}

std::vector<ChatMessage> ChatJson::messages(const Json& list) {
  if (!list.is_array()) throw std::invalid_argument("messages: expected a list");
  std::vector<ChatMessage> messages;
  for (const Json& each : list) messages.push_back(message(each));
  return messages;
}

std::string ChatJson::template_text(std::span<const ChatMessage> messages) {
  std::string text = "[";
  for (const ChatMessage& message : messages) {
    if (text.size() > 1) text += ",";
    if (message.json().find("\"tool_calls\"") == std::string::npos) {
      text += message.json();
      continue;
    }
    Json json = Json::parse(message.json());
    parse_arguments(&json);
    text += dump(json);
  }
  return text + "]";
}

std::string ChatJson::text(std::span<const ChatMessage> messages) {
  std::string text = "[";
  for (const ChatMessage& message : messages) {
    if (text.size() > 1) text += ",";
    text += message.json();
  }
  return text + "]";
}

}  // namespace mustafar
