// The tokens of a template, one after another, for the parsers of statements and expressions.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "text/jinja/errors.h"
#include "text/jinja/lexer.h"
#include "text/jinja/scoped.h"

namespace mustafar::jinja {

class TokenReader {
 public:
  explicit TokenReader(std::string_view source) : tokens_(tokenize(source)) {}

  const Token& peek(size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  int line() const { return peek().line; }
  bool at(Token::Type type) const { return peek().is(type); }
  bool at_op(std::string_view op) const { return peek().is_op(op); }
  bool at_name(std::string_view name) const { return peek().is_name(name); }

  // The current token; goes on to the next, except at the end of the template.
  const Token& take() {
    const Token& token = peek();
    if (at_ + 1 < tokens_.size()) at_++;
    return token;
  }
  bool skip_op(std::string_view op) {
    const bool found = at_op(op);
    if (found) take();
    return found;
  }
  bool skip_name(std::string_view name) {
    const bool found = at_name(name);
    if (found) take();
    return found;
  }

  // Each takes what it names, or throws SyntaxError.
  void expect(Token::Type type, const char* what) {
    if (!at(type)) unexpected(what);
    take();
  }
  void expect_op(std::string_view op) {
    if (!skip_op(op)) unexpected(concat("'", op, "'"));
  }
  void expect_name(std::string_view name) {
    if (!skip_name(name)) unexpected(concat("'", name, "'"));
  }
  std::string expect_identifier() {
    if (!at(Token::Type::kName)) unexpected("a name");
    return take().text;
  }

  // One level of brackets, unary operators or blocks more, as long as the result lives.
  Scoped<int> nest() {
    if (nesting_ == kMaxNesting) error(concat("nested deeper than ", kMaxNesting, " levels"));
    return Scoped(nesting_, nesting_ + 1);
  }

  // Throw SyntaxError at the current token.
  [[noreturn]] void error(const std::string& message) const { throw SyntaxError(line(), message); }
  [[noreturn]] void unsupported(const std::string& what) const {
    error(what + " is not supported by this template engine");
  }

 private:
  static constexpr int kMaxNesting = 100;

  [[noreturn]] void unexpected(const std::string& expected) const {
    error(concat("expected ", expected, ", got '", describe(peek()), "'"));
  }

  std::vector<Token> tokens_;  // the last is the end of the template
  size_t at_ = 0;
  int nesting_ = 0;
};

}  // namespace mustafar::jinja
