// Text files that a person names, with what was found in them.
#pragma once

#include <string>
#include <string_view>

namespace mustafar::cli {

struct TextFile {
  std::string text;  // UTF-8, without a byte order mark
  std::string kind;  // "UTF-8", or "UTF-16", which is decoded
};

// Throws Error naming the file, and for one that is no text the first byte that says so.
TextFile read_text_file(const std::string& path);

// The same of bytes; name: of their file, for errors.
TextFile decode_text(std::string bytes, const std::string& name);

}  // namespace mustafar::cli
