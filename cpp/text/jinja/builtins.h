// What templates can call by name: filters, tests, global functions, and methods of values.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "text/jinja/value.h"

namespace mustafar::jinja {

// Assigns positional and keyword arguments to named parameters, as a Python function would.
class Arguments {
 public:
  // Throws when there are too many, one is unknown, given twice, or one of the first `required` is
  // missing.
  Arguments(const std::string& function, const CallArgs& args,
            std::initializer_list<const char*> names, size_t required = 0);

  const Value* operator[](size_t i) const { return values_[i]; }  // null: not given
  int64_t integer(size_t i, int64_t otherwise) const;             // throws for another type
  bool flag(size_t i, bool otherwise) const;                      // truth of the argument

 private:
  std::string function_;
  std::vector<std::string> names_;
  std::vector<const Value*> values_;
};

using Filter = Value (*)(Interpreter& in, const Value& value, CallArgs& args);
using Test = bool (*)(Interpreter& in, const Value& value, CallArgs& args);

const Filter* find_filter(const std::string& name);
const Test* find_test(const std::string& name);
inline bool has_filter(const std::string& name) { return find_filter(name) != nullptr; }
inline bool has_test(const std::string& name) { return find_test(name) != nullptr; }
std::string unknown_filter(const std::string& name);  // the message

// range, dict, namespace and the like; std::nullopt for another name.
std::optional<Value> find_global(Interpreter& in, const std::string& name);

// An attribute that Python's type of the value has: a bound method, a number, or the Undefined that
// stands for an attribute the sandbox keeps away. None where the type has no such attribute.
std::optional<Value> type_attribute(Interpreter& in, const Value& self, const std::string& name);
// Whether Python objects have this double-underscore attribute.
bool is_python_internal(const std::string& name);
Value unsafe_attribute(const Value& self, const std::string& name);

// Makes an iterator value, as a Python generator, from `next`.
Value make_generator(Interpreter& in, std::string type_name, std::unique_ptr<Iterator> iterator);
Value make_generator(Interpreter& in, std::function<bool(Value*)> next);
std::optional<Value> make_reversed(Interpreter& in, const Value& value);  // none: not reversible
Value make_view(const char* type, Value dict);  // dict_keys, dict_values, dict_items

struct Namespace : Object {
  std::string type_name() const override { return "Namespace"; }
  Text repr(Interpreter& in) override;
  std::optional<Value> attribute(Interpreter& in, const std::string& name) override;
  void set(const std::string& name, Value value);  // throws for a name that starts with _
  void release() override { attributes.clear(); }

  std::vector<std::pair<std::string, Value>> attributes;
};

}  // namespace mustafar::jinja
