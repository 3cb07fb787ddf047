// Splits a template into tokens with jinja2's rules for trim_blocks and lstrip_blocks, both on.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "text/jinja/value.h"

namespace mustafar::jinja {

// A template that does not parse; the message is without the line.
class SyntaxError : public std::runtime_error {
 public:
  SyntaxError(int line, const std::string& message) : std::runtime_error(message), line(line) {}
  int line;
};

struct Token {
  enum class Type {
    kData,           // text between the tags
    kVariableBegin,  // {{
    kVariableEnd,
    kBlockBegin,  // {%
    kBlockEnd,
    kName,
    kString,  // value decoded
    kNumber,  // value set
    kOperator,
    kEnd,
  };
  Type type = Type::kEnd;
  std::string text;
  Value value;
  int line = 1;

  bool is(Type t) const { return type == t; }
  bool is_name(std::string_view s) const { return type == Type::kName && text == s; }
  bool is_op(std::string_view s) const { return type == Type::kOperator && text == s; }
};

std::string describe(const Token& token);  // for error messages

// Throws SyntaxError.
std::vector<Token> tokenize(std::string_view source);

}  // namespace mustafar::jinja
