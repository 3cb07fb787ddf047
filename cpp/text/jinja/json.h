// JSON in and out, as Python's json module has it.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "text/jinja/value.h"

namespace mustafar::jinja {

struct JsonStyle {
  bool ensure_ascii = false;
  bool sort_keys = false;
  std::optional<std::string> indent;  // one level of it
  Text item_separator{", "};
  Text key_separator{": "};
};

// json.dumps. Throws for a value that JSON does not have.
Text to_json(Interpreter& in, const Value& value, const JsonStyle& style);

// A value from JSON text; every string in it is marked as from outside. Throws
// std::invalid_argument starting with `what` for text that is not JSON, nested too deep or with
// integers beyond 64 bits.
Value parse_json(std::string_view json, const char* what);

}  // namespace mustafar::jinja
