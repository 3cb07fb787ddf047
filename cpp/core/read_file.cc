#include "core/read_file.h"

#include <fstream>

namespace mustafar {

std::optional<std::string> read_file(const std::filesystem::path& file, size_t bytes) {
  std::string content(bytes, '\0');
  std::ifstream in(file, std::ios::binary);
  in.read(content.data(), static_cast<std::streamsize>(bytes));
  if (!in) return std::nullopt;
  return content;
}

}  // namespace mustafar
