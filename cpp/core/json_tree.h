// A JSON value with its members, where memory may run out.
//
// The destructor of nlohmann::json allocates (3.11, to take nested values apart without recursion),
// and where it cannot the process ends: there is nobody to catch the error. So a value with members
// belongs in a JsonTree from the start, which takes it apart from the leaves up, by recursion. That
// is bounded: text that nests deeper than kMaxJsonDepth is refused. What is only written is written
// as text (JsonObjectText), with no value in between.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mustafar {

inline constexpr size_t kMaxJsonDepth = 512;

// Leaves a value that its own destructor need not allocate for.
template <typename Json>
void take_apart(Json& value) noexcept {
  if (value.is_array()) {
    auto& elements = value.template get_ref<typename Json::array_t&>();
    for (Json& element : elements) take_apart(element);
    elements.clear();
  } else if (value.is_object()) {
    auto& members = value.template get_ref<typename Json::object_t&>();
    for (auto& member : members) take_apart(member.second);
    members.clear();
  }
}

// Makes room for one more member. nlohmann's ordered objects are vectors that copy their members
// when they grow, values and all; here they are moved.
template <typename Object>
void make_room(Object& object) {
  if constexpr (requires { object.reserve(1); }) {
    if (object.size() < object.capacity()) return;
    Object larger;
    larger.reserve(2 * object.size() + 4);
    try {
      for (auto& member : object) larger.emplace_back(member.first, std::move(member.second));
    } catch (...) {
      for (auto& member : larger) take_apart(member.second);
      throw;
    }
    object.swap(larger);
  }
}

template <typename Json = nlohmann::json>
class JsonTree {
 public:
  JsonTree() = default;
  explicit JsonTree(Json&& value) noexcept : value_(std::move(value)) {}
  ~JsonTree() { take_apart(value_); }
  JsonTree(JsonTree&& other) noexcept = default;
  JsonTree& operator=(JsonTree&& other) noexcept {
    take_apart(value_);
    value_ = std::move(other.value_);
    return *this;
  }

  Json& operator*() { return value_; }
  const Json& operator*() const { return value_; }
  Json* operator->() { return &value_; }
  const Json* operator->() const { return &value_; }

 private:
  Json value_;
};

class JsonTooDeep : public nlohmann::json::exception {
 public:
  JsonTooDeep() : exception(501, "JSON that nests more than 512 levels deep") {}
};

// Receives the parser's events.
template <typename Json>
class JsonTreeReader {
 public:
  explicit JsonTreeReader(JsonTree<Json>* out) : out_(*out) {}

  bool null() { return place(Json(nullptr)) != nullptr; }
  bool boolean(bool value) { return place(Json(value)) != nullptr; }
  bool number_integer(typename Json::number_integer_t value) {
    return place(Json(value)) != nullptr;
  }
  bool number_unsigned(typename Json::number_unsigned_t value) {
    return place(Json(value)) != nullptr;
  }
  bool number_float(typename Json::number_float_t value, const std::string&) {
    return place(Json(value)) != nullptr;
  }
  bool string(std::string& value) { return place(Json(std::move(value))) != nullptr; }
  bool binary(typename Json::binary_t&) { return false; }
  bool key(std::string& value) {
    key_ = std::move(value);
    return true;
  }
  bool start_object(size_t) { return open(Json::object()); }
  bool start_array(size_t) { return open(Json::array()); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }
  template <typename Exception>
  bool parse_error(size_t, const std::string&, const Exception& error) {
    throw error;
  }

 private:
  // Puts a value, which has no members yet, where it belongs.
  Json* place(Json value) {
    if (open_.empty()) {
      *out_ = std::move(value);
      return &*out_;
    }
    Json& parent = *open_.back();
    if (parent.is_array()) {
      auto& elements = parent.template get_ref<typename Json::array_t&>();
      elements.push_back(std::move(value));
      return &elements.back();
    }
    auto& object = parent.template get_ref<typename Json::object_t&>();
    make_room(object);
    Json& member = object[key_];
    take_apart(member);  // of a key that came before
    member = std::move(value);
    return &member;
  }
  bool open(Json value) {
    if (open_.size() == kMaxJsonDepth) throw JsonTooDeep();
    open_.push_back(place(std::move(value)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  JsonTree<Json>& out_;
  std::vector<Json*> open_;  // containers; a child never moves while it is open
  std::string key_;
};

// Throws nlohmann::json::exception for what is not JSON.
template <typename Json = nlohmann::json>
JsonTree<Json> parse_json_tree(std::string_view text) {
  JsonTree<Json> tree;
  JsonTreeReader<Json> reader(&tree);
  Json::sax_parse(text.begin(), text.end(), &reader);
  return tree;
}

// None for what is not JSON.
template <typename Json = nlohmann::json>
std::optional<JsonTree<Json>> try_parse_json_tree(std::string_view text) {
  try {
    return parse_json_tree<Json>(text);
  } catch (const nlohmann::json::exception&) {
    return std::nullopt;
  }
}

// The whole number that a value is: none where it is written as another one, or beyond 64 bits,
// where nlohmann's own conversion has no defined result.
template <typename Json>
std::optional<int64_t> whole_number(const Json& value) {
  if (!value.is_number_integer()) return std::nullopt;
  if (value.is_number_unsigned() && value.template get<uint64_t>() > uint64_t{INT64_MAX}) {
    return std::nullopt;
  }
  return value.template get<int64_t>();
}

// The JSON text of a value without members: a number, a string, ... What is not UTF-8 becomes
// U+FFFD.
template <typename Value>
std::string json_text(const Value& value) {
  return nlohmann::json(value).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

// The text of an object, or a list, member by member.
class JsonObjectText {
 public:
  template <typename Value>
  void add(std::string_view key, const Value& value) {
    add_text(key, json_text(value));
  }
  // text: JSON.
  void add_text(std::string_view key, std::string_view text) {
    text_ += text_.empty() ? "{" : ",";
    text_.append(json_text(key)).append(":").append(text);
  }
  std::string take() { return text_.empty() ? "{}" : std::exchange(text_, {}) + "}"; }

 private:
  std::string text_;
};

class JsonListText {
 public:
  void add_text(std::string_view text) { text_.append(text_.empty() ? "[" : ",").append(text); }
  std::string take() { return text_.empty() ? "[]" : std::exchange(text_, {}) + "]"; }

 private:
  std::string text_;
};

}  // namespace mustafar
