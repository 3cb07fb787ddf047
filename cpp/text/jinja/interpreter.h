// Renders a parsed template. Statements are in interpreter.cc, expressions in evaluate.cc, macros
// in macro.cc.
#pragma once

#include <ctime>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "text/jinja/ast.h"
#include "text/jinja/value.h"

namespace mustafar::jinja {

// Variables of one block of the template; `if` has none of its own.
struct Scope {
  Scope* parent = nullptr;
  std::vector<std::pair<Symbol, Value>> variables;

  const Value* find(Symbol symbol) const;
  void set(Symbol symbol, Value value);
};

struct RenderInput {
  std::vector<std::pair<std::string, Value>> variables;
  std::tm now{};  // what strftime_now prints
};

class Interpreter {
 public:
  Interpreter(const Template& source, const RenderInput& input, Budget budget);
  ~Interpreter();
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  // Throws EvalError; line() tells where.
  Text render();
  int line() const { return line_; }

  Budget& budget() { return budget_; }
  const std::tm& now() const { return input_.now; }

  Value get_attribute(const Value& object, const std::string& name);  // object.name
  Value get_item(const Value& object, const Value& key);              // object[key]
  Value call(const Value& callee, CallArgs& args);
  Value apply_filter(const std::string& name, const Value& value, CallArgs& args);
  bool apply_test(const std::string& name, const Value& value, CallArgs& args);

  // Keeps an object until the rendering ends, when all are released one by one.
  template <typename T>
  Value keep(std::shared_ptr<T> object) {
    objects_.push_back(object);
    return Value(std::shared_ptr<Object>(std::move(object)));
  }

  // For the objects that stand for parts of the template.
  Value call_macro(const MacroNode& macro, Scope* closure, CallArgs& args);
  Text run_loop(const Stmt& stmt, Scope& scope, const Value& iterable, int depth);

 private:
  enum class Flow { kNext, kBreak, kContinue };

  Scope& new_scope(Scope* parent);
  Symbol symbol_of(std::string_view name) const;  // -1: no name of the template
  Flow run(const Body& body, Scope& scope, Text* out);
  Flow run_statement(const Stmt& stmt, Scope& scope, Text* out);
  Flow run_if(const Stmt& stmt, Scope& scope, Text* out);
  void run_for(const Stmt& stmt, Scope& scope, const Value& iterable, int depth, Text* out);
  Flow run_set_block(const Stmt& stmt, Scope& scope);
  Flow run_with(const Stmt& stmt, Scope& scope, Text* out);
  void run_call_block(const Stmt& stmt, Scope& scope, Text* out);
  void write(const Value& value, Text* out);
  void assign(const Expr& target, const Value& value, Scope& scope, Scope& lookup);
  void check_namespaces(const Expr& target, Scope& scope);
  Value make_macro(const MacroNode& macro, Scope& scope);
  void bind_arguments(const MacroNode& macro, CallArgs& args, Scope& scope);
  void bind_rest(const MacroNode& macro, const CallArgs& args, Scope& scope);

  Value evaluate(const Expr& expr, Scope& scope);
  Value evaluate_name(const Expr& expr, Scope& scope);
  Value evaluate_dict(const Expr& expr, Scope& scope);
  Value evaluate_slice(const Expr& expr, Scope& scope);
  Value evaluate_call(const Expr& expr, Scope& scope, const Value* caller);
  Value evaluate_filter(const Expr& expr, Scope& scope, const Value* block);
  Value evaluate_compare(const Expr& expr, Scope& scope);
  Value evaluate_concat(const Expr& expr, Scope& scope);
  bool evaluate_test(const Expr& expr, Scope& scope);
  std::vector<Value> evaluate_all(const std::vector<ExprPtr>& exprs, Scope& scope);
  CallArgs evaluate_arguments(const CallNodes& nodes, Scope& scope);

  const Template& template_;
  const RenderInput& input_;
  Budget budget_;
  int line_ = 1;
  std::unordered_map<std::string, Value> context_;
  std::vector<std::unique_ptr<Scope>> scopes_;
  std::vector<std::shared_ptr<Object>> objects_;
};

// A text that a method or filter has made, charged to the budget.
inline Value made(Interpreter& in, Text text) {
  in.budget().charge_text(text.size());
  return Value(std::move(text));
}

// Python's operators.
Value binary_operation(Interpreter& in, const std::string& op, const Value& a, const Value& b);
Value unary_operation(const std::string& op, const Value& a);
Value add(Interpreter& in, const Value& a, const Value& b);
Value join_texts(Interpreter& in, const std::vector<Value>& values, const Text& separator);
// value[start:stop:step]; null parts are as if left out.
Value slice_value(Interpreter& in, const Value& value, const Value* start, const Value* stop,
                  const Value* step);

}  // namespace mustafar::jinja
