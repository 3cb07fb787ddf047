#include "cli/text_file.h"

#include <cstdint>
#include <cstdio>
#include <utility>

#include "cli/options.h"
#include "mustafar/error.h"
#include "text/unicode/utf8.h"

namespace mustafar::cli {
namespace {

std::string from_utf16(std::string_view bytes, bool big_endian, const std::string& name) {
  std::string text;
  const auto unit = [&](size_t at) {
    const auto first = static_cast<unsigned char>(bytes[at]);
    const auto second = static_cast<unsigned char>(bytes[at + 1]);
    return static_cast<uint32_t>(big_endian ? first << 8 | second : second << 8 | first);
  };
  for (size_t at = 2; at < bytes.size(); at += 2) {  // behind the byte order mark
    uint32_t c = at + 1 < bytes.size() ? unit(at) : 0xd800;
    if (c >= 0xd800 && c < 0xdc00 && at + 3 < bytes.size()) {
      const uint32_t low = unit(at + 2);
      if (low >= 0xdc00 && low < 0xe000) {
        c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
        at += 2;
      }
    }
    if (c >= 0xd800 && c < 0xe000) {
      throw Error(name + ": not a text: UTF-16 with half a character at byte " +
                  std::to_string(at));
    }
    unicode::append_utf8(c, &text);
  }
  return text;
}

}  // namespace

TextFile decode_text(std::string bytes, const std::string& name) {
  const std::string_view view = bytes;
  if (view.starts_with("\xff\xfe") || view.starts_with("\xfe\xff")) {
    return {from_utf16(view, view[0] == '\xfe', name), "UTF-16"};
  }
  if (const size_t zero = view.find('\0'); zero != std::string_view::npos) {
    throw Error(name + ": not a text: a zero byte at byte " + std::to_string(zero));
  }
  for (size_t at = 0; at < view.size();) {
    const unicode::Utf8Step step = unicode::read_utf8(view, at);
    if (!step.valid) {
      char byte[8];
      std::snprintf(byte, sizeof(byte), "0x%02x", static_cast<unsigned char>(view[at]));
      throw Error(name + ": not UTF-8: " + byte + " at byte " + std::to_string(at) +
                  "; if it is Latin-1, \"iconv -f latin1 -t utf-8\" makes UTF-8 of it");
    }
    at += step.length;
  }
  if (view.starts_with("\xef\xbb\xbf")) bytes.erase(0, 3);
  return {std::move(bytes), "UTF-8"};
}

TextFile read_text_file(const std::string& path) {
  return decode_text(read_text(path), path == "-" ? "standard input" : path);
}

}  // namespace mustafar::cli
