// Python's arithmetic and slicing.
#include <algorithm>
#include <cmath>

#include "text/jinja/format.h"
#include "text/jinja/interpreter.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {
namespace {

[[noreturn]] void unsupported_operands(const std::string& op, const Value& a, const Value& b) {
  if (a.is_undefined()) fail(a.undefined().message);
  if (b.is_undefined()) fail(b.undefined().message);
  fail("unsupported operand type(s) for ", op, ": '", type_name(a), "' and '", type_name(b), "'");
}

Value from_wide(__int128 value) {
  if (value > INT64_MAX || value < INT64_MIN) unsupported("an integer beyond 64 bits");
  return Value(static_cast<int64_t>(value));
}

Value repeat(Interpreter& in, const Value& sequence, int64_t count) {
  count = std::max<int64_t>(count, 0);
  if (sequence.is_text()) {
    const Text& unit = sequence.text();
    if (unit.size() && count > static_cast<int64_t>(in.budget().max_bytes / unit.size())) {
      fail("text grows beyond ", in.budget().max_bytes, " bytes");
    }
    in.budget().charge_text(unit.size() * static_cast<size_t>(count));
    Text out;
    out.markup = unit.markup;
    if (unit.empty()) return Value(std::move(out));
    for (int64_t i = 0; i < count; i++) out.append(unit);
    return Value(std::move(out));
  }
  const auto& unit = sequence.items();
  if (unit.empty()) count = 0;
  if (count > in.budget().steps) in.budget().charge(count);
  in.budget().charge(count * static_cast<int64_t>(unit.size()));
  std::vector<Value> items;
  for (int64_t i = 0; i < count; i++) items.insert(items.end(), unit.begin(), unit.end());
  return Value::list(std::move(items), sequence.is_tuple());
}

Value multiply(Interpreter& in, const Value& a, const Value& b) {
  if (a.is_integral() && b.is_integral()) {
    return from_wide(static_cast<__int128>(a.as_int()) * b.as_int());
  }
  if (a.is_number() && b.is_number()) return Value(a.as_double() * b.as_double());
  if ((a.is_text() || a.is_list()) && b.is_integral()) return repeat(in, a, b.as_int());
  if ((b.is_text() || b.is_list()) && a.is_integral()) return repeat(in, b, a.as_int());
  unsupported_operands("*", a, b);
}

int64_t floor_divide(int64_t a, int64_t b) {
  const int64_t q = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? q - 1 : q;
}

double float_modulo(double a, double b) {
  double r = std::fmod(a, b);
  if (r != 0) {
    if ((b < 0) != (r < 0)) r += b;
  } else {
    r = std::copysign(0.0, b);
  }
  return r;
}

double float_floor_divide(double a, double b) {
  double r = std::fmod(a, b);
  double q = (a - r) / b;
  if (r != 0 && (b < 0) != (r < 0)) q -= 1;
  if (q == 0) return std::copysign(0.0, a / b);
  double whole = std::floor(q);
  if (q - whole > 0.5) whole += 1;
  return whole;
}

Value divide(const std::string& op, const Value& a, const Value& b) {
  if (!a.is_number() || !b.is_number()) unsupported_operands(op, a, b);
  if (b.as_double() == 0)
    fail(op == "/" ? "division by zero" : "integer division or modulo by zero");
  const bool integral = a.is_integral() && b.is_integral();
  if (op == "/") return Value(a.as_double() / b.as_double());
  if (integral && b.as_int() == -1) {
    return op == "//" ? from_wide(-static_cast<__int128>(a.as_int())) : Value(int64_t{0});
  }
  if (op == "//") {
    return integral ? Value(floor_divide(a.as_int(), b.as_int()))
                    : Value(float_floor_divide(a.as_double(), b.as_double()));
  }
  if (!integral) return Value(float_modulo(a.as_double(), b.as_double()));
  return Value(a.as_int() - b.as_int() * floor_divide(a.as_int(), b.as_int()));
}

Value power(const Value& a, const Value& b) {
  if (!a.is_number() || !b.is_number()) unsupported_operands("** or pow()", a, b);
  if (a.is_integral() && b.is_integral() && b.as_int() >= 0) {
    __int128 result = 1;
    const __int128 base = a.as_int();
    if (base == 0 || base == 1 || base == -1) {
      return Value(b.as_int() == 0                     ? int64_t{1}
                   : base == -1 && b.as_int() % 2 == 0 ? int64_t{1}
                                                       : a.as_int());
    }
    for (int64_t i = 0; i < b.as_int(); i++) {
      result *= base;
      if (result > INT64_MAX || result < INT64_MIN) unsupported("an integer beyond 64 bits");
    }
    return Value(static_cast<int64_t>(result));
  }
  const double x = a.as_double(), y = b.as_double();
  if (x == 0 && y < 0) fail("0.0 cannot be raised to a negative power");
  if (x < 0 && std::isfinite(x) && std::isfinite(y) && std::floor(y) != y)
    unsupported("a complex number");
  const double result = std::pow(x, y);
  if (std::isinf(result) && std::isfinite(x) && std::isfinite(y))
    fail("Numerical result out of range");
  return Value(result);
}

}  // namespace

Value add(Interpreter& in, const Value& a, const Value& b) {
  if (a.is_integral() && b.is_integral()) {
    return from_wide(static_cast<__int128>(a.as_int()) + b.as_int());
  }
  if (a.is_number() && b.is_number()) return Value(a.as_double() + b.as_double());
  if (a.is_text() && b.is_text()) {
    const bool markup = a.text().markup || b.text().markup;
    Text out = markup && !a.text().markup ? escape_html(a.text()) : a.text();
    out.append(markup && !b.text().markup ? escape_html(b.text()) : b.text());
    out.markup = markup;
    in.budget().charge_text(out.size());
    return Value(std::move(out));
  }
  if (a.is_list() && b.is_list() && a.is_tuple() == b.is_tuple()) {
    std::vector<Value> items = a.items();
    items.insert(items.end(), b.items().begin(), b.items().end());
    in.budget().charge(static_cast<int64_t>(items.size()));
    return Value::list(std::move(items), a.is_tuple());
  }
  unsupported_operands("+", a, b);
}

Value binary_operation(Interpreter& in, const std::string& op, const Value& a, const Value& b) {
  if (op == "+") return add(in, a, b);
  if (op == "-") {
    if (!a.is_number() || !b.is_number()) unsupported_operands("-", a, b);
    if (a.is_float() || b.is_float()) return Value(a.as_double() - b.as_double());
    return from_wide(static_cast<__int128>(a.as_int()) - b.as_int());
  }
  if (op == "*") return multiply(in, a, b);
  if (op == "**") return power(a, b);
  if (op == "%" && a.is_text()) {
    if (a.text().markup) unsupported("'%' on escaped text");
    return Value(percent_format(in, a.text(), b));
  }
  return divide(op, a, b);
}

Value unary_operation(const std::string& op, const Value& a) {
  if (a.is_undefined()) fail(a.undefined().message);
  if (!a.is_number()) fail("bad operand type for unary ", op, ": '", type_name(a), "'");
  if (op == "+") return a.is_float() ? a : Value(a.as_int());
  return a.is_float() ? Value(-a.as_double()) : from_wide(-static_cast<__int128>(a.as_int()));
}

Value join_texts(Interpreter& in, const std::vector<Value>& values, const Text& separator) {
  Text out;
  for (size_t i = 0; i < values.size(); i++) {
    if (i) out.append(separator);
    out.append(to_text(in, values[i]));
    if (out.size() > in.budget().max_bytes) break;
  }
  in.budget().charge_text(out.size());
  return Value(std::move(out));
}

Value slice_value(Interpreter& in, const Value& value, const Value* start, const Value* stop,
                  const Value* step) {
  if (value.is_undefined()) fail(value.undefined().message);
  if (!value.is_text() && !value.is_list()) {
    if (value.is_object() && value.object().type_name() == "range") unsupported("slicing a range");
    fail("'", type_name(value), "' object is not subscriptable by a slice");
  }
  const auto bound = [](const Value* v) -> std::optional<int64_t> {
    if (!v || v->is_none()) return std::nullopt;
    if (v->is_undefined()) fail("slice indices must be integers or None");
    if (!v->is_integral())
      fail("slice indices must be integers or None or have an __index__ method");
    return v->as_int();
  };
  const int64_t stride = bound(step).value_or(1);
  if (stride == 0) fail("slice step cannot be zero");
  std::vector<size_t> offsets;
  if (value.is_text()) offsets = unicode::code_point_offsets(value.bytes());
  const int64_t n = value.is_text() ? static_cast<int64_t>(offsets.size()) - 1
                                    : static_cast<int64_t>(value.items().size());
  const auto clamp = [&](std::optional<int64_t> v, int64_t otherwise) {
    if (!v) return otherwise;
    const int64_t low = stride < 0 ? -1 : 0, high = stride < 0 ? n - 1 : n;
    return std::clamp(*v < 0 ? *v + n : *v, low, high);
  };
  const int64_t first = clamp(bound(start), stride < 0 ? n - 1 : 0);
  const int64_t last = clamp(bound(stop), stride < 0 ? -1 : n);
  in.budget().charge(1 + std::abs(last - first) / (value.is_text() ? 16 : 1));
  if (value.is_text() && stride == 1) {
    return Value(first < last ? value.text().sub(offsets[first], offsets[last]) : Text());
  }
  Text text;
  std::vector<Value> items;
  for (int64_t i = first; stride > 0 ? i < last : i > last;) {
    if (value.is_text()) {
      text.append(value.text(), offsets[i], offsets[i + 1]);
    } else {
      items.push_back(value.items()[i]);
    }
    if (__builtin_add_overflow(i, stride, &i)) break;
  }
  if (value.is_list()) return Value::list(std::move(items), value.is_tuple());
  text.markup = value.text().markup;
  return Value(std::move(text));
}

}  // namespace mustafar::jinja
