#include "text/jinja/objects.h"

#include <cmath>
#include <unordered_map>
#include <unordered_set>

namespace mustafar::jinja {
namespace {

// Yields what a function gives until it returns false.
struct FunctionIterator : Iterator {
  explicit FunctionIterator(std::function<bool(Value*)> f) : function(std::move(f)) {}
  bool next(Value* out) override { return function(out); }
  std::function<bool(Value*)> function;
};

struct SharedIterator : Iterator {
  SharedIterator(Interpreter& in, std::shared_ptr<Iterator> inner)
      : in(in), inner(std::move(inner)) {}
  bool next(Value* out) override {
    const DepthGuard guard(in.budget());
    in.budget().charge(1);
    return inner && inner->next(out);
  }
  Interpreter& in;
  std::shared_ptr<Iterator> inner;
};

}  // namespace

// --- range

Range::Range(int64_t start, int64_t stop, int64_t step) : start(start), stop(stop), step(step) {
  const __int128 span =
      step > 0 ? static_cast<__int128>(stop) - start : static_cast<__int128>(start) - stop;
  const __int128 stride = step > 0 ? step : -static_cast<__int128>(step);
  const __int128 n = span <= 0 ? 0 : (span + stride - 1) / stride;
  constexpr int64_t kMaxRange = 100000;  // as in jinja2's sandbox
  if (n > kMaxRange) {
    fail("Range too big. The sandbox blocks ranges larger than MAX_RANGE (", kMaxRange, ").");
  }
  count = static_cast<int64_t>(n);
}

Text Range::repr(Interpreter&) {
  return Text(step == 1 ? concat("range(", start, ", ", stop, ")")
                        : concat("range(", start, ", ", stop, ", ", step, ")"));
}

std::optional<Value> Range::attribute(Interpreter&, const std::string& name) {
  if (name == "start") return Value(start);
  if (name == "stop") return Value(stop);
  if (name == "step") return Value(step);
  if (name == "count" || name == "index") unsupported("the method '", name, "' of 'range'");
  return std::nullopt;
}

std::optional<Value> Range::item(Interpreter&, const Value& key) {
  if (!key.is_integral()) return std::nullopt;
  const int64_t i = key.as_int() < 0 ? key.as_int() + count : key.as_int();
  if (i < 0 || i >= count) return std::nullopt;
  return Value(start + i * step);
}

std::unique_ptr<Iterator> Range::iterate(Interpreter&) {
  return std::make_unique<FunctionIterator>(
      [start = start, step = step, count = count, i = int64_t{0}](Value* out) mutable {
        if (i == count) return false;
        *out = Value(start + i++ * step);
        return true;
      });
}

bool Range::equals(const Object& other, Budget&) const {
  const auto* range = dynamic_cast<const Range*>(&other);
  return range && count == range->count && (count == 0 || start == range->start) &&
         (count < 2 || step == range->step);
}

// --- views of a dict

Value View::at(size_t i) const {
  const auto& [key, value] = dict.dict().entries[i];
  return type == "dict_keys"     ? key
         : type == "dict_values" ? value
                                 : Value::list({key, value}, true);
}

Text View::repr(Interpreter& in) {
  std::vector<Value> items;
  for (size_t i = 0; i < dict.dict().entries.size(); i++) items.push_back(at(i));
  Text out(type + "(");
  out.append(jinja::repr(in, Value::list(std::move(items))));
  out.append(")");
  return out;
}

std::unique_ptr<Iterator> View::iterate(Interpreter&) {
  return std::make_unique<FunctionIterator>([view = *this, i = size_t{0}](Value* out) mutable {
    if (i == view.dict.dict().entries.size()) return false;
    *out = view.at(i++);
    return true;
  });
}

bool View::equals(const Object& other, Budget& budget) const {
  const auto* view = dynamic_cast<const View*>(&other);
  if (!view || view->type != type) return false;
  if (type == "dict_values") return this == view;
  const Dict &a = dict.dict(), &b = view->dict.dict();
  if (a.entries.size() != b.entries.size()) return false;
  for (const auto& [key, value] : a.entries) {
    const Value* found = b.find(key, budget);
    if (!found || (type == "dict_items" && !equal(value, *found, budget))) return false;
  }
  return true;
}

Value make_view(const char* type, Value dict) {
  return Value(std::shared_ptr<Object>(std::make_shared<View>(type, std::move(dict))));
}

// --- generators

std::unique_ptr<Iterator> Generator::iterate(Interpreter& in) {
  return std::make_unique<SharedIterator>(in, iterator);
}

Value make_generator(Interpreter& in, std::string type_name, std::unique_ptr<Iterator> iterator) {
  return in.keep(std::make_shared<Generator>(std::move(type_name), std::move(iterator)));
}

Value make_generator(Interpreter& in, std::function<bool(Value*)> next) {
  return make_generator(in, "generator", std::make_unique<FunctionIterator>(std::move(next)));
}

std::optional<Value> make_reversed(Interpreter& in, const Value& value) {
  const auto* view = value.as<View>();
  const auto* range = value.as<Range>();
  if (!value.is_list() && !value.is_dict() && !value.is_text() && !value.is_undefined() && !view &&
      !range) {
    return std::nullopt;
  }
  std::vector<Value> items = to_items(in, value);
  std::reverse(items.begin(), items.end());
  const char* type = value.is_list() && !value.is_tuple() ? "list_reverseiterator"
                     : range                              ? "range_iterator"
                     : value.is_dict()                    ? "dict_reversekeyiterator"
                                                          : "reversed";
  return make_generator(in, type,
                        std::make_unique<FunctionIterator>(
                            [items = std::move(items), i = size_t{0}](Value* out) mutable {
                              if (i == items.size()) return false;
                              *out = items[i++];
                              return true;
                            }));
}

// --- namespaces

Text Namespace::repr(Interpreter& in) {
  Text out("<Namespace {");
  for (size_t i = 0; i < attributes.size(); i++) {
    if (i) out.append(", ");
    out.append(repr_text(Text(attributes[i].first)));
    out.append(": ");
    out.append(jinja::repr(in, attributes[i].second));
    in.budget().check_size(out.size());
  }
  out.append("}>");
  in.budget().charge_text(out.size());
  return out;
}

std::optional<Value> Namespace::attribute(Interpreter&, const std::string& name) {
  for (const auto& [key, value] : attributes) {
    if (key == name) return value;
  }
  return std::nullopt;
}

void Namespace::set(const std::string& name, Value value) {
  if (name.starts_with('_')) {
    fail("Chat templates cannot store underscore-prefixed attributes on a namespace, but got '",
         name, "'. Please rename the attribute.");
  }
  for (auto& [key, old] : attributes) {
    if (key == name) {
      old = std::move(value);
      return;
    }
  }
  attributes.emplace_back(name, std::move(value));
}

// --- attributes of Python's types

bool is_python_internal(const std::string& name) {
  static const std::unordered_set<std::string> kNames = {
      "__class__",   "__delattr__", "__dir__",           "__doc__",         "__eq__",
      "__format__",  "__ge__",      "__getattribute__",  "__getstate__",    "__gt__",
      "__hash__",    "__init__",    "__init_subclass__", "__le__",          "__lt__",
      "__ne__",      "__new__",     "__reduce__",        "__reduce_ex__",   "__repr__",
      "__setattr__", "__sizeof__",  "__str__",           "__subclasshook__"};
  return kNames.count(name) > 0;
}

Value unsafe_attribute(const Value& self, const std::string& name) {
  return Value::undefined(
      concat("access to attribute '", name, "' of '", type_name(self), "' object is unsafe."));
}

namespace {

const Dict& dict_of(const Value& self) { return self.dict(); }

Value dict_get(Interpreter& in, const Value& self, CallArgs& args) {
  if (!args.keyword.empty()) fail("dict.get() takes no keyword arguments");
  const Arguments a("get", args, {"key", "default"}, 1);
  const Value* found = dict_of(self).find(*a[0], in.budget());
  return found ? *found : a[1] ? *a[1] : Value();
}

template <int kKind>
Value dict_view(Interpreter&, const Value& self, CallArgs& args) {
  static constexpr const char* kTypes[] = {"dict_keys", "dict_values", "dict_items"};
  const Arguments a(kTypes[kKind], args, {});
  return make_view(kTypes[kKind], self);
}

Value return_self(Interpreter&, const Value& self, CallArgs& args) {
  const Arguments a("copy", args, {});
  return self;
}

Value list_count(Interpreter& in, const Value& self, CallArgs& args) {
  const Arguments a("count", args, {"value"}, 1);
  int64_t n = 0;
  for (const Value& item : self.items()) {
    n += item.same_as(*a[0]) || equal(item, *a[0], in.budget());
  }
  return Value(n);
}

Value list_index(Interpreter& in, const Value& self, CallArgs& args) {
  const Arguments a("index", args, {"value", "start", "stop"}, 1);
  const int64_t n = static_cast<int64_t>(self.items().size());
  const auto bound = [&](size_t i, int64_t otherwise) {
    const int64_t v = a.integer(i, otherwise);
    return std::clamp<int64_t>(v < 0 ? v + n : v, 0, n);
  };
  for (int64_t i = bound(1, 0); i < bound(2, n); i++) {
    if (self.items()[i].same_as(*a[0]) || equal(self.items()[i], *a[0], in.budget()))
      return Value(i);
  }
  fail("value is not in the list");
}

Value float_is_integer(Interpreter&, const Value& self, CallArgs& args) {
  const Arguments a("is_integer", args, {});
  const double d = self.as_double();
  return Value(std::isfinite(d) && std::floor(d) == d);
}

struct TypeAttributes {
  std::unordered_map<std::string, Method> methods;  // null: Python has it, the engine does not
  std::unordered_set<std::string> unsafe;  // would change the value: the sandbox hides them
};

const TypeAttributes* attributes_of(const Value& self) {
  static const TypeAttributes kDictAttributes = {
      {{"get", dict_get},
       {"keys", dict_view<0>},
       {"values", dict_view<1>},
       {"items", dict_view<2>},
       {"copy", return_self},
       {"fromkeys", nullptr}},
      {"clear", "pop", "popitem", "setdefault", "update"}};
  static const TypeAttributes kListAttributes = {
      {{"count", list_count}, {"index", list_index}, {"copy", return_self}},
      {"append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove"}};
  static const TypeAttributes kTupleAttributes = {{{"count", list_count}, {"index", list_index}},
                                                  {}};
  static const TypeAttributes kIntAttributes = {{{"bit_length", nullptr},
                                                 {"bit_count", nullptr},
                                                 {"conjugate", nullptr},
                                                 {"to_bytes", nullptr},
                                                 {"from_bytes", nullptr},
                                                 {"as_integer_ratio", nullptr}},
                                                {}};
  static const TypeAttributes kFloatAttributes = {{{"is_integer", float_is_integer},
                                                   {"conjugate", nullptr},
                                                   {"hex", nullptr},
                                                   {"fromhex", nullptr},
                                                   {"as_integer_ratio", nullptr}},
                                                  {}};
  switch (self.kind()) {
    case Value::Kind::kDict:
      return &kDictAttributes;
    case Value::Kind::kList:
      return self.is_tuple() ? &kTupleAttributes : &kListAttributes;
    case Value::Kind::kBool:
    case Value::Kind::kInt:
      return &kIntAttributes;
    case Value::Kind::kFloat:
      return &kFloatAttributes;
    default:
      return nullptr;
  }
}

bool is_undefined_internal(const std::string& name) {
  static const std::unordered_set<std::string> kNames = {
      "__add__", "__bool__", "__call__", "__getattr__", "__getitem__",
      "__int__", "__iter__", "__len__",  "__module__",  "__slots__"};
  return kNames.count(name) > 0;
}

std::optional<Value> number_attribute(const Value& self, const std::string& name) {
  if (name == "real") return self.is_float() ? self : Value(self.as_int());
  if (name == "imag") return self.is_float() ? Value(0.0) : Value(int64_t{0});
  if (self.is_float()) return std::nullopt;
  if (name == "numerator") return Value(self.as_int());
  if (name == "denominator") return Value(int64_t{1});
  return std::nullopt;
}

}  // namespace

std::optional<Value> type_attribute(Interpreter& in, const Value& self, const std::string& name) {
  if (is_python_internal(name)) return unsafe_attribute(self, name);
  const auto bind = [&](Method method) {
    return in.keep(std::make_shared<BoundMethod>(name, self, method));
  };
  if (self.is_undefined() && is_undefined_internal(name)) return unsafe_attribute(self, name);
  if (self.is_text()) {
    if (const auto method = find_text_method(name)) return bind(*method);
    return std::nullopt;
  }
  if (self.is_object()) return self.object().attribute(in, name);
  if (self.is_number()) {
    if (auto value = number_attribute(self, name)) return value;
  }
  const TypeAttributes* type = attributes_of(self);
  if (!type) return std::nullopt;
  if (type->unsafe.count(name)) return unsafe_attribute(self, name);
  const auto at = type->methods.find(name);
  if (at == type->methods.end()) return std::nullopt;
  return bind(at->second);
}

}  // namespace mustafar::jinja
