#include "text/json_field.h"

#include <optional>

#include "core/json_tree.h"
#include "text/unicode/utf8.h"

namespace mustafar::text {

namespace {

const nlohmann::json kNull;

}  // namespace

void JsonField::fail(std::string_view what) const {
  throw TokenizerError(file_ + ": " + path_ + ": " + std::string(what));
}

void JsonField::unsupported_type(std::string_view type, std::string_view supported) const {
  fail("type " + unicode::in_quotes(type) + " is not supported; supported are " +
       std::string(supported));
}

void JsonField::wrong_kind(std::string_view expected) const {
  std::string actual(value_->type_name());
  if (value_->is_string()) {
    actual += " " + unicode::in_quotes(value_->get_ref<const std::string&>());
  } else if (value_->is_primitive() && !value_->is_null()) {
    actual += " " + value_->dump();
  }
  fail("expected " + std::string(expected) + ", found " + actual);
}

JsonField JsonField::child(const nlohmann::json& value, const std::string& suffix) const {
  return JsonField(value, file_, path_.empty() ? suffix.substr(suffix[0] == '.') : path_ + suffix);
}

bool JsonField::has(std::string_view key) const {
  if (!value_->is_object()) return false;
  const auto it = value_->find(std::string(key));
  return it != value_->end() && !it->is_null();
}

JsonField JsonField::at(std::string_view key) const {
  if (!value_->is_object()) wrong_kind("an object");
  const auto it = value_->find(std::string(key));
  if (it == value_->end()) fail("field " + unicode::in_quotes(key) + " is missing");
  return child(*it, std::string(".").append(key));
}

JsonField JsonField::get(std::string_view key) const {
  if (!value_->is_object()) wrong_kind("an object");
  const auto it = value_->find(std::string(key));
  return child(it == value_->end() ? kNull : *it, std::string(".").append(key));
}

std::vector<JsonField> JsonField::elements() const {
  if (!value_->is_array()) wrong_kind("an array");
  std::vector<JsonField> out;
  for (size_t i = 0; i < value_->size(); i++) {
    out.push_back(child((*value_)[i], std::string("[").append(std::to_string(i)).append("]")));
  }
  return out;
}

std::vector<std::pair<std::string, JsonField>> JsonField::members() const {
  if (!value_->is_object()) wrong_kind("an object");
  std::vector<std::pair<std::string, JsonField>> out;
  for (const auto& [key, value] : value_->items()) {
    out.emplace_back(key, child(value, std::string(".").append(key)));
  }
  return out;
}

std::string JsonField::string() const {
  if (!value_->is_string()) wrong_kind("a string");
  return value_->get<std::string>();
}

std::string JsonField::character() const {
  std::string content = string();
  size_t end = 0;
  if (!content.empty()) unicode::next_code_point(content, &end);
  if (end == 0 || end != content.size()) {
    fail("must be one character, found " + unicode::in_quotes(content));
  }
  return content;
}

bool JsonField::boolean() const {
  if (!value_->is_boolean()) wrong_kind("true or false");
  return value_->get<bool>();
}

int64_t JsonField::integer() const {
  const std::optional<int64_t> number = whole_number(*value_);
  if (!number) wrong_kind("an integer");
  return *number;
}

}  // namespace mustafar::text
