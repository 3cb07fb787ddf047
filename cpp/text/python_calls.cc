#include "text/python_calls.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <utility>

#include "core/json_tree.h"
#include "text/unicode/utf8.h"

namespace mustafar::text {
namespace {

constexpr int kMaxPythonDepth = 100;  // levels of brackets

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f'; }

int digit_of(char c) {
  return is_digit(c)            ? c - '0'
         : c >= 'a' && c <= 'f' ? c - 'a' + 10
         : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                : 99;
}

struct NotPython {};

// Members of an object in the order they came first, the last value of each.
class PythonMembers {
 public:
  void set(std::string key, std::string value) {
    const auto same = std::find_if(members_.begin(), members_.end(),
                                   [&](const auto& member) { return member.first == key; });
    if (same != members_.end()) {
      same->second = std::move(value);
    } else {
      members_.emplace_back(std::move(key), std::move(value));
    }
  }
  bool has(std::string_view key) const {
    return std::any_of(members_.begin(), members_.end(),
                       [&](const auto& member) { return member.first == key; });
  }
  std::string json() const {
    JsonObjectText object;
    for (const auto& [key, value] : members_) object.add_text(key, value);
    return object.take();
  }

 private:
  std::vector<std::pair<std::string, std::string>> members_;
};

// Reads from the beginning on. read_ functions start at a token, go on behind what they read, give
// JSON text and throw NotPython.
class PythonCallReader {
 public:
  explicit PythonCallReader(std::string_view text) : text_(text) { skip_space(); }

  std::vector<PythonCall> read_calls() {
    std::vector<PythonCall> calls;
    read_items('[', ']', [&] { calls.push_back(read_call()); });
    if (at_ != text_.size()) throw NotPython();
    return calls;
  }

 private:
  char peek(size_t ahead = 0) const {
    return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0';
  }
  bool skip(char c) {
    if (peek() != c || at_ == text_.size()) return false;
    at_++;
    skip_space();
    return true;
  }
  void expect(char c) {
    if (!skip(c)) throw NotPython();
  }
  void skip_space() {
    while (at_ < text_.size() && is_space(text_[at_])) at_++;
  }

  // What `read` reads, between brackets, with commas between; one may stand at the end. Returns
  // whether there was a comma.
  template <typename Read>
  bool read_items(char open, char close, Read&& read) {
    expect(open);
    if (++depth_ > kMaxPythonDepth) throw NotPython();
    bool comma = false;
    while (!skip(close)) {
      read();
      if (skip(',')) {
        comma = true;
        continue;
      }
      expect(close);
      break;
    }
    depth_--;
    return comma;
  }

  std::string read_name() {
    if (!is_letter(peek())) throw NotPython();
    const size_t begin = at_;
    while (is_letter(peek()) || is_digit(peek())) at_++;
    std::string name(text_.substr(begin, at_ - begin));
    skip_space();
    return name;
  }

  PythonCall read_call() {
    PythonCall call;
    call.name = read_name();
    while (skip('.')) call.name.append(".").append(read_name());
    PythonMembers arguments;
    read_items('(', ')', [&] {
      std::string key = read_name();
      expect('=');
      if (arguments.has(key)) throw NotPython();
      arguments.set(std::move(key), read_value());
    });
    call.arguments = arguments.json();
    return call;
  }

  std::string read_value() {
    const char c = peek();
    if (at_string()) return json_text(read_string());
    if (c == '[') return read_list('[', ']');
    if (c == '(') return read_list('(', ')');
    if (c == '{') return read_dict();
    if (is_letter(c)) return read_constant();
    return read_number();
  }

  std::string read_list(char open, char close) {
    JsonListText list;
    std::string only;
    int n = 0;
    const bool comma = read_items(open, close, [&] {
      only = read_value();
      list.add_text(only);
      n++;
    });
    return open == '(' && n == 1 && !comma ? only : list.take();  // (1) is 1
  }

  std::string read_dict() {
    PythonMembers members;
    read_items('{', '}', [&] {
      // Keys that are no text become it, as json.dumps has it.
      std::string key;
      if (at_string()) {
        key = read_string();
      } else if (peek() != '[' && peek() != '(' && peek() != '{') {
        key = read_value();
      } else {
        throw NotPython();
      }
      expect(':');
      members.set(std::move(key), read_value());
    });
    return members.json();
  }

  std::string read_constant() {
    const std::string name = read_name();
    if (name == "True" || name == "true") return "true";
    if (name == "False" || name == "false") return "false";
    if (name == "None" || name == "null") return "null";
    throw NotPython();
  }

  std::string read_number() {
    bool negative = false;
    while (peek() == '-' || peek() == '+') {
      negative ^= peek() == '-';
      at_++;
      skip_space();
    }
    std::string digits = negative ? "-" : "";
    const char base = static_cast<char>(peek(1) | 0x20);
    if (peek() == '0' && (base == 'x' || base == 'o' || base == 'b')) {
      at_ += 2;
      digits += read_integer_of(base == 'x' ? 16 : base == 'o' ? 8 : 2);
    } else {
      digits += read_decimal();
    }
    if (is_letter(peek()) || is_digit(peek()) || peek() == '.') throw NotPython();
    // Beyond what a double holds, JSON's readers refuse it, or make it infinite.
    if (!nlohmann::json::accept(digits)) throw NotPython();
    skip_space();
    return digits;
  }

  std::string read_integer_of(int base) {
    std::string digits;
    for (; digit_of(peek()) < base || peek() == '_'; at_++) {
      if (peek() != '_') digits += peek();
    }
    uint64_t value = 0;
    const auto [end, error] =
        std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
    if (error != std::errc() || end != digits.data() + digits.size()) throw NotPython();
    return std::to_string(value);
  }

  // Digits with underscores between.
  std::string read_digits() {
    std::string digits;
    while (is_digit(peek()) || (peek() == '_' && !digits.empty() && is_digit(peek(1)))) {
      if (peek() != '_') digits += peek();
      at_++;
    }
    return digits;
  }

  std::string read_decimal() {
    std::string whole = read_digits();
    std::string rest;
    bool is_float = false;
    if (peek() == '.') {
      at_++;
      is_float = true;
      const std::string fraction = read_digits();
      if (whole.empty() && fraction.empty()) throw NotPython();
      rest = "." + (fraction.empty() ? "0" : fraction);
    }
    if ((peek() | 0x20) == 'e' && !(whole.empty() && rest.empty())) {
      at_++;
      is_float = true;
      rest += 'e';
      if (peek() == '-' || peek() == '+') rest += text_[at_++];
      const std::string exponent = read_digits();
      if (exponent.empty()) throw NotPython();
      rest += exponent;
    }
    if (whole.empty() && rest.empty()) throw NotPython();
    // JSON has no zeros in front; Python has none in front of whole numbers but zero.
    const size_t first = whole.find_first_not_of('0');
    const bool zero = first == std::string::npos;
    if (!is_float && !zero && first > 0) throw NotPython();
    return (zero ? "0" : whole.substr(first)) + rest;
  }

  bool at_string() const {
    const char c = peek();
    if (c == '"' || c == '\'') return true;
    const char prefix = static_cast<char>(c | 0x20);
    return (prefix == 'r' || prefix == 'u') && (peek(1) == '"' || peek(1) == '\'');
  }

  // One or more that follow each other.
  std::string read_string() {
    std::string all;
    while (at_string()) {
      const bool raw = (peek() | 0x20) == 'r';
      if (is_letter(peek())) at_++;
      read_quoted(raw, &all);
      skip_space();
    }
    return all;
  }

  void read_quoted(bool raw, std::string* out) {
    const char quote = peek();
    const bool three = peek(1) == quote && peek(2) == quote;
    at_ += three ? 3 : 1;
    while (true) {
      if (at_ >= text_.size()) throw NotPython();
      const char c = text_[at_];
      if (c == quote && (!three || (peek(1) == quote && peek(2) == quote))) {
        at_ += three ? 3 : 1;
        return;
      }
      if (c == '\n' && !three) throw NotPython();
      at_++;
      if (c != '\\') {
        *out += c;
      } else if (raw) {
        *out += c;
        if (at_ < text_.size()) *out += text_[at_++];
      } else {
        read_escape(out);
      }
    }
  }

  // What follows a backslash.
  void read_escape(std::string* out) {
    if (at_ >= text_.size()) throw NotPython();
    const char c = text_[at_++];
    constexpr std::string_view kNames = "abfnrtv\\'\"", kValues = "\a\b\f\n\r\t\v\\'\"";
    if (const size_t i = kNames.find(c); i != std::string_view::npos) {
      *out += kValues[i];
    } else if (c == '\n') {  // the line goes on
    } else if (c == 'x') {
      append(read_code(2, 16), out);
    } else if (c == 'u') {
      append(read_code(4, 16), out);
    } else if (c == 'U') {
      append(read_code(8, 16), out);
    } else if (digit_of(c) < 8) {
      at_--;
      append(read_octal(), out);
    } else if (c == 'N') {
      throw NotPython();  // characters by name
    } else {
      out->append("\\").push_back(c);
    }
  }

  char32_t read_code(int n, int base) {
    char32_t code = 0;
    for (int i = 0; i < n; i++, at_++) {
      if (digit_of(peek()) >= base) throw NotPython();
      code = code * static_cast<char32_t>(base) + static_cast<char32_t>(digit_of(peek()));
    }
    return code;
  }
  char32_t read_octal() {
    int n = 1;
    while (n < 3 && digit_of(peek(static_cast<size_t>(n))) < 8) n++;
    return read_code(n, 8);
  }

  void append(char32_t code, std::string* out) {
    if (code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) throw NotPython();
    unicode::append_utf8(code, out);
  }

  std::string_view text_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace

std::optional<std::vector<PythonCall>> read_python_calls(std::string_view text) {
  try {
    return PythonCallReader(text).read_calls();
  } catch (const NotPython&) {
    return std::nullopt;
  }
}

}  // namespace mustafar::text
