// The operands of expressions: names, constants and brackets, and the attributes, calls, filters
// and tests that follow them.
#include "text/jinja/builtins.h"
#include "text/jinja/expression_parser.h"

namespace mustafar::jinja {

// --- names, constants and brackets

ExprPtr ExpressionParser::parse_primary(bool with_namespace) {
  const Token& token = tokens_.peek();
  if (token.is(Token::Type::kName)) return parse_name(with_namespace);
  if (token.is(Token::Type::kString)) return parse_string();
  if (token.is(Token::Type::kNumber)) {
    tokens_.take();
    return constant(token.line, token.value);
  }
  const auto nested = tokens_.nest();
  if (tokens_.at_op("(")) return parse_parenthesized();
  if (tokens_.at_op("[")) return parse_list();
  if (tokens_.at_op("{")) return parse_dict();
  tokens_.error("unexpected '" + describe(token) + "'");
}

ExprPtr ExpressionParser::parse_name(bool with_namespace) {
  const Token& token = tokens_.take();
  const std::string& name = token.text;
  if (name == "true" || name == "True") return constant(token.line, Value(true));
  if (name == "false" || name == "False") return constant(token.line, Value(false));
  if (name == "none" || name == "None") return constant(token.line, Value());
  if (with_namespace && tokens_.skip_op(".")) {
    ExprPtr ref = make(Expr::Kind::kNamespaceRef, token.line, tokens_.expect_identifier());
    ref->symbol = symbol_of(name);
    return ref;
  }
  ExprPtr expr = make(Expr::Kind::kName, token.line, name);
  expr->symbol = symbol_of(name);
  note_name(name, MacroUse::kRead);
  return expr;
}

// Strings that follow each other are one.
ExprPtr ExpressionParser::parse_string() {
  const int line = tokens_.line();
  std::string all;
  while (tokens_.at(Token::Type::kString)) all += tokens_.take().value.bytes();
  return constant(line, Value(Text(all)));
}

// Items with commas between, and perhaps one more behind, up to the closing bracket, which is
// taken.
template <typename Parse>
void ExpressionParser::parse_until(std::string_view close, Parse parse_item) {
  for (bool first = true; !tokens_.at_op(close); first = false) {
    if (!first) tokens_.expect_op(",");
    if (tokens_.at_op(close)) break;
    parse_item();
  }
  tokens_.expect_op(close);
}

ExprPtr ExpressionParser::parse_list() {
  ExprPtr list = make(Expr::Kind::kList, tokens_.line());
  tokens_.expect_op("[");
  parse_until("]", [&] { add_child(*list, parse_expression()); });
  return list;
}

ExprPtr ExpressionParser::parse_dict() {
  ExprPtr dict = make(Expr::Kind::kDict, tokens_.line());
  tokens_.expect_op("{");
  parse_until("}", [&] {
    add_child(*dict, parse_expression());
    tokens_.expect_op(":");
    add_child(*dict, parse_expression());
  });
  return dict;
}

// --- what follows an expression

ExprPtr ExpressionParser::parse_postfix(ExprPtr expr) {
  while (true) {
    if (tokens_.at_op(".")) {
      expr = parse_attribute(std::move(expr));
    } else if (tokens_.at_op("[")) {
      expr = parse_subscript(std::move(expr));
    } else if (tokens_.at_op("(")) {
      expr = parse_call(std::move(expr));
    } else {
      return expr;
    }
  }
}

ExprPtr ExpressionParser::parse_filters_and_tests(ExprPtr expr) {
  while (true) {
    if (tokens_.at_op("|")) {
      expr = parse_filters(std::move(expr));
    } else if (tokens_.at_name("is")) {
      expr = parse_test(std::move(expr));
    } else if (tokens_.at_op("(")) {
      expr = parse_call(std::move(expr));
    } else {
      return expr;
    }
  }
}

// `.name`, or `.0` for an item.
ExprPtr ExpressionParser::parse_attribute(ExprPtr object) {
  const int line = tokens_.line();
  tokens_.expect_op(".");
  const Token& token = tokens_.take();
  if (token.is(Token::Type::kName)) {
    ExprPtr attribute = make(Expr::Kind::kAttribute, line, token.text);
    add_child(*attribute, std::move(object));
    return attribute;
  }
  if (!token.is(Token::Type::kNumber) || !token.value.is_int()) {
    tokens_.error("expected name or number");
  }
  ExprPtr item = make(Expr::Kind::kItem, line);
  add_child(*item, std::move(object));
  add_child(*item, constant(token.line, token.value));
  return item;
}

// `[key]`, `[slice]` or `[key, key, ...]`.
ExprPtr ExpressionParser::parse_subscript(ExprPtr object) {
  const int line = tokens_.line();
  tokens_.expect_op("[");
  std::vector<ExprPtr> keys;
  bool any_slice = false;
  while (!tokens_.at_op("]")) {
    if (!keys.empty()) tokens_.expect_op(",");
    bool is_slice = false;
    keys.push_back(parse_key(&is_slice));
    any_slice = any_slice || is_slice;
  }
  tokens_.expect_op("]");
  if (keys.size() == 1 && any_slice) {
    ExprPtr& slice = keys[0];
    deepen(*slice, object);
    slice->args.insert(slice->args.begin(), std::move(object));
    return std::move(slice);
  }
  ExprPtr item = make(Expr::Kind::kItem, line);
  add_child(*item, std::move(object));
  if (keys.size() == 1) {
    add_child(*item, std::move(keys[0]));
    return item;
  }
  if (any_slice) tokens_.unsupported("a slice beside another subscript");
  ExprPtr tuple = make(Expr::Kind::kTuple, line);
  for (ExprPtr& key : keys) add_child(*tuple, std::move(key));
  add_child(*item, std::move(tuple));
  return item;
}

// An expression, or a slice that still lacks its object, which goes in front of the bounds.
ExprPtr ExpressionParser::parse_key(bool* is_slice) {
  const int line = tokens_.line();
  ExprPtr first;
  if (!tokens_.at_op(":")) {
    first = parse_expression();
    if (!tokens_.at_op(":")) return first;
  }
  *is_slice = true;
  tokens_.expect_op(":");
  ExprPtr slice = make(Expr::Kind::kSlice, line);
  add_child(*slice, std::move(first));
  const auto at_end = [&] { return tokens_.at_op("]") || tokens_.at_op(","); };
  add_child(*slice, tokens_.at_op(":") || at_end() ? nullptr : parse_expression());
  add_child(*slice, tokens_.skip_op(":") && !at_end() ? parse_expression() : nullptr);
  return slice;
}

ExprPtr ExpressionParser::parse_call(ExprPtr callee) {
  ExprPtr call = make(Expr::Kind::kCall, tokens_.line());
  add_child(*call, std::move(callee));
  parse_arguments(*call);
  return call;
}

void ExpressionParser::parse_arguments(Expr& owner) {
  const auto nested = tokens_.nest();
  tokens_.expect_op("(");
  parse_until(")", [&] { parse_argument(owner); });
}

// One argument; positional ones come before keywords, and both before *star and **double_star.
void ExpressionParser::parse_argument(Expr& owner) {
  CallNodes& call = owner.call;
  const auto ensure = [&](bool in_order) {
    if (!in_order) tokens_.error("invalid syntax for function call expression");
  };
  const auto parse_value = [&] {
    ExprPtr value = parse_expression();
    deepen(owner, value);
    return value;
  };
  if (tokens_.skip_op("*")) {
    ensure(!call.star && !call.double_star);
    call.star = parse_value();
  } else if (tokens_.skip_op("**")) {
    ensure(!call.double_star);
    call.double_star = parse_value();
  } else if (tokens_.at(Token::Type::kName) && tokens_.peek(1).is_op("=")) {
    ensure(!call.double_star);
    std::string name = tokens_.take().text;
    tokens_.take();
    for (const auto& [other, value] : call.keyword) {
      if (other == name) tokens_.error("keyword argument repeated: " + name);
    }
    call.keyword.emplace_back(std::move(name), parse_value());
  } else {
    ensure(!call.star && !call.double_star && call.keyword.empty());
    call.positional.push_back(parse_value());
  }
}

// --- filters and tests

std::string ExpressionParser::parse_dotted_name() {
  std::string name = tokens_.expect_identifier();
  while (tokens_.skip_op(".")) name += "." + tokens_.expect_identifier();
  return name;
}

ExprPtr ExpressionParser::parse_filters(ExprPtr expr) {
  while (tokens_.skip_op("|")) expr = parse_filter(std::move(expr));
  return expr;
}

ExprPtr ExpressionParser::parse_filter(ExprPtr expr) {
  const int line = tokens_.line();
  ExprPtr filter = make(Expr::Kind::kFilter, line, parse_dotted_name());
  add_child(*filter, std::move(expr));
  if (tokens_.at_op("(")) parse_arguments(*filter);
  if (!has_filter(filter->text)) note_unknown(line, unknown_filter(filter->text));
  return filter;
}

// Whether what follows the name of a test is its argument without parentheses.
bool ExpressionParser::at_test_argument() const {
  if (tokens_.at(Token::Type::kName)) {
    return !tokens_.at_name("else") && !tokens_.at_name("or") && !tokens_.at_name("and");
  }
  return tokens_.at(Token::Type::kString) || tokens_.at(Token::Type::kNumber) ||
         tokens_.at_op("[") || tokens_.at_op("{");
}

ExprPtr ExpressionParser::parse_test(ExprPtr expr) {
  const int line = tokens_.line();
  tokens_.expect_name("is");
  const bool negated = tokens_.skip_name("not");
  ExprPtr test = make(Expr::Kind::kTest, line, parse_dotted_name());
  add_child(*test, std::move(expr));
  if (tokens_.at_op("(")) {
    parse_arguments(*test);
  } else if (at_test_argument()) {
    if (tokens_.at_name("is")) tokens_.error("You cannot chain multiple tests with is");
    test->call.positional.push_back(parse_postfix(parse_primary(false)));
    deepen(*test, test->call.positional.back());
  }
  if (!has_test(test->text)) note_unknown(line, "No test named '" + test->text + "'");
  if (!negated) return test;
  ExprPtr inverse = make(Expr::Kind::kNot, line);
  add_child(*inverse, std::move(test));
  return inverse;
}

}  // namespace mustafar::jinja
