#include "text/jinja/value.h"

#include <algorithm>

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

}  // namespace mustafar::jinja
