// Nodes, assignment targets, tuples and operators. What operators apply to is in operand_parser.cc.
#include "text/jinja/expression_parser.h"

#include <algorithm>

namespace mustafar::jinja {

namespace {

constexpr int kMaxExprDepth = 200;  // of the tree, so that long operator chains stay evaluable

bool is_one_of(const Token& token, std::initializer_list<std::string_view> operators) {
  return token.is(Token::Type::kOperator) &&
         std::find(operators.begin(), operators.end(), token.text) != operators.end();
}

}  // namespace

// --- nodes and names

ExprPtr ExpressionParser::make(Expr::Kind kind, int line, std::string text) {
  auto expr = std::make_unique<Expr>();
  expr->kind = kind;
  expr->line = line;
  expr->text = std::move(text);
  return expr;
}

ExprPtr ExpressionParser::constant(int line, Value value) {
  ExprPtr expr = make(Expr::Kind::kConst, line);
  expr->constant = std::move(value);
  return expr;
}

// child: may be null.
void ExpressionParser::add_child(Expr& parent, ExprPtr child) {
  deepen(parent, child);
  parent.args.push_back(std::move(child));
}

// Keeps count of the depth of a tree that a child (null allowed) is added to.
void ExpressionParser::deepen(Expr& parent, const ExprPtr& child) {
  if (!child) return;
  parent.depth = std::max(parent.depth, child->depth + 1);
  if (parent.depth > kMaxExprDepth) tokens_.error("an expression is too long to evaluate");
}

Symbol ExpressionParser::symbol_of(const std::string& name) {
  const auto [at, inserted] = symbols_.emplace(name, static_cast<Symbol>(names_.size()));
  if (inserted) names_.push_back(name);
  return at->second;
}

void ExpressionParser::note_name(const std::string& name, MacroUse::State state) {
  for (MacroUse& use : macros_) {
    MacroUse::State* slot = name == "caller"    ? &use.caller
                            : name == "kwargs"  ? &use.kwargs
                            : name == "varargs" ? &use.varargs
                                                : nullptr;
    if (slot && *slot == MacroUse::kUnseen) *slot = state;
  }
}

MacroUse ExpressionParser::end_macro() {
  const MacroUse use = macros_.back();
  macros_.pop_back();
  return use;
}

void ExpressionParser::note_unknown(int line, const std::string& message) {
  if (!allows_unknown_) unknown_.emplace_back(line, message);
}

// --- assignment targets

std::string ExpressionParser::parse_name_target() {
  const std::string name = tokens_.expect_identifier();
  for (const char* constant : {"true", "false", "none", "True", "False", "None"}) {
    if (name == constant) tokens_.error("can't assign to '" + name + "'");
  }
  return name;
}

ExprPtr ExpressionParser::parse_target(Names end_names, bool with_namespace) {
  ExprPtr target = parse_items(end_names, false, [&] { return parse_primary(with_namespace); });
  check_target(*target);
  return target;
}

void ExpressionParser::check_target(const Expr& target) {
  switch (target.kind) {
    case Expr::Kind::kName:
      note_write(target.text);
      return;
    case Expr::Kind::kNamespaceRef:
      return;
    case Expr::Kind::kTuple:
      for (const ExprPtr& each : target.args) check_target(*each);
      return;
    default:
      tokens_.error("can't assign to this expression");
  }
}

// --- tuples and conditions

bool ExpressionParser::at_tuple_end(Names end_names) const {
  if (tokens_.at(Token::Type::kVariableEnd) || tokens_.at(Token::Type::kBlockEnd) ||
      tokens_.at_op(")")) {
    return true;
  }
  return std::any_of(end_names.begin(), end_names.end(),
                     [&](std::string_view name) { return tokens_.at_name(name); });
}

ExprPtr ExpressionParser::parse_tuple(Names end_names) {
  return parse_items(end_names, false, [&] { return parse_expression(); });
}

ExprPtr ExpressionParser::parse_tuple_without_condition(Names end_names) {
  return parse_items(end_names, false, [&] { return parse_or(); });
}

ExprPtr ExpressionParser::parse_parenthesized() {
  tokens_.expect_op("(");
  ExprPtr inner = parse_items({}, true, [&] { return parse_expression(); });
  tokens_.expect_op(")");
  return inner;
}

// What `parse` parses, with commas between; only in parentheses may that be nothing.
template <typename Parse>
ExprPtr ExpressionParser::parse_items(Names end_names, bool in_parentheses, Parse parse) {
  const int line = tokens_.line();
  std::vector<ExprPtr> items;
  bool is_tuple = false;
  while (true) {
    if (!items.empty()) tokens_.expect_op(",");
    if (at_tuple_end(end_names)) break;
    items.push_back(parse());
    if (!tokens_.at_op(",")) break;
    is_tuple = true;
  }
  if (!is_tuple) {
    if (!items.empty()) return std::move(items[0]);
    if (!in_parentheses) {
      tokens_.error("Expected an expression, got '" + describe(tokens_.peek()) + "'");
    }
  }
  ExprPtr tuple = make(Expr::Kind::kTuple, line);
  for (ExprPtr& item : items) add_child(*tuple, std::move(item));
  return tuple;
}

ExprPtr ExpressionParser::parse_expression() {
  const auto nested = tokens_.nest();
  const int line = tokens_.line();
  const size_t unknown_before = unknown_.size();
  ExprPtr expr = parse_or();
  while (tokens_.skip_name("if")) {
    ExprPtr condition = make(Expr::Kind::kCondition, line);
    add_child(*condition, parse_or());
    add_child(*condition, std::move(expr));
    add_child(*condition, tokens_.skip_name("else") ? parse_expression() : nullptr);
    expr = std::move(condition);
    unknown_.erase(unknown_.begin() + unknown_before, unknown_.end());
  }
  return expr;
}

// --- operators, the loosest first

// The operator at the current token, and its right side.
ExprPtr ExpressionParser::parse_binary(Expr::Kind kind, ExprPtr left,
                                       ExprPtr (ExpressionParser::*parse_right)()) {
  ExprPtr expr = make(kind, tokens_.line(), tokens_.peek().text);
  tokens_.take();
  add_child(*expr, std::move(left));
  add_child(*expr, (this->*parse_right)());
  return expr;
}

ExprPtr ExpressionParser::parse_or() {
  ExprPtr left = parse_and();
  while (tokens_.at_name("or")) {
    left = parse_binary(Expr::Kind::kOr, std::move(left), &ExpressionParser::parse_and);
  }
  return left;
}

ExprPtr ExpressionParser::parse_and() {
  ExprPtr left = parse_not();
  while (tokens_.at_name("and")) {
    left = parse_binary(Expr::Kind::kAnd, std::move(left), &ExpressionParser::parse_not);
  }
  return left;
}

ExprPtr ExpressionParser::parse_not() {
  if (!tokens_.at_name("not")) return parse_comparison();
  const auto nested = tokens_.nest();
  ExprPtr expr = make(Expr::Kind::kNot, tokens_.line());
  tokens_.take();
  add_child(*expr, parse_not());
  return expr;
}

ExprPtr ExpressionParser::parse_comparison() {
  const int line = tokens_.line();
  ExprPtr first = parse_sum();
  std::string op = parse_comparison_operator();
  if (op.empty()) return first;
  ExprPtr comparison = make(Expr::Kind::kCompare, line);
  add_child(*comparison, std::move(first));
  for (; !op.empty(); op = parse_comparison_operator()) {
    comparison->ops.push_back(op);
    add_child(*comparison, parse_sum());
  }
  return comparison;
}

// Empty where there is none.
std::string ExpressionParser::parse_comparison_operator() {
  if (is_one_of(tokens_.peek(), {"==", "!=", "<", "<=", ">", ">="})) return tokens_.take().text;
  if (tokens_.skip_name("in")) return "in";
  if (tokens_.at_name("not") && tokens_.peek(1).is_name("in")) {
    tokens_.take();
    tokens_.take();
    return "not in";
  }
  return "";
}

ExprPtr ExpressionParser::parse_sum() {
  ExprPtr left = parse_concatenation();
  while (is_one_of(tokens_.peek(), {"+", "-"})) {
    left =
        parse_binary(Expr::Kind::kBinary, std::move(left), &ExpressionParser::parse_concatenation);
  }
  return left;
}

ExprPtr ExpressionParser::parse_concatenation() {
  const int line = tokens_.line();
  ExprPtr first = parse_product();
  if (!tokens_.at_op("~")) return first;
  ExprPtr expr = make(Expr::Kind::kConcat, line);
  add_child(*expr, std::move(first));
  while (tokens_.skip_op("~")) add_child(*expr, parse_product());
  return expr;
}

ExprPtr ExpressionParser::parse_product() {
  ExprPtr left = parse_power();
  while (is_one_of(tokens_.peek(), {"*", "/", "//", "%"})) {
    left = parse_binary(Expr::Kind::kBinary, std::move(left), &ExpressionParser::parse_power);
  }
  return left;
}

ExprPtr ExpressionParser::parse_power() {
  ExprPtr left = parse_unary();
  while (tokens_.at_op("**")) {
    left = parse_binary(Expr::Kind::kBinary, std::move(left), &ExpressionParser::parse_unary);
  }
  return left;
}

ExprPtr ExpressionParser::parse_unary() {
  return parse_filters_and_tests(parse_postfix(parse_signed()));
}

ExprPtr ExpressionParser::parse_signed() {
  if (!is_one_of(tokens_.peek(), {"-", "+"})) return parse_primary(false);
  const auto nested = tokens_.nest();
  ExprPtr expr = make(Expr::Kind::kUnary, tokens_.line(), tokens_.peek().text);
  tokens_.take();
  add_child(*expr, parse_postfix(parse_signed()));
  return expr;
}

}  // namespace mustafar::jinja
