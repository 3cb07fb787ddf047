#include "text/jinja/interpreter.h"

#include <algorithm>

#include "text/jinja/builtins.h"
#include "text/jinja/loop.h"
#include "text/jinja/macro.h"

namespace mustafar::jinja {
namespace {

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

Symbol Interpreter::symbol_of(std::string_view name) const {
  const auto at = std::find(template_.names.begin(), template_.names.end(), name);
  return at == template_.names.end() ? -1 : static_cast<Symbol>(at - template_.names.begin());
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
  auto loop = std::make_shared<Loop>(stmt, scope, depth);
  const Value loop_value = keep(loop);
  const Symbol loop_symbol = symbol_of("loop");
  auto iterator = iterate(*this, iterable);
  std::optional<int64_t> known_length;
  if (stmt.exprs[1]) {
    auto filtered = std::make_unique<FilteredIterator>();
    filtered->inner = std::move(iterator);
    filtered->keep = [this, &stmt, &scope](const Value& item) {
      Scope& test_scope = new_scope(&scope);
      assign(*stmt.targets[0], item, test_scope, test_scope);
      return truthy(evaluate(*stmt.exprs[1], test_scope));
    };
    iterator = std::move(filtered);
  } else if (iterable.is_object()) {
    known_length = iterable.object().length();
  } else {
    known_length = jinja::length(iterable);
  }
  loop->start(std::move(iterator), known_length);

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

}  // namespace mustafar::jinja
