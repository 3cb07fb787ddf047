// From the tokens of an expression to its tree.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "text/jinja/ast.h"
#include "text/jinja/token_reader.h"

namespace mustafar::jinja {

// Which of the names that a macro may be called with a macro body reads before it writes them.
struct MacroUse {
  enum State { kUnseen, kRead, kWritten };
  State caller = kUnseen, kwargs = kUnseen, varargs = kUnseen;
};

// Every parse_ function starts at the current token, goes on behind what it parses, and throws
// SyntaxError.
class ExpressionParser {
 public:
  explicit ExpressionParser(TokenReader& tokens) : tokens_(tokens) {}

  using Names = std::initializer_list<std::string_view>;

  ExprPtr parse_expression();
  // An expression, or a tuple of them without parentheses, up to the end of the tag or one of the
  // names.
  ExprPtr parse_tuple(Names end_names = {});
  // The same without `a if b else c`, for where an `if` has another meaning.
  ExprPtr parse_tuple_without_condition(Names end_names = {});
  // One filter (name and arguments) on expr, which is null in a filter block.
  ExprPtr parse_filter(ExprPtr expr);
  // Any number of `| filter` on expr, which is null in a set block.
  ExprPtr parse_filters(ExprPtr expr);

  // What is assigned to: a name, a tuple of them or, with_namespace, `namespace.attribute`.
  ExprPtr parse_target(Names end_names, bool with_namespace);
  std::string parse_name_target();

  Symbol symbol_of(const std::string& name);
  std::vector<std::string> take_names() { return std::move(names_); }  // by symbol

  // The uses in what is parsed between the two; macros nest.
  void begin_macro() { macros_.emplace_back(); }
  MacroUse end_macro();
  void note_write(const std::string& name) { note_name(name, MacroUse::kWritten); }

  // In `if` blocks and conditional expressions an unknown filter or test is an error only when it
  // runs, as in jinja2; elsewhere check_known throws it, once the whole template is parsed.
  Scoped<bool> allow_unknown(bool allowed) { return Scoped(allows_unknown_, allowed); }
  void check_known() const {
    if (!unknown_.empty()) throw unknown_[0];
  }

 private:
  ExprPtr make(Expr::Kind kind, int line, std::string text = "");
  ExprPtr constant(int line, Value value);
  void add_child(Expr& parent, ExprPtr child);
  void deepen(Expr& parent, const ExprPtr& child);
  void note_name(const std::string& name, MacroUse::State state);
  void note_unknown(int line, const std::string& message);

  bool at_tuple_end(Names end_names) const;
  template <typename Parse>
  ExprPtr parse_items(Names end_names, bool in_parentheses, Parse parse);
  void check_target(const Expr& target);

  ExprPtr parse_or();
  ExprPtr parse_and();
  ExprPtr parse_not();
  ExprPtr parse_comparison();
  std::string parse_comparison_operator();
  ExprPtr parse_sum();
  ExprPtr parse_concatenation();
  ExprPtr parse_product();
  ExprPtr parse_power();
  ExprPtr parse_unary();
  ExprPtr parse_signed();
  ExprPtr parse_binary(Expr::Kind kind, ExprPtr left, ExprPtr (ExpressionParser::*parse_right)());

  ExprPtr parse_primary(bool with_namespace);
  ExprPtr parse_parenthesized();
  ExprPtr parse_name(bool with_namespace);
  ExprPtr parse_string();
  template <typename Parse>
  void parse_until(std::string_view close, Parse parse_item);
  ExprPtr parse_list();
  ExprPtr parse_dict();

  ExprPtr parse_postfix(ExprPtr expr);
  ExprPtr parse_filters_and_tests(ExprPtr expr);
  ExprPtr parse_attribute(ExprPtr object);
  ExprPtr parse_subscript(ExprPtr object);
  ExprPtr parse_key(bool* is_slice);
  ExprPtr parse_call(ExprPtr callee);
  void parse_arguments(Expr& owner);
  void parse_argument(Expr& owner);
  std::string parse_dotted_name();
  ExprPtr parse_test(ExprPtr expr);
  bool at_test_argument() const;

  TokenReader& tokens_;
  bool allows_unknown_ = false;
  std::vector<SyntaxError> unknown_;  // filters and tests
  std::vector<MacroUse> macros_;      // of the macros around the current token, outermost first
  std::unordered_map<std::string, Symbol> symbols_;
  std::vector<std::string> names_;
};

}  // namespace mustafar::jinja
