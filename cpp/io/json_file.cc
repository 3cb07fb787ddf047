#include "io/json_file.h"

#include <algorithm>
#include <string>
#include <string_view>

#include "core/json_text.h"
#include "io/mapped_file.h"
#include "mustafar/error.h"

namespace mustafar {

JsonTree<> read_json_file(const std::filesystem::path& path, size_t max_bytes) {
  const MappedFile file = MappedFile::open(path);
  if (file.bytes() > max_bytes) {
    throw ModelError(path.string() + ": has " + std::to_string(file.bytes()) +
                     " bytes, expected at most " + std::to_string(max_bytes));
  }
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.bytes());
  JsonTree<> value;
  try {
    value = parse_json_text(text);
    file.check_read();
  } catch (const nlohmann::json::exception& error) {
    file.check_read();
    throw ModelError(path.string() + ": not valid JSON: " + describe(error));
  }
  if (!value->is_object()) {
    throw ModelError(path.string() + ": expected a JSON object, found " + describe(*value));
  }
  return value;
}

std::string describe(const nlohmann::json& value) {
  constexpr size_t kLongest = 60;
  std::string text = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (text.size() > kLongest) {
    size_t cut = kLongest;
    while (cut > 0 && (static_cast<unsigned char>(text[cut]) & 0xc0) == 0x80) cut--;
    text = text.substr(0, cut) + "...";
  }
  switch (value.type()) {
    case nlohmann::json::value_t::string:
      return "the string " + text;
    case nlohmann::json::value_t::array:
      return "the list " + text;
    case nlohmann::json::value_t::object:
      return "the object " + text;
    default:
      return text;
  }
}

std::string describe(const nlohmann::json::exception& error) {
  std::string text = error.what();
  std::replace_if(text.begin(), text.end(), [](char c) { return c < 0x20 || c > 0x7e; }, '?');
  return text;
}

}  // namespace mustafar
