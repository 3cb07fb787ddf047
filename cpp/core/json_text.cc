#include "core/json_text.h"

#include <algorithm>
#include <string>

namespace mustafar {
namespace {

// The text with NaN, Infinity and -Infinity between quotes; what stands in strings stays.
std::string with_named_numbers(std::string_view text) {
  std::string out;
  bool in_string = false;
  for (size_t i = 0; i < text.size();) {
    const char c = text[i];
    size_t length = 1;
    if (in_string) {
      if (c == '\\') length = std::min<size_t>(2, text.size() - i);
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else {
      for (const std::string_view name : {"NaN", "Infinity", "-Infinity"}) {
        if (!text.substr(i).starts_with(name)) continue;
        out.append("\"").append(name).append("\"");
        length = 0;
        i += name.size();
        break;
      }
    }
    out.append(text.substr(i, length));
    i += length;
  }
  return out;
}

}  // namespace

JsonTree<> parse_json_text(std::string_view text) {
  if (auto tree = try_parse_json_tree(text)) return std::move(*tree);
  return parse_json_tree(with_named_numbers(text));  // throws where something else was wrong
}

}  // namespace mustafar
