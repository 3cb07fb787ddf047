// Typed access to the fields of config.json, with errors that name file and field.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "io/json_file.h"
#include "mustafar/error.h"

namespace mustafar {

inline constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

// One object of a config file, with typed access. A null counts as missing.
class Fields {
 public:
  Fields(const std::filesystem::path& file, const nlohmann::json& object, std::string prefix = "")
      : file_(file), object_(object), prefix_(std::move(prefix)) {}

  [[noreturn]] void fail(const std::string& field, const std::string& what) const {
    throw ModelError(file_.string() + ": \"" + prefix_ + field + "\": " + what);
  }
  [[noreturn]] void fail(const std::string& field, const std::string& expected,
                         const nlohmann::json& actual) const {
    fail(field, "expected " + expected + ", found " + describe(actual));
  }

  const nlohmann::json* find(const char* field) const {
    const auto it = object_.find(field);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  bool is_null(const char* field) const {
    const auto it = object_.find(field);
    return it != object_.end() && it->is_null();
  }

  int32_t integer(const char* field, int64_t low, int64_t high) const {
    const nlohmann::json* value = find(field);
    if (value == nullptr) fail(field, "is missing; expected " + range(low, high));
    return to_integer(field, *value, low, high);
  }
  int32_t integer_or(const char* field, int64_t low, int64_t high, int32_t otherwise) const {
    const nlohmann::json* value = find(field);
    return value == nullptr ? otherwise : to_integer(field, *value, low, high);
  }
  // Whole numbers that were written as floats (512.0) are integers.
  int32_t to_integer(const char* field, const nlohmann::json& value, int64_t low,
                     int64_t high) const {
    const double number = value.is_number() ? value.get<double>() : 0.5;
    const bool fits = number == std::floor(number) && number >= static_cast<double>(low) &&
                      number <= static_cast<double>(high);
    if (!fits) fail(field, range(low, high), value);
    return static_cast<int32_t>(number);
  }

  // A finite number in (low, high).
  double number(const char* field, double low, double high) const {
    const nlohmann::json* value = find(field);
    const std::string expected =
        "a number above " + nlohmann::json(low).dump() +
        (std::isinf(high) ? "" : " and below " + nlohmann::json(high).dump());
    if (value == nullptr) fail(field, "is missing; expected " + expected);
    if (!value->is_number()) fail(field, expected, *value);
    const double number = value->get<double>();
    if (!(number > low && number < high)) fail(field, expected, *value);
    return number;
  }
  double number_or(const char* field, double low, double high, double otherwise) const {
    return find(field) == nullptr ? otherwise : number(field, low, high);
  }

  // A number in [low, high], or nothing.
  std::optional<double> number_within(const char* field, double low, double high,
                                      const char* expected) const {
    const nlohmann::json* value = find(field);
    if (value == nullptr) return std::nullopt;
    const double number = value->is_number() ? value->get<double>() : NAN;
    if (!(number >= low && number <= high)) fail(field, expected, *value);
    return number;
  }

  bool boolean_or(const char* field, bool otherwise) const {
    const nlohmann::json* value = find(field);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) fail(field, "true or false", *value);
    return value->get<bool>();
  }

  std::string string_or(const char* field, const std::string& otherwise) const {
    const nlohmann::json* value = find(field);
    if (value == nullptr) return otherwise;
    if (!value->is_string()) fail(field, "a string", *value);
    return value->get<std::string>();
  }

  // An id, a list of ids, or nothing. Ids that no token has, such as -1, mean none.
  std::vector<int32_t> ids(const char* field, int64_t vocab_size) const {
    std::vector<int32_t> result;
    const nlohmann::json* value = find(field);
    if (value == nullptr) return result;
    const auto add = [&](const nlohmann::json& id) {
      const int32_t number = to_integer(field, id, -kInt32Max, kInt32Max);
      if (number >= 0 && number < vocab_size) result.push_back(number);
    };
    if (!value->is_array()) add(*value);
    if (value->is_array()) std::for_each(value->begin(), value->end(), add);
    return result;
  }

  // An object in this one, or null.
  const nlohmann::json* object(const char* field) const {
    const nlohmann::json* value = find(field);
    if (value != nullptr && !value->is_object()) fail(field, "an object", *value);
    return value;
  }
  Fields within(const char* field, const nlohmann::json& object) const {
    return Fields(file_, object, prefix_ + field + ".");
  }

 private:
  static std::string range(int64_t low, int64_t high) {
    return "an integer from " + std::to_string(low) + " to " + std::to_string(high);
  }

  const std::filesystem::path& file_;
  const nlohmann::json& object_;
  std::string prefix_;
};

}  // namespace mustafar
