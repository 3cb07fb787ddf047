// A value of tokenizer.json together with where it stands, so that every complaint names file and
// field.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "mustafar/error.h"

namespace mustafar::text {

class JsonField {
 public:
  // value must outlive the field and those taken from it.
  JsonField(const nlohmann::json& value, std::string file, std::string path)
      : value_(&value), file_(std::move(file)), path_(std::move(path)) {}

  bool is_null() const { return value_->is_null(); }
  bool is_zero() const { return value_->is_number() && value_->get<double>() == 0.0; }
  bool has(std::string_view key) const;  // present and not null; false for what is no object

  // Each throws TokenizerError with expected and actual kind.
  JsonField at(std::string_view key) const;                        // a member that must be there
  JsonField get(std::string_view key) const;                       // null where it is absent
  std::vector<JsonField> elements() const;                         // of an array
  std::vector<std::pair<std::string, JsonField>> members() const;  // of an object
  std::string string() const;
  std::string character() const;  // a string of one character
  bool boolean() const;
  int64_t integer() const;

  bool boolean_or(std::string_view key, bool absent) const {
    return has(key) ? at(key).boolean() : absent;
  }

  [[noreturn]] void fail(std::string_view what) const;
  [[noreturn]] void unsupported_type(std::string_view type, std::string_view supported) const;

 private:
  [[noreturn]] void wrong_kind(std::string_view expected) const;
  JsonField child(const nlohmann::json& value, const std::string& suffix) const;

  const nlohmann::json* value_;
  std::string file_, path_;
};

}  // namespace mustafar::text
