#include "text/jinja/value.h"

#include <algorithm>
#include <cmath>

#include "text/jinja/format.h"
#include "text/jinja/interpreter.h"
#include "text/unicode/properties.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {

Value::Value(Text text) : kind_(Kind::kText), data_(std::make_shared<Text>(std::move(text))) {}
Value::Value(std::shared_ptr<const List> list)
    : kind_(Kind::kList), data_(std::const_pointer_cast<List>(std::move(list))) {}
Value::Value(std::shared_ptr<const Dict> dict)
    : kind_(Kind::kDict), data_(std::const_pointer_cast<Dict>(std::move(dict))) {}

Value Value::undefined(std::string message) {
  return Value(Kind::kUndefined, std::make_shared<Undefined>(Undefined{std::move(message)}));
}

Value Value::list(std::vector<Value> items, bool tuple) {
  auto list = std::make_shared<List>();
  for (const Value& item : items) list->depth = std::max(list->depth, item.depth() + 1);
  if (list->depth > kMaxContainerDepth) {
    fail("lists and dicts nest deeper than ", kMaxContainerDepth, " levels");
  }
  list->items = std::move(items);
  list->tuple = tuple;
  return Value(std::shared_ptr<const List>(std::move(list)));
}

bool Value::is_tuple() const { return is_list() && list().tuple; }

const std::vector<Value>& Value::items() const { return list().items; }

int Value::depth() const {
  switch (kind()) {
    case Kind::kList:
      return list().depth;
    case Kind::kDict:
      return dict().depth;
    case Kind::kObject:
      return object().depth();
    default:
      return 0;
  }
}

bool Value::same_as(const Value& other) const {
  if (kind() != other.kind()) return false;
  switch (kind()) {
    case Kind::kUndefined:
      return &undefined() == &other.undefined();
    case Kind::kNone:
      return true;
    case Kind::kBool:
      return as_bool() == other.as_bool();
    case Kind::kInt:
      return as_int() == other.as_int();
    case Kind::kFloat:
      return false;
    case Kind::kText:
      return &text() == &other.text();
    case Kind::kList:
      return &list() == &other.list();
    case Kind::kDict:
      return &dict() == &other.dict();
    case Kind::kObject:
      return &object() == &other.object();
  }
  return false;
}

const Value* Dict::find(std::string_view key) const {
  std::string wanted = "s";
  wanted += key;
  const auto at = index.find(wanted);
  return at == index.end() ? nullptr : &entries[at->second].second;
}

const Value* Dict::find(const Value& key, Budget& budget) const {
  const auto at = index.find(hash_key(key, budget));
  return at == index.end() ? nullptr : &entries[at->second].second;
}

void Dict::set(const Value& key, Value value, Budget& budget) {
  depth = std::max({depth, value.depth() + 1, key.depth() + 1});
  if (depth > kMaxContainerDepth) {
    fail("lists and dicts nest deeper than ", kMaxContainerDepth, " levels");
  }
  const auto [at, inserted] = index.emplace(hash_key(key, budget), entries.size());
  if (inserted) {
    entries.emplace_back(key, std::move(value));
  } else {
    entries[at->second].second = std::move(value);
  }
}

Text Object::repr(Interpreter&) { unsupported("printing a value of type '", type_name(), "'"); }
std::optional<Value> Object::attribute(Interpreter&, const std::string&) { return std::nullopt; }
std::optional<Value> Object::item(Interpreter&, const Value&) { return std::nullopt; }
std::unique_ptr<Iterator> Object::iterate(Interpreter&) { return nullptr; }
Value Object::call(Interpreter&, CallArgs&) { fail("'", type_name(), "' object is not callable"); }

std::string type_name(const Value& value) {
  switch (value.kind()) {
    case Value::Kind::kUndefined:
      return "Undefined";
    case Value::Kind::kNone:
      return "NoneType";
    case Value::Kind::kBool:
      return "bool";
    case Value::Kind::kInt:
      return "int";
    case Value::Kind::kFloat:
      return "float";
    case Value::Kind::kText:
      return value.text().markup ? "Markup" : "str";
    case Value::Kind::kList:
      return value.is_tuple() ? "tuple" : "list";
    case Value::Kind::kDict:
      return "dict";
    case Value::Kind::kObject:
      return value.object().type_name();
  }
  return "";
}

bool truthy(const Value& value) {
  switch (value.kind()) {
    case Value::Kind::kUndefined:
      return false;
    case Value::Kind::kNone:
      return false;
    case Value::Kind::kBool:
      return value.as_bool();
    case Value::Kind::kInt:
      return value.as_int() != 0;
    case Value::Kind::kFloat:
      return value.as_double() != 0;
    case Value::Kind::kText:
      return !value.text().empty();
    case Value::Kind::kList:
      return !value.items().empty();
    case Value::Kind::kDict:
      return !value.dict().entries.empty();
    case Value::Kind::kObject:
      return value.object().truthy();
  }
  return false;
}

namespace {

// -1, 0, 1, or 2 for unordered; exact for every int64 and double.
int compare_numbers(const Value& a, const Value& b) {
  if (!a.is_float() && !b.is_float()) {
    return a.as_int() < b.as_int() ? -1 : a.as_int() > b.as_int();
  }
  if (a.is_float() && b.is_float()) {
    const double x = a.as_double(), y = b.as_double();
    return x < y ? -1 : x > y ? 1 : x == y ? 0 : 2;
  }
  if (!a.is_float()) {
    const int reversed = compare_numbers(b, a);
    return reversed == 2 ? 2 : -reversed;
  }
  const double x = a.as_double();
  const int64_t i = b.as_int();
  if (std::isnan(x)) return 2;
  if (x >= 9223372036854775808.0) return 1;
  if (x < -9223372036854775808.0) return -1;
  const int64_t whole = static_cast<int64_t>(x);
  if (whole != i) return whole < i ? -1 : 1;
  const double rest = x - static_cast<double>(whole);
  return rest < 0 ? -1 : rest > 0;
}

}  // namespace

bool equal(const Value& a, const Value& b, Budget& budget) {
  budget.charge(1);
  if (a.is_number() && b.is_number()) return compare_numbers(a, b) == 0;
  if (a.kind() != b.kind()) return false;
  switch (a.kind()) {
    case Value::Kind::kUndefined:
    case Value::Kind::kNone:
      return true;
    case Value::Kind::kText:
      return a.bytes() == b.bytes();
    case Value::Kind::kList: {
      if (a.same_as(b)) return true;
      if (a.is_tuple() != b.is_tuple() || a.items().size() != b.items().size()) return false;
      for (size_t i = 0; i < a.items().size(); i++) {
        if (!a.items()[i].same_as(b.items()[i]) && !equal(a.items()[i], b.items()[i], budget)) {
          return false;
        }
      }
      return true;
    }
    case Value::Kind::kDict: {
      if (a.same_as(b)) return true;
      if (a.dict().entries.size() != b.dict().entries.size()) return false;
      for (const auto& [key, value] : a.dict().entries) {
        const Value* other = b.dict().find(key, budget);
        if (!other || (!value.same_as(*other) && !equal(value, *other, budget))) return false;
      }
      return true;
    }
    default:
      return a.object().equals(b.object(), budget);
  }
}

namespace {

bool holds(int order, std::string_view op) {
  if (op == "<") return order < 0;
  if (op == "<=") return order <= 0;
  if (op == ">") return order > 0;
  return order >= 0;
}

}  // namespace

bool ordered(const Value& a, const Value& b, std::string_view op, Budget& budget) {
  budget.charge(1);
  if (a.is_number() && b.is_number()) {
    const int order = compare_numbers(a, b);
    return order != 2 && holds(order, op);
  }
  if (a.is_text() && b.is_text()) return holds(a.bytes().compare(b.bytes()), op);
  if (a.is_list() && b.is_list() && a.is_tuple() == b.is_tuple()) {
    const auto &x = a.items(), &y = b.items();
    for (size_t i = 0; i < x.size() && i < y.size(); i++) {
      if (!x[i].same_as(y[i]) && !equal(x[i], y[i], budget)) return ordered(x[i], y[i], op, budget);
    }
    return holds(x.size() < y.size() ? -1 : x.size() > y.size(), op);
  }
  if (a.is_undefined()) fail(a.undefined().message);
  if (b.is_undefined()) fail(b.undefined().message);
  fail("'", op, "' not supported between instances of '", type_name(a), "' and '", type_name(b),
       "'");
}

bool contains(Interpreter& in, const Value& container, const Value& item) {
  if (container.is_text()) {
    if (!item.is_text()) {
      fail("'in <string>' requires string as left operand, not ", type_name(item));
    }
    return container.bytes().find(item.bytes()) != std::string::npos;
  }
  if (container.is_dict()) return container.dict().find(item, in.budget()) != nullptr;
  const auto items = iterate(in, container);
  Value each;
  while (items->next(&each)) {
    if (each.same_as(item) || equal(each, item, in.budget())) return true;
  }
  return false;
}

std::string hash_key(const Value& value, Budget& budget) {
  switch (value.kind()) {
    case Value::Kind::kText:
      return "s" + value.bytes();
    case Value::Kind::kNone:
      return "n";
    case Value::Kind::kUndefined:
      return "u";
    case Value::Kind::kBool:
    case Value::Kind::kInt:
      return "i" + std::to_string(value.as_int());
    case Value::Kind::kFloat: {
      const double d = value.as_double();
      if (std::floor(d) == d && std::fabs(d) < 9.2e18) {
        return "i" + std::to_string(static_cast<int64_t>(d));
      }
      return "f" + float_repr(d);
    }
    case Value::Kind::kList:
      if (value.is_tuple()) {
        std::string key = "(";
        for (const Value& item : value.items()) {
          budget.charge(1);
          const std::string part = hash_key(item, budget);
          key += std::to_string(part.size()) + ":" + part;
        }
        return key;
      }
      fail("unhashable type: 'list'");
    case Value::Kind::kDict:
      fail("unhashable type: 'dict'");
    case Value::Kind::kObject:
      return "o" + std::to_string(reinterpret_cast<uintptr_t>(&value.object()));
  }
  return "";
}

int64_t length(const Value& value) {
  switch (value.kind()) {
    case Value::Kind::kUndefined:
      return 0;
    case Value::Kind::kText:
      return static_cast<int64_t>(unicode::count_code_points(value.bytes()));
    case Value::Kind::kList:
      return static_cast<int64_t>(value.items().size());
    case Value::Kind::kDict:
      return static_cast<int64_t>(value.dict().entries.size());
    case Value::Kind::kObject:
      if (const auto n = value.object().length()) return *n;
      [[fallthrough]];
    default:
      fail("object of type '", type_name(value), "' has no len()");
  }
}

namespace {

struct EmptyIterator : Iterator {
  bool next(Value*) override { return false; }
};

struct ListIterator : Iterator {
  explicit ListIterator(Value v) : list(std::move(v)) {}
  bool next(Value* out) override {
    if (at == list.items().size()) return false;
    *out = list.items()[at++];
    return true;
  }
  Value list;
  size_t at = 0;
};

struct DictIterator : Iterator {
  explicit DictIterator(Value v) : dict(std::move(v)) {}
  bool next(Value* out) override {
    if (at == dict.dict().entries.size()) return false;
    *out = dict.dict().entries[at++].first;
    return true;
  }
  Value dict;
  size_t at = 0;
};

struct TextIterator : Iterator {
  explicit TextIterator(Value v) : text(std::move(v)) {}
  bool next(Value* out) override {
    if (at == text.text().size()) return false;
    const size_t begin = at;
    unicode::next_code_point(text.bytes(), &at);
    Text c = text.text().sub(begin, at);
    c.markup = false;
    *out = Value(std::move(c));
    return true;
  }
  Value text;
  size_t at = 0;
};

std::unique_ptr<Iterator> try_iterate(Interpreter& in, const Value& value) {
  switch (value.kind()) {
    case Value::Kind::kUndefined:
      return std::make_unique<EmptyIterator>();
    case Value::Kind::kText:
      return std::make_unique<TextIterator>(value);
    case Value::Kind::kList:
      return std::make_unique<ListIterator>(value);
    case Value::Kind::kDict:
      return std::make_unique<DictIterator>(value);
    case Value::Kind::kObject:
      return value.object().iterate(in);
    default:
      return nullptr;
  }
}

}  // namespace

std::unique_ptr<Iterator> iterate(Interpreter& in, const Value& value) {
  auto iterator = try_iterate(in, value);
  if (!iterator) fail("'", type_name(value), "' object is not iterable");
  return iterator;
}

bool is_iterable(Interpreter& in, const Value& value) { return try_iterate(in, value) != nullptr; }

std::vector<Value> to_items(Interpreter& in, const Value& value) {
  const auto iterator = iterate(in, value);
  std::vector<Value> items;
  Value item;
  while (iterator->next(&item)) {
    in.budget().charge(1);
    items.push_back(item);
  }
  return items;
}

Text repr_text(const Text& text) {
  const bool double_quotes =
      text.bytes.find('\'') != std::string::npos && text.bytes.find('"') == std::string::npos;
  const char quote = double_quotes ? '"' : '\'';
  Text out(std::string_view(&quote, 1));
  for (size_t i = 0; i < text.size();) {
    const size_t at = i;
    const char32_t c = unicode::next_code_point(text.bytes, &i);
    const bool outside = text.outside(at);
    if (c == static_cast<char32_t>(quote) || c == '\\') {
      out.append("\\", outside);
      out.append(text, at, i);
    } else if (c == '\n' || c == '\r' || c == '\t') {
      out.append(c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t", outside);
    } else if (c < 0x20 || c == 0x7f || (c > 0x7f && !unicode::is_printable(c))) {
      out.append(escape_character(c), outside);
    } else {
      out.append(text, at, i);
    }
  }
  out.append(std::string_view(&quote, 1));
  return out;
}

Text repr(Interpreter& in, const Value& value) {
  const DepthGuard guard(in.budget());
  in.budget().charge(1);
  switch (value.kind()) {
    case Value::Kind::kUndefined:
      return Text("Undefined");
    case Value::Kind::kNone:
      return Text("None");
    case Value::Kind::kBool:
      return Text(value.as_bool() ? "True" : "False");
    case Value::Kind::kInt:
      return Text(std::to_string(value.as_int()));
    case Value::Kind::kFloat:
      return Text(float_repr(value.as_double()));
    case Value::Kind::kText: {
      Text out;
      if (value.text().markup) out.append("Markup(");
      out.append(repr_text(value.text()));
      if (value.text().markup) out.append(")");
      in.budget().charge_text(out.size());
      return out;
    }
    case Value::Kind::kList: {
      Text out(value.is_tuple() ? "(" : "[");
      for (size_t i = 0; i < value.items().size(); i++) {
        if (i) out.append(", ");
        out.append(repr(in, value.items()[i]));
        if (out.size() > in.budget().max_bytes) in.budget().charge_text(out.size());
      }
      if (value.is_tuple() && value.items().size() == 1) out.append(",");
      out.append(value.is_tuple() ? ")" : "]");
      in.budget().charge_text(out.size());
      return out;
    }
    case Value::Kind::kDict: {
      Text out("{");
      for (size_t i = 0; i < value.dict().entries.size(); i++) {
        if (i) out.append(", ");
        out.append(repr(in, value.dict().entries[i].first));
        out.append(": ");
        out.append(repr(in, value.dict().entries[i].second));
        if (out.size() > in.budget().max_bytes) in.budget().charge_text(out.size());
      }
      out.append("}");
      in.budget().charge_text(out.size());
      return out;
    }
    case Value::Kind::kObject:
      return value.object().repr(in);
  }
  return {};
}

Text to_text(Interpreter& in, const Value& value) {
  if (value.is_text()) return value.text();
  if (value.is_undefined()) return {};
  return repr(in, value);
}

}  // namespace mustafar::jinja
