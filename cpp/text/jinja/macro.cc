#include "text/jinja/macro.h"

#include <utility>

namespace mustafar::jinja {

namespace {

constexpr std::string_view kCaller = "caller";

std::optional<Value> take_keyword(std::string_view name, CallArgs* args) {
  for (auto it = args->keyword.begin(); it != args->keyword.end(); ++it) {
    if (it->first != name) continue;
    Value value = std::move(it->second);
    args->keyword.erase(it);
    return value;
  }
  return std::nullopt;
}

}  // namespace

Text Macro::repr(Interpreter&) {
  if (node_.name.empty()) return Text("<Macro anonymous>");
  return Text("<Macro '" + node_.name + "'>");
}

std::optional<Value> Macro::attribute(Interpreter&, const std::string& name) {
  if (name == "name") return node_.name.empty() ? Value() : Value(std::string_view(node_.name));
  if (name == "catch_kwargs") return Value(node_.uses_kwargs);
  if (name == "catch_varargs") return Value(node_.uses_varargs);
  if (name == "caller") return Value(node_.uses_caller);
  if (name == "arguments") {
    std::vector<Value> names;
    for (const auto& each : node_.param_names) names.emplace_back(std::string_view(each));
    return Value::list(std::move(names), true);
  }
  return std::nullopt;
}

Value Interpreter::call_macro(const MacroNode& macro, Scope* closure, CallArgs& args) {
  const DepthGuard guard(budget_);
  const int call_line = line_;
  Scope& scope = new_scope(closure);
  bind_arguments(macro, args, scope);
  Text out;
  run(macro.body, scope, &out);
  line_ = call_line;
  return Value(std::move(out));
}

// Sets the parameters of a macro, and `caller`, `kwargs` and `varargs` where its body uses them.
void Interpreter::bind_arguments(const MacroNode& macro, CallArgs& args, Scope& scope) {
  const size_t n = macro.params.size();
  std::vector<std::optional<Value>> given(n);
  bool caller_is_param = false;
  for (size_t i = 0; i < n; i++) {
    given[i] =
        i < args.positional.size() ? args.positional[i] : take_keyword(macro.param_names[i], &args);
    if (macro.param_names[i] == kCaller) caller_is_param = true;
  }
  if (macro.uses_caller && !caller_is_param) {
    scope.set(symbol_of(kCaller),
              take_keyword(kCaller, &args).value_or(Value::undefined("No caller defined")));
  }
  bind_rest(macro, args, scope);
  for (size_t i = 0; i < n; i++) {
    if (given[i]) scope.set(macro.params[i], *given[i]);
  }
  // A default sees the parameters before it, so these are set in order.
  const size_t first_default = n - macro.defaults.size();
  for (size_t i = 0; i < n; i++) {
    if (given[i]) continue;
    scope.set(macro.params[i],
              i >= first_default
                  ? evaluate(*macro.defaults[i - first_default], scope)
                  : Value::undefined("parameter '" + macro.param_names[i] + "' was not provided"));
  }
}

// The arguments that no parameter takes: keywords that are left, and positional ones beyond.
void Interpreter::bind_rest(const MacroNode& macro, const CallArgs& args, Scope& scope) {
  const std::string name = macro.name.empty() ? std::string(kCaller) : macro.name;
  const size_t n = macro.params.size();
  if (macro.uses_kwargs) {
    auto rest = std::make_shared<Dict>();
    for (const auto& [key, value] : args.keyword) {
      rest->set(Value(std::string_view(key)), value, budget_);
    }
    scope.set(symbol_of("kwargs"), Value(std::shared_ptr<const Dict>(std::move(rest))));
  } else if (!args.keyword.empty()) {
    for (const auto& [key, value] : args.keyword) {
      if (key == kCaller) {
        fail("macro '", name, "' was invoked with two values for the special caller argument");
      }
    }
    fail("macro '", name, "' takes no keyword argument '", args.keyword[0].first, "'");
  }
  if (macro.uses_varargs) {
    std::vector<Value> rest;
    if (args.positional.size() > n) {
      rest.assign(args.positional.begin() + static_cast<int64_t>(n), args.positional.end());
    }
    scope.set(symbol_of("varargs"), Value::list(std::move(rest), true));
  } else if (args.positional.size() > n) {
    fail("macro '", name, "' takes not more than ", n, " argument(s)");
  }
}

}  // namespace mustafar::jinja
