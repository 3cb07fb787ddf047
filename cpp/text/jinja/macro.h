// What a macro tag defines, and what `caller` is in a macro that a call tag runs.
#pragma once

#include <optional>
#include <string>

#include "text/jinja/ast.h"
#include "text/jinja/interpreter.h"

namespace mustafar::jinja {

class Macro : public Object {
 public:
  // closure: the scope where the tag stands.
  Macro(const MacroNode& node, Scope* closure) : node_(node), closure_(closure) {}

  std::string type_name() const override { return "Macro"; }
  bool callable() const override { return true; }
  Text repr(Interpreter& in) override;
  std::optional<Value> attribute(Interpreter& in, const std::string& name) override;
  Value call(Interpreter& in, CallArgs& args) override {
    return in.call_macro(node_, closure_, args);
  }

 private:
  const MacroNode& node_;
  Scope* closure_;
};

}  // namespace mustafar::jinja
