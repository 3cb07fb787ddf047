// Oniguruma's Ruby syntax, which tokenizer.json is written in, translated to PCRE2's. Where the two
// agree, text passes through; what differs is rewritten (\s \w \b \h \v, POSIX brackets, property
// names, `(?m)`, `{n,m}+`), and what has no equal is refused by name rather than matched
// differently.
#include <array>
#include <cctype>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "mustafar/error.h"
#include "text/regex.h"
#include "text/unicode/utf8.h"

namespace mustafar::text {

namespace {

// Members of a bracket expression. Properties first: a hyphen before them is literal.
constexpr std::string_view kSpace = R"(\p{Z}\t-\r\x{85})";
constexpr std::string_view kWord = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})";
// Outside of brackets Oniguruma's \w and \b also take these Latin-1 numbers for word characters.
constexpr std::string_view kBareWord =
    R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{b2}\x{b3}\x{b9}\x{bc}-\x{be})";
constexpr std::string_view kHex = "0-9A-Fa-f";

using Pair = std::pair<std::string_view, std::string_view>;

constexpr std::array<Pair, 10> kPosixSets{{
    {"alpha", R"(\p{Alphabetic})"},
    {"digit", R"(\p{Nd})"},
    {"alnum", R"(\p{Alphabetic}\p{Nd})"},
    {"upper", R"(\p{Uppercase})"},
    {"lower", R"(\p{Lowercase})"},
    {"space", kSpace},
    {"punct", R"(\p{P}\p{S})"},
    {"xdigit", kHex},
    {"word", kWord},
    {"ascii", R"(\x{0}-\x{7f})"},
}};

// Long names of general categories, lower case without separators.
constexpr std::array<Pair, 37> kCategories{{
    {"letter", "L"},
    {"uppercaseletter", "Lu"},
    {"lowercaseletter", "Ll"},
    {"titlecaseletter", "Lt"},
    {"modifierletter", "Lm"},
    {"otherletter", "Lo"},
    {"mark", "M"},
    {"nonspacingmark", "Mn"},
    {"spacingmark", "Mc"},
    {"enclosingmark", "Me"},
    {"number", "N"},
    {"decimalnumber", "Nd"},
    {"letternumber", "Nl"},
    {"othernumber", "No"},
    {"punctuation", "P"},
    {"connectorpunctuation", "Pc"},
    {"dashpunctuation", "Pd"},
    {"openpunctuation", "Ps"},
    {"closepunctuation", "Pe"},
    {"initialpunctuation", "Pi"},
    {"finalpunctuation", "Pf"},
    {"otherpunctuation", "Po"},
    {"symbol", "S"},
    {"mathsymbol", "Sm"},
    {"currencysymbol", "Sc"},
    {"modifiersymbol", "Sk"},
    {"othersymbol", "So"},
    {"separator", "Z"},
    {"spaceseparator", "Zs"},
    {"lineseparator", "Zl"},
    {"paragraphseparator", "Zp"},
    {"other", "C"},
    {"control", "Cc"},
    {"format", "Cf"},
    {"surrogate", "Cs"},
    {"privateuse", "Co"},
    {"unassigned", "Cn"},
}};

// Yes-or-no properties; every other name is a script.
constexpr std::array<std::string_view, 14> kBinary{
    "alphabetic",   "alpha", "uppercase", "upper",       "lowercase", "lower",
    "whitespace",   "space", "any",       "ideographic", "emoji",     "extendedpictographic",
    "mathematical", "math"};

std::string squeezed(std::string_view name) {
  std::string out;
  for (const char c : name) {
    if (c != '_' && c != '-' && c != ' ') {
      out += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    }
  }
  return out;
}

class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  std::string run() {
    if (!unicode::is_valid_utf8(in_)) refuse("malformed UTF-8");
    while (pos_ < in_.size()) {
      switch (in_[pos_]) {
        case '\\':
          atom_ = out_.size();
          escape(false);
          break;
        case '[':
          atom_ = out_.size();
          bracket();
          break;
        case '(':
          open_group();
          break;
        case ')':
          if (groups_.empty()) refuse("an unmatched ')'");
          atom_ = groups_.back();
          groups_.pop_back();
          copy(1);
          break;
        case '{':
          repeat();
          break;
        case '*':
        case '+':
        case '?':
        case '|':
          copy(1);
          break;
        default:
          atom_ = out_.size();
          copy_character();
      }
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw TokenizerError("pattern " + unicode::in_quotes(in_) + " has " + what + " at byte " +
                         std::to_string(pos_) + ", which is not supported");
  }

  char peek(size_t ahead) const { return pos_ + ahead < in_.size() ? in_[pos_ + ahead] : '\0'; }
  void copy(size_t count) {
    out_.append(in_.substr(pos_, count));
    pos_ += count;
  }
  void copy_character() {
    size_t end = pos_;
    unicode::next_code_point(in_, &end);
    copy(end - pos_);
  }

  void open_group() {
    groups_.push_back(out_.size());
    if (peek(1) == '*') refuse("'(*'");
    if (peek(1) != '?') return copy(1);
    switch (peek(2)) {
      case ':':
      case '=':
      case '!':
      case '>':
        return copy(3);
      case '<':
        if (peek(3) == '=' || peek(3) == '!') return copy(4);
        if (std::isalpha(static_cast<unsigned char>(peek(3)))) return copy(3);
        refuse("a group that starts with '(?<'");
      case '#': {
        const size_t end = in_.find(')', pos_);
        if (end == std::string_view::npos) refuse("an open comment");
        pos_ = end + 1;
        groups_.pop_back();
        return;
      }
      default:
        return options();
    }
  }

  // (?im-im) and (?im-im: ; Ruby's m lets '.' match newlines, which PCRE2 calls s.
  void options() {
    std::string letters;
    size_t i = 2;
    for (; peek(i) == 'i' || peek(i) == 'm' || peek(i) == '-'; i++) {
      letters += peek(i) == 'm' ? 's' : peek(i);
    }
    if (peek(i) != ':' && peek(i) != ')') refuse("a group that starts with '(?'");
    out_ += "(?" + letters;
    pos_ += i;
    if (peek(0) == ':') copy(1);
  }

  // {n}, {n,}, {,m} and {n,m}; a brace that is none of these is a character.
  void repeat() {
    const auto digits = [&](size_t i) {
      size_t n = 0;
      while (std::isdigit(static_cast<unsigned char>(peek(i + n)))) n++;
      return n;
    };
    const size_t low = digits(1);
    const bool comma = peek(1 + low) == ',';
    const size_t high = comma ? digits(2 + low) : 0;
    const size_t length = 1 + low + comma + high + 1;
    if (low + high == 0 || peek(length - 1) != '}') {
      atom_ = out_.size();
      out_ += "\\{";
      pos_++;
      return;
    }
    if (!comma && peek(length) == '?') refuse("'{n}?'");
    const bool nested = peek(length) == '+';  // no possessive form: the repetition is repeated
    if (nested) out_.insert(atom_, "(?:");
    if (low == 0) {
      out_ += "{0";
      pos_++;
      copy(length - 1);
    } else {
      copy(length);
    }
    if (nested) out_ += ')';
  }

  void set(std::string_view members, bool in_bracket, bool negated) {
    if (in_bracket) {
      if (negated) refuse("a negated class inside a bracket expression");
      out_.append(members);
    } else {
      out_.append(negated ? "[^" : "[").append(members).append("]");
    }
    pos_ += 2;
  }

  // At a backslash.
  void escape(bool in_bracket) {
    const char c = peek(1);
    switch (c) {
      case 's':
        return set(kSpace, in_bracket, false);
      case 'S':
        // PCRE2 takes U+180E for a space.
        if (!in_bracket) return set(kSpace, false, true);
        out_ += R"(\S\x{180e})";
        pos_ += 2;
        return;
      case 'w':
      case 'W':
        return set(in_bracket ? kWord : kBareWord, in_bracket, c == 'W');
      case 'h':
      case 'H':
        return set(kHex, in_bracket, c == 'H');
      case 'v':
        out_ += R"(\x{0b})";
        pos_ += 2;
        return;
      case 'd':
      case 'D':
      case 'n':
      case 'r':
      case 't':
      case 'f':
      case 'e':
      case 'a':
        return copy(2);
      case 'p':
      case 'P':
        return property();
      case 'x':
      case 'u':
        return code_point();
      case 'b':
      case 'B':
        if (!in_bracket) return word_boundary(c == 'B');
        if (c == 'b') return copy(2);
        break;
      case 'A':
      case 'z':
      case 'Z':
      case 'R':
      case 'X':
      case 'K':
      case 'k':
        if (!in_bracket) return copy(2);
        break;
      default:
        if (c >= '1' && c <= '9' && !in_bracket) return copy(2);
        if (c == '\0' || std::isalnum(static_cast<unsigned char>(c))) break;
        if (static_cast<unsigned char>(c) < 0x80) return copy(2);
        pos_++;  // an escaped character beyond ASCII is itself
        return copy_character();
    }
    refuse(std::string("'\\") + (c ? std::string(1, c) : "") + "'");
  }

  void word_boundary(bool negated) {
    const std::string w = "[" + std::string(kBareWord) + "]";
    out_ += negated ? "(?:(?<=" + w + ")(?=" + w + ")|(?<!" + w + ")(?!" + w + "))"
                    : "(?:(?<=" + w + ")(?!" + w + ")|(?<!" + w + ")(?=" + w + "))";
    pos_ += 2;
  }

  // \p{Name}, \P{Name}, \p{^Name}
  void property() {
    const size_t end = in_.find('}', pos_);
    if (peek(2) != '{' || end == std::string_view::npos) refuse("'\\p' without a braced name");
    std::string_view name = in_.substr(pos_ + 3, end - pos_ - 3);
    bool negated = peek(1) == 'P';
    if (!name.empty() && name[0] == '^') {
      negated = !negated;
      name.remove_prefix(1);
    }
    const std::string key = squeezed(name);
    std::string spelled;
    for (const auto& [long_name, short_name] : kCategories) {
      if (key == long_name || key == squeezed(short_name)) spelled = short_name;
    }
    for (const std::string_view binary : kBinary) {
      if (key == binary) spelled = key;
    }
    if (spelled.empty()) {
      for (const char c : name) {
        if (!std::isalnum(static_cast<unsigned char>(c)) && c != '_') {
          refuse("the property " + unicode::in_quotes(name));
        }
      }
      spelled = "sc:" + std::string(name);
    }
    out_ += (negated ? "\\P{" : "\\p{") + spelled + "}";
    pos_ = end + 1;
  }

  // \xHH, \x{H...}, \uHHHH
  void code_point() {
    const bool braced = peek(1) == 'x' && peek(2) == '{';
    size_t i = braced ? 3 : 2;
    const size_t first = i;
    const size_t limit = braced ? 8 : (peek(1) == 'u' ? 4 : 2);
    while (i - first < limit && std::isxdigit(static_cast<unsigned char>(peek(i)))) i++;
    const std::string digits(in_.substr(std::min(pos_ + first, in_.size()), i - first));
    if (digits.empty() || (braced && peek(i) != '}') || (peek(1) == 'u' && digits.size() != 4)) {
      refuse("a malformed '\\" + std::string(1, peek(1)) + "'");
    }
    if (peek(1) == 'x' && !braced && std::stoul(digits, nullptr, 16) >= 0x80) {
      refuse("a byte '\\x" + digits + "'");
    }
    out_ += "\\x{" + digits + "}";
    pos_ += i + braced;
  }

  void bracket() {
    copy(1);
    if (peek(0) == '^') copy(1);
    if (peek(0) == ']') {
      out_ += "\\]";
      pos_++;
    }
    while (peek(0) != ']') {
      if (pos_ >= in_.size()) refuse("an open bracket expression");
      if (peek(0) == '\\') {
        escape(true);
      } else if (peek(0) == '[') {
        posix_set();
      } else if (peek(0) == '&' && peek(1) == '&') {
        refuse("'&&' in a bracket expression");
      } else {
        copy_character();
      }
    }
    copy(1);
  }

  void posix_set() {
    const size_t end = in_.find(":]", pos_);
    if (peek(1) == ':' && end != std::string_view::npos) {
      const std::string_view name = in_.substr(pos_ + 2, end - pos_ - 2);
      for (const auto& [posix, members] : kPosixSets) {
        if (name != posix) continue;
        out_.append(members);
        pos_ = end + 2;
        return;
      }
    }
    refuse("'[' in a bracket expression");
  }

  std::string_view in_;
  size_t pos_ = 0;
  std::string out_;
  size_t atom_ = 0;             // where in out_ the last repeatable element starts
  std::vector<size_t> groups_;  // where in out_ the open groups start
};

}  // namespace

std::string translate_pattern(std::string_view pattern) { return Translator(pattern).run(); }

}  // namespace mustafar::text
