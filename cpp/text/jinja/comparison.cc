// Equality, order and hashes of values.
#include <cmath>
#include <compare>

#include "text/jinja/interpreter.h"
#include "text/jinja/numbers.h"

namespace mustafar::jinja {

namespace {

// NaN is unordered to everything. Exact for every int64 and double.
std::partial_ordering compare_numbers(const Value& a, const Value& b) {
  if (!a.is_float() && !b.is_float()) return a.as_int() <=> b.as_int();
  if (a.is_float() && b.is_float()) return a.as_double() <=> b.as_double();
  if (!a.is_float()) return 0 <=> compare_numbers(b, a);  // the other way round
  const double x = a.as_double();
  const int64_t i = b.as_int();
  if (!fits_int64(x)) return x <=> 0.0;  // infinities and NaN too
  const auto whole = static_cast<int64_t>(x);
  if (whole != i) return whole <=> i;
  return x - static_cast<double>(whole) <=> 0.0;
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

bool holds(std::partial_ordering order, std::string_view op) {
  if (op == "<") return order < 0;
  if (op == "<=") return order <= 0;
  if (op == ">") return order > 0;
  return order >= 0;
}

}  // namespace

bool ordered(const Value& a, const Value& b, std::string_view op, Budget& budget) {
  budget.charge(1);
  if (a.is_number() && b.is_number()) return holds(compare_numbers(a, b), op);
  if (a.is_text() && b.is_text()) return holds(a.bytes() <=> b.bytes(), op);
  if (a.is_list() && b.is_list() && a.is_tuple() == b.is_tuple()) {
    const auto &x = a.items(), &y = b.items();
    for (size_t i = 0; i < x.size() && i < y.size(); i++) {
      if (!x[i].same_as(y[i]) && !equal(x[i], y[i], budget)) return ordered(x[i], y[i], op, budget);
    }
    return holds(x.size() <=> y.size(), op);
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
      if (std::floor(d) == d && fits_int64(d)) {
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

}  // namespace mustafar::jinja
