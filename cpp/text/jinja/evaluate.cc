// Expressions, and what they look up, call and apply.
#include <algorithm>

#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {
namespace {

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
