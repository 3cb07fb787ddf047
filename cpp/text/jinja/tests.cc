// The tests that follow `is`.
#include <cmath>
#include <unordered_map>

#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/objects.h"

namespace mustafar::jinja {

namespace {

using Kind = Value::Kind;

// A test without arguments.
template <bool (*kTest)(Interpreter&, const Value&)>
bool plain(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("test", args, {});
  return kTest(in, value);
}

bool is_defined(Interpreter&, const Value& v) { return !v.is_undefined(); }
bool is_undefined(Interpreter&, const Value& v) { return v.is_undefined(); }
bool is_none(Interpreter&, const Value& v) { return v.is_none(); }
bool is_boolean(Interpreter&, const Value& v) { return v.is_bool(); }
bool is_true(Interpreter&, const Value& v) { return v.is_bool() && v.as_bool(); }
bool is_false(Interpreter&, const Value& v) { return v.is_bool() && !v.as_bool(); }
bool is_integer(Interpreter&, const Value& v) { return v.is_int(); }
bool is_float(Interpreter&, const Value& v) { return v.is_float(); }
bool is_number(Interpreter&, const Value& v) { return v.is_number(); }
bool is_string(Interpreter&, const Value& v) { return v.is_text(); }
bool is_mapping(Interpreter&, const Value& v) { return v.is_dict(); }
bool is_escaped(Interpreter&, const Value& v) { return v.is_text() && v.text().markup; }
bool is_callable(Interpreter&, const Value& v) {
  return v.is_undefined() || (v.is_object() && v.object().callable());
}
bool is_sequence(Interpreter&, const Value& v) {
  return v.is_undefined() || v.is_text() || v.is_list() || v.is_dict() ||
         (v.is_object() && v.object().type_name() == "range");
}
bool is_lower_text(Interpreter& in, const Value& v) {
  return text_is_case(to_text(in, v).bytes, false);
}
bool is_upper_text(Interpreter& in, const Value& v) {
  return text_is_case(to_text(in, v).bytes, true);
}

bool has_remainder(Interpreter& in, const Value& value, const Value& divisor,
                   const Value& expected) {
  return equal(binary_operation(in, "%", value, divisor), expected, in.budget());
}
bool is_odd(Interpreter& in, const Value& v) {
  return has_remainder(in, v, Value(int64_t{2}), Value(int64_t{1}));
}
bool is_even(Interpreter& in, const Value& v) {
  return has_remainder(in, v, Value(int64_t{2}), Value(int64_t{0}));
}

bool is_divisible(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("divisibleby", args, {"num"}, 1);
  return has_remainder(in, value, *a[0], Value(int64_t{0}));
}

bool is_in(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("in", args, {"seq"}, 1);
  return contains(in, *a[0], value);
}

bool is_same(Interpreter&, const Value& value, CallArgs& args) {
  const Arguments a("sameas", args, {"other"}, 1);
  const bool same = value.same_as(*a[0]);
  if (!same && value.is_text() && a[0]->is_text() && value.bytes() == a[0]->bytes()) {
    unsupported("'sameas' between equal texts");
  }
  return same;
}

bool is_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("filter", args, {});
  hash_key(value, in.budget());  // an unhashable value raises
  return value.is_text() && has_filter(value.bytes());
}

bool is_test(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("test", args, {});
  hash_key(value, in.budget());
  return value.is_text() && has_test(value.bytes());
}

template <bool kWanted>
bool equality(Interpreter& in, const Value& value, CallArgs& args) {
  if (!args.keyword.empty()) fail("eq() takes no keyword arguments");
  const Arguments a("eq", args, {"other"}, 1);
  return equal(value, *a[0], in.budget()) == kWanted;
}

template <char kFirst, bool kOrEqual>
bool order(Interpreter& in, const Value& value, CallArgs& args) {
  if (!args.keyword.empty()) fail("lt() takes no keyword arguments");
  const Arguments a("lt", args, {"other"}, 1);
  const char op[] = {kFirst, kOrEqual ? '=' : '\0', '\0'};
  return ordered(value, *a[0], op, in.budget());
}

}  // namespace

const Test* find_test(const std::string& name) {
  static const std::unordered_map<std::string, Test> kTests = {
      {"odd", plain<is_odd>},
      {"even", plain<is_even>},
      {"divisibleby", is_divisible},
      {"defined", plain<is_defined>},
      {"undefined", plain<is_undefined>},
      {"filter", is_filter},
      {"test", is_test},
      {"none", plain<is_none>},
      {"boolean", plain<is_boolean>},
      {"true", plain<is_true>},
      {"false", plain<is_false>},
      {"integer", plain<is_integer>},
      {"float", plain<is_float>},
      {"lower", plain<is_lower_text>},
      {"upper", plain<is_upper_text>},
      {"string", plain<is_string>},
      {"mapping", plain<is_mapping>},
      {"number", plain<is_number>},
      {"sequence", plain<is_sequence>},
      {"iterable", plain<is_iterable>},
      {"callable", plain<is_callable>},
      {"sameas", is_same},
      {"escaped", plain<is_escaped>},
      {"in", is_in},
      {"==", equality<true>},
      {"eq", equality<true>},
      {"equalto", equality<true>},
      {"!=", equality<false>},
      {"ne", equality<false>},
      {">", order<'>', false>},
      {"gt", order<'>', false>},
      {"greaterthan", order<'>', false>},
      {">=", order<'>', true>},
      {"ge", order<'>', true>},
      {"<", order<'<', false>},
      {"lt", order<'<', false>},
      {"lessthan", order<'<', false>},
      {"<=", order<'<', true>},
      {"le", order<'<', true>},
  };
  const auto at = kTests.find(name);
  return at == kTests.end() ? nullptr : &at->second;
}

}  // namespace mustafar::jinja
