#include "runtime/chat_messages.h"

#include <stdexcept>
#include <utility>

namespace mustafar {
namespace {

using Json = ChatJson::Json;

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
    if (text.empty()) {
      arguments = Json::object();
    } else if (auto parsed = try_parse_json_tree<Json>(text)) {
      if ((*parsed)->is_object() || (*parsed)->is_array()) arguments = std::move(**parsed);
    }
  }
}

}  // namespace

ChatMessage::ChatMessage(std::string role, std::string_view content) : role_(std::move(role)) {
  JsonObjectText text;
  text.add("role", role_);
  text.add("content", content);
  json_ = text.take();
}

ChatMessage ChatMessage::from_json(std::string_view object) {
  const auto tree = try_parse_json_tree<Json>(object);
  if (!tree) throw std::invalid_argument("message: not JSON");
  return ChatJson::message(**tree);
}

std::string ChatMessage::content() const {
  const ChatJson::Tree tree = ChatJson::parse(*this);
  const Json& content = (*tree).at("content");
  return content.is_string() ? content.get<std::string>() : std::string();
}

// Role and content first, then the rest as it came.
ChatMessage ChatJson::message(const Json& object) {
  if (!object.is_object()) throw std::invalid_argument("messages: expected objects");
  if (!object.contains("role") || !object["role"].is_string()) {
    throw std::invalid_argument("messages: a message without a role");
  }
  ChatMessage message;
  message.role_ = object["role"].get<std::string>();
  JsonObjectText text;
  text.add("role", message.role_);
  text.add_text("content", object.contains("content") ? dump(object["content"]) : "null");
  for (const auto& [key, value] : object.items()) {
    if (key != "role" && key != "content") text.add_text(key, dump(value));
  }
  message.json_ = text.take();
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
    Tree tree = parse(message);
    parse_arguments(&*tree);
    text += dump(*tree);
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
