// The objects behind range(), dict views and bound methods.
#pragma once

#include <algorithm>
#include <memory>
#include <string>

#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"

namespace mustafar::jinja {

struct Range : Object {
  Range(int64_t start, int64_t stop, int64_t step);
  std::string type_name() const override { return "range"; }
  Text repr(Interpreter&) override;
  bool truthy() override { return count != 0; }
  std::optional<int64_t> length() override { return count; }
  std::optional<Value> attribute(Interpreter& in, const std::string& name) override;
  std::optional<Value> item(Interpreter& in, const Value& key) override;
  std::unique_ptr<Iterator> iterate(Interpreter& in) override;
  bool equals(const Object& other, Budget&) const override;

  int64_t start, stop, step, count;
};

// dict_keys, dict_values, dict_items.
struct View : Object {
  View(const char* type, Value dict) : type(type), dict(std::move(dict)) {}
  std::string type_name() const override { return type; }
  Text repr(Interpreter& in) override;
  bool truthy() override { return !dict.dict().entries.empty(); }
  std::optional<int64_t> length() override {
    return static_cast<int64_t>(dict.dict().entries.size());
  }
  std::unique_ptr<Iterator> iterate(Interpreter& in) override;
  bool equals(const Object& other, Budget& budget) const override;
  int depth() const override { return dict.depth() + 1; }
  Value at(size_t i) const;

  std::string type;
  Value dict;
};

// A generator, or another iterator; it is used up once.
struct Generator : Object {
  Generator(std::string type, std::unique_ptr<Iterator> iterator)
      : type(std::move(type)), iterator(std::move(iterator)) {}
  std::string type_name() const override { return type; }
  std::unique_ptr<Iterator> iterate(Interpreter& in) override;
  void release() override { iterator.reset(); }

  std::string type;
  std::shared_ptr<Iterator> iterator;
};

using Function = Value (*)(Interpreter& in, CallArgs& args);

struct BuiltinFunction : Object {
  BuiltinFunction(const char* name, Function function) : name(name), function(function) {}
  std::string type_name() const override { return "function"; }
  bool callable() const override { return true; }
  Value call(Interpreter& in, CallArgs& args) override { return function(in, args); }

  const char* name;
  Function function;
};

using Method = Value (*)(Interpreter& in, const Value& self, CallArgs& args);

struct BoundMethod : Object {
  BoundMethod(std::string name, Value self, Method method)
      : name(std::move(name)), self(std::move(self)), method(method) {}
  std::string type_name() const override { return "builtin_function_or_method"; }
  bool callable() const override { return true; }
  Value call(Interpreter& in, CallArgs& args) override {
    if (!method) unsupported("the method '", name, "' of '", jinja::type_name(self), "'");
    return method(in, self, args);
  }
  bool equals(const Object& other, Budget&) const override {
    const auto* method_of = dynamic_cast<const BoundMethod*>(&other);
    return method_of && method_of->name == name && method_of->self.same_as(self);
  }
  int depth() const override { return self.depth() + 1; }
  void release() override { self = Value(); }

  std::string name;
  Value self;
  Method method;  // null: Python has it, the engine does not
};

// Method of a string by its Python name: none where str has no such method, null where only the
// engine has not.
std::optional<Method> find_text_method(const std::string& name);

// str.isupper, or str.islower.
bool text_is_case(const std::string& s, bool want_upper);

}  // namespace mustafar::jinja
