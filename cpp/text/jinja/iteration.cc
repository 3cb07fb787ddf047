// Lengths of values, and the items that they yield.
#include "text/jinja/interpreter.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {

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

}  // namespace mustafar::jinja
