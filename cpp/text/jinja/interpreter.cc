#include "text/jinja/interpreter.h"

#include <algorithm>

#include "text/jinja/builtins.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {
namespace {

// The `loop` variable.
struct Loop : Object {
  Loop(const Stmt& stmt, Scope& scope, int depth) : stmt(stmt), scope(scope), depth0(depth) {}

  std::string type_name() const override { return "LoopContext"; }
  bool callable() const override { return true; }
  std::optional<int64_t> length() override { return count(); }
  bool truthy() override { return count() != 0; }

  Text repr(Interpreter&) override {
    return Text(concat("<LoopContext ", index0 + 1, "/", count(), ">"));
  }

  bool advance(Value* out) {
    Value value;
    if (!ahead.empty()) {
      value = ahead.front();
      ahead.erase(ahead.begin());
    } else if (!iterator->next(&value)) {
      return false;
    }
    index0++;
    before = current;
    current = value;
    *out = value;
    return true;
  }

  bool peek() {
    Value value;
    if (ahead.empty() && iterator->next(&value)) ahead.push_back(value);
    return !ahead.empty();
  }

  int64_t count() {
    if (!known_length) {
      Value value;
      while (iterator->next(&value)) ahead.push_back(value);
      known_length = index0 + 1 + static_cast<int64_t>(ahead.size());
    }
    return *known_length;
  }

  std::optional<Value> attribute(Interpreter& in, const std::string& name) override;

  Value call(Interpreter& in, CallArgs& args) override {
    const Arguments a("loop", args, {"iterable"}, 1);
    if (!stmt.recursive)
      fail("The loop must have the 'recursive' marker to be called recursively.");
    return Value(in.run_loop(stmt, scope, *a[0], depth0 + 1));
  }

  void release() override {
    iterator.reset();
    ahead.clear();
    current = before = Value();
    last_changed.reset();
  }

  const Stmt& stmt;
  Scope& scope;  // where the for tag stands
  int depth0;
  std::unique_ptr<Iterator> iterator;
  std::optional<int64_t> known_length;
  std::vector<Value> ahead;  // taken from the iterator before their turn
  int64_t index0 = -1;
  Value current, before;
  std::optional<Value> last_changed;
};

struct LoopMethod : Object {
  LoopMethod(Loop& loop, bool cycle) : loop(loop), cycle(cycle) {}
  std::string type_name() const override { return "method"; }
  bool callable() const override { return true; }
  Value call(Interpreter& in, CallArgs& args) override {
    if (!args.keyword.empty())
      fail("loop.", cycle ? "cycle" : "changed", "() takes no keyword arguments");
    if (cycle) {
      if (args.positional.empty()) fail("no items for cycling given");
      return args.positional[loop.index0 % static_cast<int64_t>(args.positional.size())];
    }
    Value now = Value::list(args.positional, true);
    const bool changed = !loop.last_changed || !equal(*loop.last_changed, now, in.budget());
    if (changed) loop.last_changed = now;
    return Value(changed);
  }
  Loop& loop;
  bool cycle;
};

std::optional<Value> Loop::attribute(Interpreter& in, const std::string& name) {
  if (name == "index0") return Value(index0);
  if (name == "index") return Value(index0 + 1);
  if (name == "revindex0") return Value(count() - index0 - 1);
  if (name == "revindex") return Value(count() - index0);
  if (name == "first") return Value(index0 == 0);
  if (name == "last") return Value(!peek());
  if (name == "length") return Value(count());
  if (name == "depth0") return Value(int64_t{depth0});
  if (name == "depth") return Value(int64_t{depth0 + 1});
  if (name == "previtem") {
    return index0 == 0 ? Value::undefined("there is no previous item") : before;
  }
  if (name == "nextitem") {
    return peek() ? ahead.front() : Value::undefined("there is no next item");
  }
  if (name == "cycle" || name == "changed") {
    return in.keep(std::make_shared<LoopMethod>(*this, name == "cycle"));
  }
  return std::nullopt;
}

struct Macro : Object {
  Macro(const MacroNode& node, Scope* closure) : node(node), closure(closure) {}
  std::string type_name() const override { return "Macro"; }
  bool callable() const override { return true; }
  Text repr(Interpreter&) override {
    if (node.name.empty()) return Text("<Macro anonymous>");
    return Text("<Macro '" + node.name + "'>");
  }
  std::optional<Value> attribute(Interpreter&, const std::string& name) override {
    if (name == "name") return node.name.empty() ? Value() : Value(std::string_view(node.name));
    if (name == "catch_kwargs") return Value(node.uses_kwargs);
    if (name == "catch_varargs") return Value(node.uses_varargs);
    if (name == "caller") return Value(node.uses_caller);
    if (name == "arguments") {
      std::vector<Value> names;
      for (const auto& each : node.param_names) names.emplace_back(std::string_view(each));
      return Value::list(std::move(names), true);
    }
    return std::nullopt;
  }
  Value call(Interpreter& in, CallArgs& args) override {
    return in.call_macro(node, closure, args);
  }

  const MacroNode& node;
  Scope* closure;
};

// Keeps the items for which the condition of a for tag holds.
struct FilteredIterator : Iterator {
  bool next(Value* out) override {
    while (inner->next(out)) {
      if (keep(*out)) return true;
    }
    return false;
  }
  std::unique_ptr<Iterator> inner;
  std::function<bool(const Value&)> keep;
};

std::string quoted(const std::string& s) { return repr_text(Text(s)).bytes; }

bool is_hashable(const Value& value) {
  if (value.is_dict()) return false;
  if (!value.is_list()) return true;
  return value.is_tuple() && std::all_of(value.items().begin(), value.items().end(), is_hashable);
}

std::string object_description(const Value& value) {
  if (value.is_none()) return "None";
  return type_name(value) + " object";
}

}  // namespace

const Value* Scope::find(Symbol symbol) const {
  for (const Scope* scope = this; scope; scope = scope->parent) {
    for (const auto& [name, value] : scope->variables) {
      if (name == symbol) return &value;
    }
  }
  return nullptr;
}

void Scope::set(Symbol symbol, Value value) {
  for (auto& [name, old] : variables) {
    if (name == symbol) {
      old = std::move(value);
      return;
    }
  }
  variables.emplace_back(symbol, std::move(value));
}

Interpreter::Interpreter(const Template& source, const RenderInput& input, Budget budget)
    : template_(source), input_(input), budget_(budget) {
  for (const auto& [name, value] : input.variables) context_.insert_or_assign(name, value);
}

Interpreter::~Interpreter() {
  for (auto& scope : scopes_) scope->variables.clear();
  for (auto& object : objects_) object->release();
}

Text Interpreter::render() {
  Text out;
  run(template_.body, new_scope(nullptr), &out);
  return out;
}

Scope& Interpreter::new_scope(Scope* parent) {
  scopes_.push_back(std::make_unique<Scope>());
  scopes_.back()->parent = parent;
  return *scopes_.back();
}

// --- statements

Interpreter::Flow Interpreter::run(const Body& body, Scope& scope, Text* out) {
  const DepthGuard guard(budget_);
  for (const auto& stmt : body) {
    const Flow flow = run_statement(*stmt, scope, out);
    if (flow != Flow::kNext) return flow;
  }
  return Flow::kNext;
}

Interpreter::Flow Interpreter::run_statement(const Stmt& stmt, Scope& scope, Text* out) {
  budget_.charge(1);
  line_ = stmt.line;
  switch (stmt.kind) {
    case Stmt::Kind::kOutput:
      for (const ExprPtr& expr : stmt.exprs) write(evaluate(*expr, scope), out);
      return Flow::kNext;
    case Stmt::Kind::kIf:
      return run_if(stmt, scope, out);
    case Stmt::Kind::kFor: {
      const Value iterable = evaluate(*stmt.exprs[0], scope);
      if (stmt.recursive) {
        write(Value(run_loop(stmt, scope, iterable, 0)), out);
      } else {
        run_for(stmt, scope, iterable, 0, out);
      }
      return Flow::kNext;
    }
    case Stmt::Kind::kSet: {
      check_namespaces(*stmt.targets[0], scope);
      assign(*stmt.targets[0], evaluate(*stmt.exprs[0], scope), scope, scope);
      return Flow::kNext;
    }
    case Stmt::Kind::kSetBlock:
      return run_set_block(stmt, scope);
    case Stmt::Kind::kMacro:
      scope.set(stmt.symbol, make_macro(stmt.macro, scope));
      return Flow::kNext;
    case Stmt::Kind::kCallBlock:
      run_call_block(stmt, scope, out);
      return Flow::kNext;
    case Stmt::Kind::kFilterBlock: {
      Scope& inner = new_scope(&scope);
      Text captured;
      const Flow flow = run(stmt.bodies[0], inner, &captured);
      if (flow != Flow::kNext) return flow;
      const Value block(std::move(captured));
      write(evaluate_filter(*stmt.exprs[0], inner, &block), out);
      return Flow::kNext;
    }
    case Stmt::Kind::kWith:
      return run_with(stmt, scope, out);
    case Stmt::Kind::kGeneration: {
      Text captured;
      run(stmt.bodies[0], new_scope(&scope), &captured);
      write(Value(std::move(captured)), out);
      return Flow::kNext;
    }
    case Stmt::Kind::kBreak:
      return Flow::kBreak;
    case Stmt::Kind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNext;
}

void Interpreter::write(const Value& value, Text* out) {
  const size_t before = out->size();
  if (value.is_text()) {
    out->append(value.text());
  } else {
    out->append(to_text(*this, value));
  }
  if (out->size() > budget_.max_bytes)
    fail("the output grows beyond ", budget_.max_bytes, " bytes");
  budget_.charge_text(out->size() - before);
}

Interpreter::Flow Interpreter::run_if(const Stmt& stmt, Scope& scope, Text* out) {
  for (size_t i = 0; i < stmt.exprs.size(); i++) {
    if (truthy(evaluate(*stmt.exprs[i], scope))) return run(stmt.bodies[i], scope, out);
  }
  if (stmt.bodies.size() > stmt.exprs.size()) return run(stmt.bodies.back(), scope, out);
  return Flow::kNext;
}

Text Interpreter::run_loop(const Stmt& stmt, Scope& scope, const Value& iterable, int depth) {
  const DepthGuard guard(budget_);
  Text out;
  run_for(stmt, scope, iterable, depth, &out);
  return out;
}

void Interpreter::run_for(const Stmt& stmt, Scope& scope, const Value& iterable, int depth,
                          Text* out) {
  static const std::string kLoop = "loop";
  auto loop = std::make_shared<Loop>(stmt, scope, depth);
  const Value loop_value = keep(loop);
  loop->iterator = iterate(*this, iterable);
  if (stmt.exprs[1]) {
    auto filtered = std::make_unique<FilteredIterator>();
    filtered->inner = std::move(loop->iterator);
    filtered->keep = [this, &stmt, &scope](const Value& item) {
      Scope& test_scope = new_scope(&scope);
      assign(*stmt.targets[0], item, test_scope, test_scope);
      return truthy(evaluate(*stmt.exprs[1], test_scope));
    };
    loop->iterator = std::move(filtered);
  } else if (iterable.is_undefined() || iterable.is_text() || iterable.is_list() ||
             iterable.is_dict()) {
    loop->known_length = jinja::length(iterable);
  } else if (const auto n = iterable.object().length()) {
    loop->known_length = n;
  }
  const auto name = std::find(template_.names.begin(), template_.names.end(), kLoop);
  const Symbol loop_symbol =
      name == template_.names.end() ? -1 : static_cast<Symbol>(name - template_.names.begin());

  bool run_else = true;  // until one pass through the body has reached its end
  Value item;
  while (loop->advance(&item)) {
    budget_.charge(1);
    line_ = stmt.line;
    Scope& inner = new_scope(&scope);
    assign(*stmt.targets[0], item, inner, inner);
    if (loop_symbol >= 0) inner.set(loop_symbol, loop_value);
    const Flow flow = run(stmt.bodies[0], inner, out);
    if (flow == Flow::kBreak) break;
    if (flow == Flow::kNext) run_else = false;
  }
  if (run_else && stmt.bodies.size() > 1) run(stmt.bodies[1], new_scope(&scope), out);
}

Interpreter::Flow Interpreter::run_set_block(const Stmt& stmt, Scope& scope) {
  Scope& inner = new_scope(&scope);
  Text captured;
  const Flow flow = run(stmt.bodies[0], inner, &captured);
  if (flow != Flow::kNext) return flow;
  Value value(std::move(captured));
  if (stmt.exprs[0]) value = evaluate_filter(*stmt.exprs[0], inner, &value);
  assign(*stmt.targets[0], value, scope, scope);
  return Flow::kNext;
}

Interpreter::Flow Interpreter::run_with(const Stmt& stmt, Scope& scope, Text* out) {
  Scope& inner = new_scope(&scope);
  for (size_t i = 0; i < stmt.targets.size(); i++) {
    assign(*stmt.targets[i], evaluate(*stmt.exprs[i], scope), inner, inner);
  }
  return run(stmt.bodies[0], inner, out);
}

void Interpreter::run_call_block(const Stmt& stmt, Scope& scope, Text* out) {
  const Value caller = make_macro(stmt.macro, scope);
  write(evaluate_call(*stmt.exprs[0], scope, &caller), out);
}

Value Interpreter::make_macro(const MacroNode& macro, Scope& scope) {
  return keep(std::make_shared<Macro>(macro, &scope));
}

Value Interpreter::call_macro(const MacroNode& macro, Scope* closure, CallArgs& args) {
  const DepthGuard guard(budget_);
  const int call_line = line_;
  const std::string name = macro.name.empty() ? "caller" : macro.name;
  Scope& scope = new_scope(closure);
  static const std::string kCaller = "caller";
  const auto symbol_of = [&](const std::string& wanted) {
    const auto at = std::find(template_.names.begin(), template_.names.end(), wanted);
    return static_cast<Symbol>(at - template_.names.begin());
  };
  const auto take_keyword = [&](const std::string& key) -> std::optional<Value> {
    for (size_t i = 0; i < args.keyword.size(); i++) {
      if (args.keyword[i].first == key) {
        Value value = args.keyword[i].second;
        args.keyword.erase(args.keyword.begin() + static_cast<int64_t>(i));
        return value;
      }
    }
    return std::nullopt;
  };
  const size_t n = macro.params.size();
  bool found_caller = false;
  std::vector<std::optional<Value>> given(n);
  for (size_t i = 0; i < n; i++) {
    if (i < args.positional.size()) {
      given[i] = args.positional[i];
    } else {
      given[i] = take_keyword(macro.param_names[i]);
    }
    if (macro.param_names[i] == kCaller) found_caller = true;
  }
  if (macro.uses_caller && !found_caller) {
    scope.set(symbol_of(kCaller),
              take_keyword(kCaller).value_or(Value::undefined("No caller defined")));
  }
  if (macro.uses_kwargs) {
    auto rest = std::make_shared<Dict>();
    for (auto& [key, value] : args.keyword) rest->set(Value(std::string_view(key)), value, budget_);
    scope.set(symbol_of("kwargs"), Value(std::shared_ptr<const Dict>(std::move(rest))));
  } else if (!args.keyword.empty()) {
    for (const auto& [key, value] : args.keyword) {
      if (key == kCaller)
        fail("macro '", name, "' was invoked with two values for the special caller argument");
    }
    fail("macro '", name, "' takes no keyword argument '", args.keyword[0].first, "'");
  }
  if (macro.uses_varargs) {
    std::vector<Value> rest;
    if (args.positional.size() > n)
      rest.assign(args.positional.begin() + static_cast<int64_t>(n), args.positional.end());
    scope.set(symbol_of("varargs"), Value::list(std::move(rest), true));
  } else if (args.positional.size() > n) {
    fail("macro '", name, "' takes not more than ", n, " argument(s)");
  }
  // A default sees the parameters before it; those without a value are undefined.
  for (size_t i = 0; i < n; i++) {
    if (given[i]) scope.set(macro.params[i], *given[i]);
  }
  const size_t first_default = n - macro.defaults.size();
  for (size_t i = 0; i < n; i++) {
    if (given[i]) continue;
    scope.set(macro.params[i],
              i >= first_default
                  ? evaluate(*macro.defaults[i - first_default], scope)
                  : Value::undefined("parameter '" + macro.param_names[i] + "' was not provided"));
  }
  Text out;
  run(macro.body, scope, &out);
  line_ = call_line;
  return Value(std::move(out));
}

void Interpreter::check_namespaces(const Expr& target, Scope& scope) {
  if (target.kind == Expr::Kind::kNamespaceRef) {
    const Value* object = scope.find(target.symbol);  // none comes from the caller's variables
    if (!object || !object->as<Namespace>())
      fail("cannot assign attribute on non-namespace object");
  }
  for (const ExprPtr& each : target.args) check_namespaces(*each, scope);
}

void Interpreter::assign(const Expr& target, const Value& value, Scope& scope, Scope& lookup) {
  if (target.kind == Expr::Kind::kName) {
    scope.set(target.symbol, value);
  } else if (target.kind == Expr::Kind::kNamespaceRef) {
    lookup.find(target.symbol)->as<Namespace>()->set(target.text, value);
  } else {
    const std::vector<Value> items = to_items(*this, value);
    if (items.size() != target.args.size()) {
      fail(items.size() < target.args.size() ? "not enough" : "too many",
           " values to unpack (expected ", target.args.size(), ", got ", items.size(), ")");
    }
    for (size_t i = 0; i < items.size(); i++) assign(*target.args[i], items[i], scope, lookup);
  }
}

// --- expressions

Value Interpreter::evaluate(const Expr& expr, Scope& scope) {
  const DepthGuard guard(budget_);
  budget_.charge(1);
  line_ = expr.line;
  switch (expr.kind) {
    case Expr::Kind::kConst:
      return expr.constant;
    case Expr::Kind::kName:
      return evaluate_name(expr, scope);
    case Expr::Kind::kTuple:
      return Value::list(evaluate_all(expr.args, scope), true);
    case Expr::Kind::kList:
      return Value::list(evaluate_all(expr.args, scope));
    case Expr::Kind::kDict:
      return evaluate_dict(expr, scope);
    case Expr::Kind::kAttribute:
      return get_attribute(evaluate(*expr.args[0], scope), expr.text);
    case Expr::Kind::kItem: {
      const Value object = evaluate(*expr.args[0], scope);
      return get_item(object, evaluate(*expr.args[1], scope));
    }
    case Expr::Kind::kSlice:
      return evaluate_slice(expr, scope);
    case Expr::Kind::kCall:
      return evaluate_call(expr, scope, nullptr);
    case Expr::Kind::kFilter:
      return evaluate_filter(expr, scope, nullptr);
    case Expr::Kind::kTest:
      return Value(evaluate_test(expr, scope));
    case Expr::Kind::kUnary:
      return unary_operation(expr.text, evaluate(*expr.args[0], scope));
    case Expr::Kind::kBinary: {
      const Value left = evaluate(*expr.args[0], scope);
      return binary_operation(*this, expr.text, left, evaluate(*expr.args[1], scope));
    }
    case Expr::Kind::kAnd: {
      const Value left = evaluate(*expr.args[0], scope);
      return truthy(left) ? evaluate(*expr.args[1], scope) : left;
    }
    case Expr::Kind::kOr: {
      const Value left = evaluate(*expr.args[0], scope);
      return truthy(left) ? left : evaluate(*expr.args[1], scope);
    }
    case Expr::Kind::kNot:
      return Value(!truthy(evaluate(*expr.args[0], scope)));
    case Expr::Kind::kCompare:
      return evaluate_compare(expr, scope);
    case Expr::Kind::kConcat:
      return evaluate_concat(expr, scope);
    case Expr::Kind::kCondition:
      if (truthy(evaluate(*expr.args[0], scope))) return evaluate(*expr.args[1], scope);
      if (expr.args[2]) return evaluate(*expr.args[2], scope);
      return Value::undefined(concat("the inline if-expression on line ", expr.line,
                                     " evaluated to false and no else section was defined."));
    case Expr::Kind::kNamespaceRef:
      break;
  }
  return {};
}

Value Interpreter::evaluate_name(const Expr& expr, Scope& scope) {
  if (const Value* found = scope.find(expr.symbol)) return *found;
  if (expr.text == "self") unsupported("the variable 'self'");
  const auto at = context_.find(expr.text);
  if (at != context_.end()) return at->second;
  if (auto global = find_global(*this, expr.text)) return *global;
  return Value::undefined(quoted(expr.text) + " is undefined");
}

std::vector<Value> Interpreter::evaluate_all(const std::vector<ExprPtr>& exprs, Scope& scope) {
  std::vector<Value> values;
  values.reserve(exprs.size());
  for (const ExprPtr& expr : exprs) values.push_back(evaluate(*expr, scope));
  return values;
}

Value Interpreter::evaluate_dict(const Expr& expr, Scope& scope) {
  auto dict = std::make_shared<Dict>();
  for (size_t i = 0; i < expr.args.size(); i += 2) {
    const Value key = evaluate(*expr.args[i], scope);
    dict->set(key, evaluate(*expr.args[i + 1], scope), budget_);
  }
  return Value(std::shared_ptr<const Dict>(std::move(dict)));
}

Value Interpreter::evaluate_slice(const Expr& expr, Scope& scope) {
  const Value object = evaluate(*expr.args[0], scope);
  Value bounds[3];
  const Value* given[3] = {};
  for (size_t i = 0; i < 3; i++) {
    if (!expr.args[i + 1]) continue;
    bounds[i] = evaluate(*expr.args[i + 1], scope);
    given[i] = &bounds[i];
  }
  return slice_value(*this, object, given[0], given[1], given[2]);
}

CallArgs Interpreter::evaluate_arguments(const CallNodes& nodes, Scope& scope) {
  CallArgs args;
  args.positional = evaluate_all(nodes.positional, scope);
  for (const auto& [name, expr] : nodes.keyword)
    args.keyword.emplace_back(name, evaluate(*expr, scope));
  if (nodes.star) {
    for (Value& value : to_items(*this, evaluate(*nodes.star, scope))) {
      args.positional.push_back(std::move(value));
    }
  }
  if (nodes.double_star) {
    const Value rest = evaluate(*nodes.double_star, scope);
    if (!rest.is_dict()) fail("argument after ** must be a mapping, not ", type_name(rest));
    for (const auto& [key, value] : rest.dict().entries) {
      if (!key.is_text()) fail("keywords must be strings");
      for (const auto& [name, given] : args.keyword) {
        if (name == key.bytes()) fail("got multiple values for keyword argument '", name, "'");
      }
      args.keyword.emplace_back(key.bytes(), value);
    }
  }
  return args;
}

Value Interpreter::evaluate_call(const Expr& expr, Scope& scope, const Value* caller) {
  const Value callee = evaluate(*expr.args[0], scope);
  CallArgs args = evaluate_arguments(expr.call, scope);
  if (caller) {
    for (const auto& [name, value] : args.keyword) {
      if (name == "caller") fail("got multiple values for keyword argument 'caller'");
    }
    args.keyword.emplace_back("caller", *caller);
  }
  line_ = expr.line;
  return call(callee, args);
}

Value Interpreter::evaluate_filter(const Expr& expr, Scope& scope, const Value* block) {
  // In a filter block the innermost filter of the chain has no expression, but the captured text.
  const Expr* inner = expr.args[0].get();
  const Value value = !inner ? *block
                      : block && inner->kind == Expr::Kind::kFilter
                          ? evaluate_filter(*inner, scope, block)
                          : evaluate(*inner, scope);
  CallArgs args = evaluate_arguments(expr.call, scope);
  line_ = expr.line;
  return apply_filter(expr.text, value, args);
}

bool Interpreter::evaluate_test(const Expr& expr, Scope& scope) {
  const Value value = evaluate(*expr.args[0], scope);
  CallArgs args = evaluate_arguments(expr.call, scope);
  line_ = expr.line;
  return apply_test(expr.text, value, args);
}

Value Interpreter::evaluate_compare(const Expr& expr, Scope& scope) {
  Value left = evaluate(*expr.args[0], scope);
  for (size_t i = 0; i < expr.ops.size(); i++) {
    Value right = evaluate(*expr.args[i + 1], scope);
    const std::string& op = expr.ops[i];
    bool holds = false;
    if (op == "==") {
      holds = equal(left, right, budget_);
    } else if (op == "!=") {
      holds = !equal(left, right, budget_);
    } else if (op == "in") {
      holds = contains(*this, right, left);
    } else if (op == "not in") {
      holds = !contains(*this, right, left);
    } else {
      holds = ordered(left, right, op, budget_);
    }
    if (!holds) return Value(false);
    left = std::move(right);
  }
  return Value(true);
}

Value Interpreter::evaluate_concat(const Expr& expr, Scope& scope) {
  return join_texts(*this, evaluate_all(expr.args, scope), Text());
}

Value Interpreter::get_attribute(const Value& object, const std::string& name) {
  if (auto attribute = type_attribute(*this, object, name)) return *attribute;
  if (object.is_undefined()) fail(object.undefined().message);
  if (object.is_dict()) {
    if (const Value* found = object.dict().find(name)) return *found;
  }
  return Value::undefined(object.is_none() ? "None has no attribute " + quoted(name)
                                           : concat("'", object_description(object),
                                                    "' has no attribute ", quoted(name)));
}

Value Interpreter::get_item(const Value& object, const Value& key) {
  if (object.is_undefined()) fail(object.undefined().message);
  if (object.is_dict()) {
    if (is_hashable(key)) {
      if (const Value* found = object.dict().find(key, budget_)) return *found;
    }
  } else if (object.is_list() && key.is_integral()) {
    const int64_t n = static_cast<int64_t>(object.items().size());
    const int64_t i = key.as_int() < 0 ? key.as_int() + n : key.as_int();
    if (i >= 0 && i < n) return object.items()[i];
  } else if (object.is_text() && key.is_integral()) {
    const auto offsets = unicode::code_point_offsets(object.bytes());
    budget_.charge_text(object.text().size());
    const int64_t n = static_cast<int64_t>(offsets.size()) - 1;
    const int64_t i = key.as_int() < 0 ? key.as_int() + n : key.as_int();
    if (i >= 0 && i < n) return Value(object.text().sub(offsets[i], offsets[i + 1]));
  } else if (object.is_object()) {
    if (auto item = object.object().item(*this, key)) return *item;
  }
  if (key.is_text()) {
    if (auto attribute = type_attribute(*this, object, key.bytes())) return *attribute;
    return Value::undefined(
        concat("'", object_description(object), "' has no attribute ", repr(*this, key).bytes));
  }
  return Value::undefined(concat(object_description(object), " has no element ",
                                 key.is_object() ? type_name(key) : repr(*this, key).bytes));
}

Value Interpreter::call(const Value& callee, CallArgs& args) {
  const DepthGuard guard(budget_);
  budget_.charge(1);
  if (callee.is_undefined()) fail(callee.undefined().message);
  if (!callee.is_object()) fail("'", type_name(callee), "' object is not callable");
  return callee.object().call(*this, args);
}

Value Interpreter::apply_filter(const std::string& name, const Value& value, CallArgs& args) {
  const Filter* filter = find_filter(name);
  if (!filter) fail(unknown_filter(name));
  return (*filter)(*this, value, args);
}

bool Interpreter::apply_test(const std::string& name, const Value& value, CallArgs& args) {
  const Test* test = find_test(name);
  if (!test) fail("No test named '", name, "'");
  return (*test)(*this, value, args);
}

}  // namespace mustafar::jinja
