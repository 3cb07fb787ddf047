#include "text/jinja/lexer.h"

#include <algorithm>
#include <array>

#include "text/jinja/format.h"
#include "text/unicode/properties.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {
namespace {

std::string normalize_newlines(std::string_view s) {
  std::string out;
  out.reserve(s.size());
  for (size_t i = 0; i < s.size(); i++) {
    if (s[i] == '\r') {
      out.push_back('\n');
      if (i + 1 < s.size() && s[i + 1] == '\n') i++;
    } else {
      out.push_back(s[i]);
    }
  }
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : s_(normalize_newlines(source)) {
    if (!s_.empty() && s_.back() == '\n') s_.pop_back();
  }

  std::vector<Token> run() {
    while (at_ < s_.size()) read_root();
    add(Token::Type::kEnd, "");
    return std::move(tokens_);
  }

 private:
  bool starts(size_t at, std::string_view what) const {
    return s_.compare(at, what.size(), what) == 0;
  }

  size_t skip_space(size_t at) const {
    while (at < s_.size()) {
      size_t next = at;
      if (!unicode::is_space(unicode::next_code_point(s_, &next))) break;
      at = next;
    }
    return at;
  }

  void add(Token::Type type, std::string text, Value value = {}) {
    tokens_.push_back({type, std::move(text), std::move(value), line_});
  }

  // Moves to `end`, counting lines.
  void advance(size_t end) {
    line_ += static_cast<int>(std::count(s_.begin() + at_, s_.begin() + end, '\n'));
    line_starting_ = end > at_ && s_[end - 1] == '\n';
    at_ = end;
  }

  // The text before a tag, shortened as its sign and lstrip_blocks ask.
  void add_data(size_t begin, size_t end, char sign, bool is_variable) {
    if (sign == '-') {
      const Text kept =
          strip(Text(std::string_view(s_).substr(begin, end - begin)), nullptr, false, true);
      end = begin + kept.size();
    } else if (sign != '+' && !is_variable) {
      size_t line_begin = end > begin ? s_.rfind('\n', end - 1) : std::string::npos;
      const bool has_newline = line_begin != std::string::npos && line_begin >= begin;
      line_begin = has_newline ? line_begin + 1 : begin;
      if ((has_newline || line_starting_) && skip_space(line_begin) >= end) end = line_begin;
    }
    if (end > begin) add(Token::Type::kData, s_.substr(begin, end - begin));
  }

  void read_root() {
    size_t tag = at_;
    while (true) {
      tag = s_.find('{', tag);
      if (tag == std::string::npos || tag + 1 >= s_.size()) {
        add(Token::Type::kData, s_.substr(at_));
        advance(s_.size());
        return;
      }
      const char kind = s_[tag + 1];
      if (kind == '%' || kind == '{' || kind == '#') break;
      tag++;
    }
    const char kind = s_[tag + 1];
    size_t inside = tag + 2;
    const char sign =
        inside < s_.size() && (s_[inside] == '-' || s_[inside] == '+') ? s_[inside] : 0;
    if (sign) inside++;
    add_data(at_, tag, sign, kind == '{');
    const size_t raw = kind == '%' ? match_raw(inside) : 0;
    if (raw) {
      advance(raw);
      read_raw();
    } else if (kind == '#') {
      advance(inside);
      read_comment();
    } else {
      advance(tag);
      add(kind == '{' ? Token::Type::kVariableBegin : Token::Type::kBlockBegin, "");
      advance(inside);
      read_tag(kind == '{');
    }
  }

  // Where a raw tag that begins at `inside` ends, or 0.
  size_t match_raw(size_t inside) const {
    size_t at = skip_space(inside);
    if (!starts(at, "raw")) return 0;
    at = skip_space(at + 3);
    if (starts(at, "-%}")) return skip_space(at + 3);
    return starts(at, "%}") ? at + 2 : 0;
  }

  // Where the end tag of a block at `at` (before its sign) ends, or 0; trims one newline.
  size_t match_block_end(size_t at) const {
    if (starts(at, "+%}")) return at + 3;
    if (starts(at, "-%}")) return skip_space(at + 3);
    if (!starts(at, "%}")) return 0;
    return at + 2 < s_.size() && s_[at + 2] == '\n' ? at + 3 : at + 2;
  }

  void read_raw() {
    for (size_t tag = s_.find("{%", at_); tag != std::string::npos; tag = s_.find("{%", tag + 1)) {
      size_t inside = tag + 2;
      const char sign =
          inside < s_.size() && (s_[inside] == '-' || s_[inside] == '+') ? s_[inside] : 0;
      if (sign) inside++;
      inside = skip_space(inside);
      if (!starts(inside, "endraw")) continue;
      const size_t end = match_block_end(skip_space(inside + 6));
      if (!end) continue;
      add_data(at_, tag, sign, false);
      advance(end);
      return;
    }
    throw SyntaxError(line_, "Missing end of raw directive");
  }

  void read_comment() {
    const size_t close = s_.find("#}", at_);
    if (close == std::string::npos) throw SyntaxError(line_, "Missing end of comment tag");
    const char sign = close > at_ ? s_[close - 1] : 0;
    size_t end = close + 2;
    if (sign == '-') {
      end = skip_space(end);
    } else if (sign != '+' && end < s_.size() && s_[end] == '\n') {
      end++;
    }
    advance(end);
  }

  void read_tag(bool is_variable) {
    std::string open;  // brackets to close
    while (true) {
      if (at_ >= s_.size()) return;  // the parser reports what is missing
      if (open.empty()) {
        size_t end = 0;
        if (is_variable) {
          end = starts(at_, "-}}") ? skip_space(at_ + 3) : starts(at_, "}}") ? at_ + 2 : 0;
        } else {
          end = match_block_end(at_);
        }
        if (end) {
          add(is_variable ? Token::Type::kVariableEnd : Token::Type::kBlockEnd, "");
          advance(end);
          return;
        }
      }
      read_token(&open);
    }
  }

  void read_token(std::string* open) {
    const size_t space = skip_space(at_);
    if (space > at_) return advance(space);
    const char c = s_[at_];
    if (c >= '0' && c <= '9') return read_number();
    size_t end = at_;
    while (end < s_.size()) {
      size_t next = end;
      const char32_t code = unicode::next_code_point(s_, &next);
      if (!unicode::is_alnum(code) && code != '_') break;
      end = next;
    }
    if (end > at_) {
      add(Token::Type::kName, s_.substr(at_, end - at_));
      return advance(end);
    }
    if (c == '"' || c == '\'') return read_string(c);
    read_operator(open);
  }

  // Digits with single underscores between them from `at`; returns the end.
  size_t match_digits(size_t at) const {
    const auto digit = [&](size_t i) { return i < s_.size() && s_[i] >= '0' && s_[i] <= '9'; };
    while (digit(at) || (at < s_.size() && s_[at] == '_' && digit(at - 1) && digit(at + 1))) at++;
    return at;
  }

  void read_number() {
    const auto at_char = [&](size_t i) { return i < s_.size() ? s_[i] : '\0'; };
    const auto digit = [&](size_t i) { return at_char(i) >= '0' && at_char(i) <= '9'; };
    const size_t whole = match_digits(at_);
    size_t end = whole;
    bool is_float = false;
    if (at_ == 0 || s_[at_ - 1] != '.') {
      if (at_char(end) == '.' && digit(end + 1)) {
        end = match_digits(end + 1);
        is_float = true;
      }
      if (at_char(end) == 'e' || at_char(end) == 'E') {
        const size_t sign = at_char(end + 1) == '+' || at_char(end + 1) == '-' ? 1 : 0;
        if (digit(end + 1 + sign)) {
          end = match_digits(end + 1 + sign);
          is_float = true;
        }
      }
    }
    if (!is_float) end = match_integer(whole);
    std::string text = s_.substr(at_, end - at_);
    text.erase(std::remove(text.begin(), text.end(), '_'), text.end());
    Value value;
    if (is_float) {
      value = Value(*parse_float(text));
    } else {
      try {
        const auto number = parse_int(text, 0);
        value = Value(number ? *number : int64_t{0});
      } catch (const EvalError& e) {
        throw SyntaxError(line_, e.what());
      }
    }
    add(Token::Type::kNumber, text, value);
    advance(end);
  }

  size_t match_integer(size_t decimal_end) const {
    if (s_[at_] != '0') return decimal_end;
    const char kind = at_ + 1 < s_.size() ? static_cast<char>(s_[at_ + 1] | 0x20) : 0;
    const auto matches = [&](size_t i) {
      const char c = i < s_.size() ? s_[i] : '\0';
      if (kind == 'b') return c == '0' || c == '1';
      if (kind == 'o') return c >= '0' && c <= '7';
      return (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'f');
    };
    if (kind == 'b' || kind == 'o' || kind == 'x') {
      size_t at = at_ + 2;
      while (matches(at) || (at < s_.size() && s_[at] == '_' && matches(at + 1))) at++;
      if (at > at_ + 2) return at;
    }
    size_t at = at_ + 1;  // zeros only
    while (at < s_.size() &&
           (s_[at] == '0' || (s_[at] == '_' && at + 1 < s_.size() && s_[at + 1] == '0'))) {
      at++;
    }
    return at;
  }

  void read_string(char quote) {
    size_t end = at_ + 1;
    while (end < s_.size() && s_[end] != quote) end += s_[end] == '\\' ? 2 : 1;
    if (end >= s_.size()) throw SyntaxError(line_, "unexpected char: a string is not closed");
    const std::string body = s_.substr(at_ + 1, end - at_ - 1);
    add(Token::Type::kString, "", Value(Text(unescape(body))));
    advance(end + 1);
  }

  std::string unescape(const std::string& body) const {
    std::string out;
    for (size_t i = 0; i < body.size();) {
      if (body[i] != '\\') {
        out.push_back(body[i++]);
        continue;
      }
      i++;
      const char c = body[i];
      const std::string_view plain = "\\'\"abfnrtv";
      const std::string_view decoded = "\\'\"\a\b\f\n\r\t\v";
      if (c == '\n') {
        i++;
      } else if (plain.find(c) != std::string_view::npos) {
        out.push_back(decoded[plain.find(c)]);
        i++;
      } else if (c >= '0' && c <= '7') {
        char32_t code = 0;
        for (int k = 0; k < 3 && i < body.size() && body[i] >= '0' && body[i] <= '7'; k++) {
          code = code * 8 + static_cast<char32_t>(body[i++] - '0');
        }
        unicode::append_utf8(code, &out);
      } else if (c == 'x' || c == 'u' || c == 'U') {
        unicode::append_utf8(read_hex(body, i + 1, c == 'x' ? 2 : c == 'u' ? 4 : 8), &out);
        i += c == 'x' ? 3 : c == 'u' ? 5 : 9;
      } else if (c == 'N') {
        throw SyntaxError(line_, "the escape \\N{...} is not supported by this template engine");
      } else if (static_cast<uint8_t>(c) < 0x80) {
        out.push_back('\\');
        out.push_back(c);
        i++;
      } else {
        // Python escapes the character first, and then reads the doubled backslash.
        out += escape_character(unicode::next_code_point(body, &i));
      }
    }
    return out;
  }

  char32_t read_hex(const std::string& body, size_t at, size_t digits) const {
    if (at + digits > body.size()) throw SyntaxError(line_, "truncated escape in a string");
    char32_t code = 0;
    for (size_t i = at; i < at + digits; i++) {
      const int digit = unicode::digit_value(body[i]);
      if (digit < 0 || digit >= 16) throw SyntaxError(line_, "truncated escape in a string");
      code = code << 4 | static_cast<char32_t>(digit);
    }
    if (code > 0x10ffff) throw SyntaxError(line_, "illegal Unicode character in a string");
    if (code >= 0xd800 && code < 0xe000) {
      throw SyntaxError(line_,
                        "a lone surrogate in a string is not supported by this template engine");
    }
    return code;
  }

  void read_operator(std::string* open) {
    static constexpr std::array<std::string_view, 6> kDouble = {"//", "**", "==", "!=", ">=", "<="};
    for (std::string_view op : kDouble) {
      if (starts(at_, op)) {
        add(Token::Type::kOperator, std::string(op));
        return advance(at_ + 2);
      }
    }
    const char c = s_[at_];
    if (std::string_view("+-/*%~[](){}><=.:|,;").find(c) == std::string_view::npos) {
      size_t end = at_;
      unicode::next_code_point(s_, &end);
      throw SyntaxError(line_, "unexpected char '" + s_.substr(at_, end - at_) + "'");
    }
    if (c == '(' || c == '[' || c == '{') open->push_back(c == '(' ? ')' : c == '[' ? ']' : '}');
    if (c == ')' || c == ']' || c == '}') {
      if (open->empty()) throw SyntaxError(line_, std::string("unexpected '") + c + "'");
      if (open->back() != c) {
        throw SyntaxError(line_,
                          std::string("unexpected '") + c + "', expected '" + open->back() + "'");
      }
      open->pop_back();
    }
    add(Token::Type::kOperator, std::string(1, c));
    advance(at_ + 1);
  }

  std::string s_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::string describe(const Token& token) {
  switch (token.type) {
    case Token::Type::kData:
      return "template text";
    case Token::Type::kVariableBegin:
      return "begin of print statement";
    case Token::Type::kVariableEnd:
      return "end of print statement";
    case Token::Type::kBlockBegin:
      return "begin of statement block";
    case Token::Type::kBlockEnd:
      return "end of statement block";
    case Token::Type::kString:
      return "string";
    case Token::Type::kEnd:
      return "end of template";
    default:
      return token.text;
  }
}

std::vector<Token> tokenize(std::string_view source) {
  if (!unicode::is_valid_utf8(source)) throw SyntaxError(1, "the template is not valid UTF-8");
  return Lexer(source).run();
}

}  // namespace mustafar::jinja
