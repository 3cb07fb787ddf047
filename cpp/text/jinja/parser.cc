#include "text/jinja/parser.h"

#include <array>
#include <initializer_list>
#include <unordered_map>

#include "text/jinja/builtins.h"

namespace mustafar::jinja {
namespace {

constexpr int kMaxNesting = 100;    // of brackets, unary operators and blocks in the source
constexpr int kMaxExprDepth = 200;  // of the tree, so that long operator chains stay evaluable

class Parser {
 public:
  explicit Parser(std::string_view source) : tokens_(tokenize(source)) {}

  Template run() {
    result_.body = parse_body({});
    if (!unknown_.empty()) throw unknown_[0];
    return std::move(result_);
  }

 private:
  using Type = Token::Type;

  class Nested {
   public:
    explicit Nested(Parser& parser) : parser_(parser) {
      if (++parser_.nesting_ > kMaxNesting) {
        parser_.nesting_--;
        parser_.error(concat("nested deeper than ", kMaxNesting, " levels"));
      }
    }
    ~Nested() { parser_.nesting_--; }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;

   private:
    Parser& parser_;
  };

  // Which of the special names a macro body reads before it writes them.
  struct MacroUse {
    enum State { kUnseen, kRead, kWritten };
    State caller = kUnseen, kwargs = kUnseen, varargs = kUnseen;
  };

  // --- tokens

  const Token& peek(size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  const Token& take() {
    const Token& token = peek();
    if (at_ + 1 < tokens_.size()) at_++;
    return token;
  }
  [[noreturn]] void error(const std::string& message) const {
    throw SyntaxError(peek().line, message);
  }
  [[noreturn]] void unsupported_here(const std::string& what) const {
    error(what + " is not supported by this template engine");
  }
  bool skip_op(std::string_view op) { return peek().is_op(op) ? (take(), true) : false; }
  bool skip_name(std::string_view name) { return peek().is_name(name) ? (take(), true) : false; }
  void expect(Type type, const char* what) {
    if (!peek().is(type)) error(concat("expected ", what, ", got '", describe(peek()), "'"));
    take();
  }
  void expect_op(std::string_view op) {
    if (!skip_op(op)) error(concat("expected '", op, "', got '", describe(peek()), "'"));
  }
  void expect_name(std::string_view name) {
    if (!skip_name(name)) error(concat("expected '", name, "', got '", describe(peek()), "'"));
  }
  std::string expect_identifier() {
    if (!peek().is(Type::kName)) error(concat("expected a name, got '", describe(peek()), "'"));
    return take().text;
  }

  Symbol symbol_of(const std::string& name) {
    const auto [at, inserted] = symbols_.emplace(name, static_cast<Symbol>(result_.names.size()));
    if (inserted) result_.names.push_back(name);
    return at->second;
  }

  ExprPtr make(Expr::Kind kind, int line, std::string text = "") {
    auto expr = std::make_unique<Expr>();
    expr->kind = kind;
    expr->line = line;
    expr->text = std::move(text);
    return expr;
  }

  // Adds a child (null allowed), keeping count of the tree's depth.
  void adopt(Expr& parent, ExprPtr child) {
    deepen(parent, child);
    parent.args.push_back(std::move(child));
  }
  void deepen(Expr& parent, const ExprPtr& child) {
    if (!child) return;
    parent.depth = std::max(parent.depth, child->depth + 1);
    if (parent.depth > kMaxExprDepth) error("an expression is too long to evaluate");
  }

  void note_name(const std::string& name, MacroUse::State state) {
    for (MacroUse& use : macros_) {
      MacroUse::State* slot = name == "caller"    ? &use.caller
                              : name == "kwargs"  ? &use.kwargs
                              : name == "varargs" ? &use.varargs
                                                  : nullptr;
      if (slot && *slot == MacroUse::kUnseen) *slot = state;
    }
  }

  // --- statements

  // Until one of the end tags, which stays the current token (after its block begin).
  Body parse_body(std::initializer_list<std::string_view> end_tags) {
    const Nested nested(*this);
    Body body;
    std::unique_ptr<Stmt> output;
    const auto flush = [&] {
      if (output) body.push_back(std::move(output));
    };
    const auto output_at = [&](int line) -> Stmt& {
      if (!output) {
        output = std::make_unique<Stmt>();
        output->line = line;
      }
      return *output;
    };
    while (!peek().is(Type::kEnd)) {
      if (peek().is(Type::kData)) {
        auto data = make(Expr::Kind::kConst, peek().line);
        data->constant = Value(Text(peek().text));
        output_at(peek().line).exprs.push_back(std::move(data));
        take();
      } else if (peek().is(Type::kVariableBegin)) {
        const int line = peek().line;
        take();
        output_at(line).exprs.push_back(parse_tuple({}));
        expect(Type::kVariableEnd, "end of print statement");
      } else {
        flush();
        expect(Type::kBlockBegin, "begin of statement block");
        for (std::string_view tag : end_tags) {
          if (peek().is_name(tag)) return body;
        }
        body.push_back(parse_statement());
        expect(Type::kBlockEnd, "end of statement block");
      }
    }
    flush();
    if (end_tags.size()) {
      std::string expected;
      for (std::string_view tag : end_tags)
        expected += concat(expected.empty() ? "'" : " or '", tag, "'");
      error("Unexpected end of template, expected " + expected);
    }
    return body;
  }

  // The rest of a tag and its body, up to an end tag, which is taken.
  Body parse_block(std::string_view end_tag) {
    Body body = parse_block_until({end_tag});
    take();
    return body;
  }
  Body parse_block_until(std::initializer_list<std::string_view> end_tags) {
    skip_op(":");
    expect(Type::kBlockEnd, "end of statement block");
    return parse_body(end_tags);
  }

  std::unique_ptr<Stmt> statement(Stmt::Kind kind) {
    auto stmt = std::make_unique<Stmt>();
    stmt->kind = kind;
    stmt->line = peek().line;
    return stmt;
  }

  std::unique_ptr<Stmt> parse_statement() {
    if (!peek().is(Type::kName)) error("tag name expected");
    const std::string& tag = peek().text;
    if (tag == "if") return parse_if();
    if (tag == "for") return parse_for();
    if (tag == "set") return parse_set();
    if (tag == "macro") return parse_macro();
    if (tag == "call") return parse_call_block();
    if (tag == "filter") return parse_filter_block();
    if (tag == "with") return parse_with();
    if (tag == "print") return parse_print();
    if (tag == "generation") return parse_generation();
    if (tag == "break" || tag == "continue") {
      if (!in_loop_) error("'" + tag + "' outside loop");
      auto stmt = statement(tag == "break" ? Stmt::Kind::kBreak : Stmt::Kind::kContinue);
      take();
      return stmt;
    }
    for (const char* name : {"block", "extends", "include", "import", "from", "autoescape"}) {
      if (tag == name) unsupported_here("the tag '" + tag + "'");
    }
    error("Encountered unknown tag '" + tag + "'");
  }

  // In if blocks and conditional expressions an unknown filter or test is an error only when it
  // runs, as in jinja2.
  template <typename Parse>
  auto softly(bool soft, Parse parse) {
    const bool before = soft_;
    soft_ = soft;
    auto result = parse();
    soft_ = before;
    return result;
  }

  std::unique_ptr<Stmt> parse_if() {
    auto stmt = statement(Stmt::Kind::kIf);
    take();
    softly(true, [&] {
      while (true) {
        stmt->exprs.push_back(parse_tuple({}, false));
        stmt->bodies.push_back(parse_block_until({"elif", "else", "endif"}));
        const std::string end = take().text;
        if (end == "elif") continue;
        if (end == "else") stmt->bodies.push_back(parse_block("endif"));
        return 0;
      }
    });
    return stmt;
  }

  std::unique_ptr<Stmt> parse_for() {
    auto stmt = statement(Stmt::Kind::kFor);
    take();
    loop_depth_++;
    stmt->targets.push_back(parse_target({"in"}, false));
    check_loop_target(*stmt->targets[0]);
    expect_name("in");
    stmt->exprs.push_back(parse_tuple({"recursive"}, false));
    softly(false, [&] {
      stmt->exprs.push_back(skip_name("if") ? parse_expression() : nullptr);
      stmt->recursive = skip_name("recursive");
      const bool outer = in_loop_;
      in_loop_ = true;
      stmt->bodies.push_back(parse_block_until({"endfor", "else"}));
      in_loop_ = outer;
      if (take().text == "else") stmt->bodies.push_back(parse_block("endfor"));
      return 0;
    });
    loop_depth_--;
    return stmt;
  }

  void check_loop_target(const Expr& target) {
    if (target.kind == Expr::Kind::kName && target.text == "loop") {
      error("Can't assign to special loop variable in for-loop target");
    }
    for (const ExprPtr& each : target.args) check_loop_target(*each);
  }

  std::unique_ptr<Stmt> parse_set() {
    auto stmt = statement(Stmt::Kind::kSet);
    take();
    stmt->targets.push_back(parse_target({}, true));
    if (loop_depth_) check_loop_target(*stmt->targets[0]);
    if (skip_op("=")) {
      stmt->exprs.push_back(parse_tuple({}));
      return stmt;
    }
    stmt->kind = Stmt::Kind::kSetBlock;
    softly(false, [&] {
      stmt->exprs.push_back(parse_filters(nullptr, false));
      stmt->bodies.push_back(parse_block("endset"));
      return 0;
    });
    return stmt;
  }

  void parse_signature(MacroNode* macro) {
    expect_op("(");
    while (!peek().is_op(")")) {
      if (!macro->params.empty()) expect_op(",");
      const int line = peek().line;
      const std::string name = parse_name_target();
      macro->param_names.push_back(name);
      macro->params.push_back(symbol_of(name));
      if (skip_op("=")) {
        macro->defaults.push_back(parse_expression());
      } else if (!macro->defaults.empty()) {
        throw SyntaxError(line, "non-default argument follows default argument");
      }
    }
    expect_op(")");
    for (size_t i = 0; i < macro->params.size(); i++) {
      for (size_t j = 0; j < i; j++) {
        if (macro->params[i] == macro->params[j]) {
          error("duplicate argument '" + macro->param_names[i] + "' in a macro");
        }
      }
    }
  }

  void parse_macro_body(MacroNode* macro, std::string_view end_tag) {
    macros_.emplace_back();
    const bool outer = in_loop_;
    in_loop_ = false;
    macro->body = softly(false, [&] { return parse_block(end_tag); });
    in_loop_ = outer;
    const MacroUse use = macros_.back();
    macros_.pop_back();
    const auto has_param = [&](std::string_view name) {
      for (const auto& param : macro->param_names) {
        if (param == name) return true;
      }
      return false;
    };
    macro->uses_caller = use.caller == MacroUse::kRead;
    macro->uses_kwargs = use.kwargs == MacroUse::kRead && !has_param("kwargs");
    macro->uses_varargs = use.varargs == MacroUse::kRead && !has_param("varargs");
    if (macro->uses_caller && has_param("caller")) {
      const size_t first_default = macro->params.size() - macro->defaults.size();
      for (size_t i = 0; i < first_default; i++) {
        if (macro->param_names[i] == "caller") {
          error("the special \"caller\" argument must be omitted or be given a default");
        }
      }
    }
  }

  std::unique_ptr<Stmt> parse_macro() {
    auto stmt = statement(Stmt::Kind::kMacro);
    take();
    stmt->macro.line = stmt->line;
    stmt->macro.name = parse_name_target();
    note_name(stmt->macro.name, MacroUse::kWritten);
    stmt->symbol = symbol_of(stmt->macro.name);
    parse_signature(&stmt->macro);
    parse_macro_body(&stmt->macro, "endmacro");
    return stmt;
  }

  std::unique_ptr<Stmt> parse_call_block() {
    auto stmt = statement(Stmt::Kind::kCallBlock);
    take();
    stmt->macro.line = stmt->line;
    if (peek().is_op("(")) parse_signature(&stmt->macro);
    stmt->exprs.push_back(parse_expression());
    if (stmt->exprs[0]->kind != Expr::Kind::kCall) error("expected call");
    parse_macro_body(&stmt->macro, "endcall");
    return stmt;
  }

  std::unique_ptr<Stmt> parse_generation() {
    auto stmt = statement(Stmt::Kind::kGeneration);
    take();
    const bool outer = in_loop_;
    in_loop_ = false;
    softly(false, [&] {
      stmt->bodies.push_back(parse_block("endgeneration"));
      return 0;
    });
    in_loop_ = outer;
    return stmt;
  }

  std::unique_ptr<Stmt> parse_filter_block() {
    auto stmt = statement(Stmt::Kind::kFilterBlock);
    take();
    softly(false, [&] {
      stmt->exprs.push_back(parse_filters(nullptr, true));
      stmt->bodies.push_back(parse_block("endfilter"));
      return 0;
    });
    return stmt;
  }

  std::unique_ptr<Stmt> parse_with() {
    auto stmt = statement(Stmt::Kind::kWith);
    take();
    while (!peek().is(Type::kBlockEnd)) {
      if (!stmt->targets.empty()) expect_op(",");
      stmt->targets.push_back(parse_target({}, false));
      expect_op("=");
      stmt->exprs.push_back(parse_expression());
    }
    softly(false, [&] {
      stmt->bodies.push_back(parse_block("endwith"));
      return 0;
    });
    return stmt;
  }

  std::unique_ptr<Stmt> parse_print() {
    auto stmt = statement(Stmt::Kind::kOutput);
    take();
    while (!peek().is(Type::kBlockEnd)) {
      if (!stmt->exprs.empty()) expect_op(",");
      stmt->exprs.push_back(parse_expression());
    }
    return stmt;
  }

  // --- assignment targets

  std::string parse_name_target() {
    const std::string name = expect_identifier();
    for (const char* constant : {"true", "false", "none", "True", "False", "None"}) {
      if (name == constant) error("can't assign to '" + name + "'");
    }
    return name;
  }

  ExprPtr parse_target(std::initializer_list<std::string_view> end_names, bool with_namespace) {
    ExprPtr target =
        parse_tuple_of(end_names, [&] { return parse_primary(with_namespace); }, false);
    make_target(*target);
    return target;
  }

  void make_target(Expr& target) {
    switch (target.kind) {
      case Expr::Kind::kName:
        note_name(target.text, MacroUse::kWritten);
        return;
      case Expr::Kind::kNamespaceRef:
        return;
      case Expr::Kind::kTuple:
        for (const ExprPtr& each : target.args) make_target(*each);
        return;
      default:
        error("can't assign to this expression");
    }
  }

  // --- expressions

  bool at_tuple_end(std::initializer_list<std::string_view> end_names) const {
    if (peek().is(Type::kVariableEnd) || peek().is(Type::kBlockEnd) || peek().is_op(")"))
      return true;
    for (std::string_view name : end_names) {
      if (peek().is_name(name)) return true;
    }
    return false;
  }

  ExprPtr parse_tuple(std::initializer_list<std::string_view> end_names, bool with_condition = true,
                      bool in_parentheses = false) {
    return parse_tuple_of(
        end_names, [&] { return with_condition ? parse_expression() : parse_or(); },
        in_parentheses);
  }

  template <typename Parse>
  ExprPtr parse_tuple_of(std::initializer_list<std::string_view> end_names, Parse parse,
                         bool in_parentheses) {
    const int line = peek().line;
    std::vector<ExprPtr> args;
    bool is_tuple = false;
    while (true) {
      if (!args.empty()) expect_op(",");
      if (at_tuple_end(end_names)) break;
      args.push_back(parse());
      if (!peek().is_op(",")) break;
      is_tuple = true;
    }
    if (!is_tuple) {
      if (!args.empty()) return std::move(args[0]);
      if (!in_parentheses) error("Expected an expression, got '" + describe(peek()) + "'");
    }
    ExprPtr tuple = make(Expr::Kind::kTuple, line);
    for (ExprPtr& arg : args) adopt(*tuple, std::move(arg));
    return tuple;
  }

  ExprPtr parse_expression() {
    const Nested nested(*this);
    const int line = peek().line;
    const size_t unknown_before = unknown_.size();
    ExprPtr expr = parse_or();
    while (skip_name("if")) {
      ExprPtr condition = make(Expr::Kind::kCondition, line);
      adopt(*condition, parse_or());
      adopt(*condition, std::move(expr));
      adopt(*condition, skip_name("else") ? parse_expression() : nullptr);
      expr = std::move(condition);
      unknown_.erase(unknown_.begin() + unknown_before, unknown_.end());
    }
    return expr;
  }

  ExprPtr parse_or() {
    ExprPtr left = parse_and();
    while (peek().is_name("or")) left = chain(Expr::Kind::kOr, std::move(left), &Parser::parse_and);
    return left;
  }

  ExprPtr parse_and() {
    ExprPtr left = parse_not();
    while (peek().is_name("and"))
      left = chain(Expr::Kind::kAnd, std::move(left), &Parser::parse_not);
    return left;
  }

  // The operator at the current token, and its right side.
  ExprPtr chain(Expr::Kind kind, ExprPtr left, ExprPtr (Parser::*parse_right)()) {
    ExprPtr expr = make(kind, peek().line, peek().text);
    take();
    adopt(*expr, std::move(left));
    adopt(*expr, (this->*parse_right)());
    return expr;
  }

  ExprPtr parse_not() {
    if (!peek().is_name("not")) return parse_compare();
    const Nested nested(*this);
    ExprPtr expr = make(Expr::Kind::kNot, peek().line);
    take();
    adopt(*expr, parse_not());
    return expr;
  }

  ExprPtr parse_compare() {
    const int line = peek().line;
    ExprPtr expr = parse_sum();
    ExprPtr compare;
    while (true) {
      std::string op;
      if (peek().is_name("in")) {
        op = "in";
        take();
      } else if (peek().is_name("not") && peek(1).is_name("in")) {
        op = "not in";
        take();
        take();
      } else {
        for (const char* each : {"==", "!=", "<", "<=", ">", ">="}) {
          if (peek().is_op(each)) op = each;
        }
        if (op.empty()) break;
        take();
      }
      if (!compare) {
        compare = make(Expr::Kind::kCompare, line);
        adopt(*compare, std::move(expr));
      }
      compare->ops.push_back(op);
      adopt(*compare, parse_sum());
    }
    return compare ? std::move(compare) : std::move(expr);
  }

  ExprPtr parse_sum() {
    ExprPtr left = parse_concat();
    while (peek().is_op("+") || peek().is_op("-")) {
      left = chain(Expr::Kind::kBinary, std::move(left), &Parser::parse_concat);
    }
    return left;
  }

  ExprPtr parse_concat() {
    const int line = peek().line;
    ExprPtr first = parse_product();
    if (!peek().is_op("~")) return first;
    ExprPtr expr = make(Expr::Kind::kConcat, line);
    adopt(*expr, std::move(first));
    while (skip_op("~")) adopt(*expr, parse_product());
    return expr;
  }

  ExprPtr parse_product() {
    ExprPtr left = parse_power();
    while (peek().is_op("*") || peek().is_op("/") || peek().is_op("//") || peek().is_op("%")) {
      left = chain(Expr::Kind::kBinary, std::move(left), &Parser::parse_power);
    }
    return left;
  }

  ExprPtr parse_power() {
    ExprPtr left = parse_unary();
    while (peek().is_op("**")) {
      left = chain(Expr::Kind::kBinary, std::move(left), &Parser::parse_unary);
    }
    return left;
  }

  ExprPtr parse_unary() { return parse_filter_chain(parse_postfix(parse_sign())); }

  ExprPtr parse_sign() {
    if (!peek().is_op("-") && !peek().is_op("+")) return parse_primary(false);
    const Nested nested(*this);
    ExprPtr expr = make(Expr::Kind::kUnary, peek().line, peek().text);
    take();
    adopt(*expr, parse_postfix(parse_sign()));
    return expr;
  }

  ExprPtr parse_primary(bool with_namespace) {
    const Token token = peek();
    if (token.is(Type::kName)) {
      take();
      if (token.text == "true" || token.text == "True") return constant(token.line, Value(true));
      if (token.text == "false" || token.text == "False") return constant(token.line, Value(false));
      if (token.text == "none" || token.text == "None") return constant(token.line, Value());
      if (with_namespace && peek().is_op(".")) {
        take();
        ExprPtr ref = make(Expr::Kind::kNamespaceRef, token.line, expect_identifier());
        ref->symbol = symbol_of(token.text);
        return ref;
      }
      ExprPtr name = make(Expr::Kind::kName, token.line, token.text);
      name->symbol = symbol_of(token.text);
      note_name(token.text, MacroUse::kRead);
      return name;
    }
    if (token.is(Type::kString)) {
      std::string all;
      while (peek().is(Type::kString)) all += take().value.bytes();
      return constant(token.line, Value(Text(all)));
    }
    if (token.is(Type::kNumber)) {
      take();
      return constant(token.line, token.value);
    }
    const Nested nested(*this);
    if (skip_op("(")) {
      ExprPtr inner = parse_tuple({}, true, true);
      expect_op(")");
      return inner;
    }
    if (skip_op("[")) {
      ExprPtr list = make(Expr::Kind::kList, token.line);
      while (!peek().is_op("]")) {
        if (!list->args.empty()) expect_op(",");
        if (peek().is_op("]")) break;
        adopt(*list, parse_expression());
      }
      expect_op("]");
      return list;
    }
    if (skip_op("{")) {
      ExprPtr dict = make(Expr::Kind::kDict, token.line);
      while (!peek().is_op("}")) {
        if (!dict->args.empty()) expect_op(",");
        if (peek().is_op("}")) break;
        adopt(*dict, parse_expression());
        expect_op(":");
        adopt(*dict, parse_expression());
      }
      expect_op("}");
      return dict;
    }
    error("unexpected '" + describe(token) + "'");
  }

  ExprPtr constant(int line, Value value) {
    ExprPtr expr = make(Expr::Kind::kConst, line);
    expr->constant = std::move(value);
    return expr;
  }

  ExprPtr parse_postfix(ExprPtr expr) {
    while (true) {
      if (peek().is_op(".") || peek().is_op("[")) {
        expr = parse_subscript(std::move(expr));
      } else if (peek().is_op("(")) {
        expr = parse_call(std::move(expr));
      } else {
        return expr;
      }
    }
  }

  ExprPtr parse_filter_chain(ExprPtr expr) {
    while (true) {
      if (peek().is_op("|")) {
        expr = parse_filters(std::move(expr), false);
      } else if (peek().is_name("is")) {
        expr = parse_test(std::move(expr));
      } else if (peek().is_op("(")) {
        expr = parse_call(std::move(expr));
      } else {
        return expr;
      }
    }
  }

  ExprPtr parse_subscript(ExprPtr object) {
    const int line = peek().line;
    if (skip_op(".")) {
      const Token token = take();
      if (token.is(Type::kName)) {
        ExprPtr attribute = make(Expr::Kind::kAttribute, line, token.text);
        adopt(*attribute, std::move(object));
        return attribute;
      }
      if (!token.is(Type::kNumber) || !token.value.is_int()) error("expected name or number");
      ExprPtr item = make(Expr::Kind::kItem, line);
      adopt(*item, std::move(object));
      adopt(*item, constant(token.line, token.value));
      return item;
    }
    expect_op("[");
    std::vector<ExprPtr> keys;
    std::vector<bool> is_slice;
    while (!peek().is_op("]")) {
      if (!keys.empty()) expect_op(",");
      bool slice = false;
      keys.push_back(parse_subscribed(&slice));
      is_slice.push_back(slice);
    }
    expect_op("]");
    if (keys.size() == 1 && is_slice[0]) {
      ExprPtr& slice = keys[0];
      deepen(*slice, object);
      slice->args.insert(slice->args.begin(), std::move(object));
      return std::move(slice);
    }
    ExprPtr item = make(Expr::Kind::kItem, line);
    adopt(*item, std::move(object));
    if (keys.size() == 1) {
      adopt(*item, std::move(keys[0]));
      return item;
    }
    ExprPtr tuple = make(Expr::Kind::kTuple, line);
    for (size_t i = 0; i < keys.size(); i++) {
      if (is_slice[i]) unsupported_here("a slice beside another subscript");
      adopt(*tuple, std::move(keys[i]));
    }
    adopt(*item, std::move(tuple));
    return item;
  }

  ExprPtr parse_subscribed(bool* is_slice) {
    const int line = peek().line;
    ExprPtr first;
    if (!peek().is_op(":")) {
      first = parse_expression();
      if (!peek().is_op(":")) return first;
    }
    *is_slice = true;
    expect_op(":");
    ExprPtr slice = make(Expr::Kind::kSlice, line);  // the object comes in front later
    adopt(*slice, std::move(first));
    const auto at_end = [&] { return peek().is_op("]") || peek().is_op(","); };
    adopt(*slice, peek().is_op(":") || at_end() ? nullptr : parse_expression());
    adopt(*slice, skip_op(":") && !at_end() ? parse_expression() : nullptr);
    return slice;
  }

  ExprPtr parse_call(ExprPtr callee) {
    ExprPtr call = make(Expr::Kind::kCall, peek().line);
    adopt(*call, std::move(callee));
    parse_arguments(*call);
    return call;
  }

  void parse_arguments(Expr& owner) {
    const Nested nested(*this);
    CallNodes& call = owner.call;
    expect_op("(");
    bool first = true;
    const auto ensure = [&](bool ok) {
      if (!ok) error("invalid syntax for function call expression");
    };
    while (!peek().is_op(")")) {
      if (!first) {
        expect_op(",");
        if (peek().is_op(")")) break;
      }
      first = false;
      if (skip_op("*")) {
        ensure(!call.star && !call.double_star);
        call.star = parse_expression();
        deepen(owner, call.star);
      } else if (skip_op("**")) {
        ensure(!call.double_star);
        call.double_star = parse_expression();
        deepen(owner, call.double_star);
      } else if (peek().is(Type::kName) && peek(1).is_op("=")) {
        ensure(!call.double_star);
        std::string name = take().text;
        take();
        for (const auto& [other, value] : call.keyword) {
          if (other == name) error("keyword argument repeated: " + name);
        }
        call.keyword.emplace_back(std::move(name), parse_expression());
        deepen(owner, call.keyword.back().second);
      } else {
        ensure(!call.star && !call.double_star && call.keyword.empty());
        call.positional.push_back(parse_expression());
        deepen(owner, call.positional.back());
      }
    }
    expect_op(")");
  }

  std::string dotted_name() {
    std::string name = expect_identifier();
    while (skip_op(".")) name += "." + expect_identifier();
    return name;
  }

  // A chain of filters on `expr`; null in a filter or set block.
  ExprPtr parse_filters(ExprPtr expr, bool start_inline) {
    while (peek().is_op("|") || start_inline) {
      if (!start_inline) take();
      start_inline = false;
      const int line = peek().line;
      ExprPtr filter = make(Expr::Kind::kFilter, line, dotted_name());
      adopt(*filter, std::move(expr));
      if (peek().is_op("(")) parse_arguments(*filter);
      if (!soft_ && !has_filter(filter->text)) {
        unknown_.emplace_back(line, unknown_filter(filter->text));
      }
      expr = std::move(filter);
    }
    return expr;
  }

  ExprPtr parse_test(ExprPtr expr) {
    const int line = peek().line;
    take();
    const bool negated = skip_name("not");
    ExprPtr test = make(Expr::Kind::kTest, line, dotted_name());
    adopt(*test, std::move(expr));
    if (peek().is_op("(")) {
      parse_arguments(*test);
    } else if ((peek().is(Type::kName) && !peek().is_name("else") && !peek().is_name("or") &&
                !peek().is_name("and")) ||
               peek().is(Type::kString) || peek().is(Type::kNumber) || peek().is_op("[") ||
               peek().is_op("{")) {
      if (peek().is_name("is")) error("You cannot chain multiple tests with is");
      test->call.positional.push_back(parse_postfix(parse_primary(false)));
      deepen(*test, test->call.positional.back());
    }
    if (!soft_ && !has_test(test->text)) {
      unknown_.emplace_back(line, "No test named '" + test->text + "'");
    }
    if (!negated) return test;
    ExprPtr inverse = make(Expr::Kind::kNot, line);
    adopt(*inverse, std::move(test));
    return inverse;
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int nesting_ = 0;
  bool soft_ = false;  // inside an if: unknown filters are an error only when they run
  std::vector<SyntaxError> unknown_;  // filters and tests, elsewhere
  bool in_loop_ = false;              // break and continue are allowed
  int loop_depth_ = 0;                // enclosing for tags
  std::vector<MacroUse> macros_;
  std::unordered_map<std::string, Symbol> symbols_;
  Template result_;
};

}  // namespace

Template parse_template(std::string_view source) { return Parser(source).run(); }

}  // namespace mustafar::jinja
