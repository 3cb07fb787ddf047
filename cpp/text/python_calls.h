// Calls as Python spells them, for models that call tools so.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mustafar::text {

struct PythonCall {
  std::string name;       // with dots where it has some
  std::string arguments;  // its keyword arguments, a JSON object
};

// The calls of a list display, "[name(key=value), ...]", whose values are constants: text, numbers,
// True, False, None (in JSON's spelling too), and lists, tuples and dicts of these. Nothing where
// the text is anything else. Numbers keep their digits.
std::optional<std::vector<PythonCall>> read_python_calls(std::string_view text);

}  // namespace mustafar::text
