#include <algorithm>
#include <cmath>

#include "text/jinja/filters.h"
#include "text/jinja/format.h"
#include "text/jinja/json.h"
#include "text/jinja/objects.h"
#include "text/unicode/properties.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {
namespace {

Value made(Interpreter& in, Text text) {
  in.budget().charge_text(text.size());
  return Value(std::move(text));
}

// Calls the value's own method for a filter that only converts to text first.
Value by_method(Interpreter& in, const char* method, const Value& value, CallArgs& args) {
  return (**find_text_method(method))(in, Value(to_text(in, value)), args);
}

Value upper_filter(Interpreter& in, const Value& value, CallArgs& args) {
  return by_method(in, "upper", value, args);
}
Value lower_filter(Interpreter& in, const Value& value, CallArgs& args) {
  return by_method(in, "lower", value, args);
}
Value capitalize_filter(Interpreter& in, const Value& value, CallArgs& args) {
  return by_method(in, "capitalize", value, args);
}
Value trim_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("trim", args, {"chars"});
  CallArgs rest;
  if (a[0]) rest.positional.push_back(*a[0]);
  return by_method(in, "strip", value, rest);
}
Value center_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("center", args, {"width"});
  CallArgs rest;
  rest.positional.push_back(a[0] ? *a[0] : Value(int64_t{80}));
  return by_method(in, "center", value, rest);
}

Value string_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("string", args, {});
  return Value(to_text(in, value));
}

Value title_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("title", args, {});
  const Text text = to_text(in, value);
  Text out;
  const auto is_gap = [](char32_t c) {
    return unicode::is_space(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
  };
  // Pieces between gaps, and the gaps themselves: first character upper, the rest lower.
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    size_t first_end = i;
    const bool gap = is_gap(unicode::next_code_point(text.bytes, &first_end));
    i = first_end;
    while (i < text.size()) {
      size_t next = i;
      if (is_gap(unicode::next_code_point(text.bytes, &next)) != gap) break;
      i = next;
    }
    out.append(map_case(text.sub(begin, first_end), CaseMap::kUpper));
    out.append(map_case(text.sub(first_end, i), CaseMap::kLower));
  }
  return made(in, std::move(out));
}

Value replace_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("replace", args, {"old", "new", "count"}, 2);
  const bool all = !a[2] || a[2]->is_none();
  Text text = to_text(in, value);
  text.markup = false;
  return made(in, replace(text, to_text(in, *a[0]), to_text(in, *a[1]), all ? -1 : a.integer(2, -1),
                          in.budget().max_bytes));
}

Value default_filter(Interpreter&, const Value& value, CallArgs& args) {
  const Arguments a("default", args, {"default_value", "boolean"});
  if (value.is_undefined() || (a.flag(1, false) && !truthy(value)))
    return a[0] ? *a[0] : Value(Text());
  return value;
}

Value safe_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("safe", args, {});
  Text text = to_text(in, value);
  text.markup = true;
  return Value(std::move(text));
}

Value escape_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("escape", args, {});
  if (value.is_text() && value.text().markup) return value;
  return made(in, escape_html(to_text(in, value)));
}

Value forceescape_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("forceescape", args, {});
  return made(in, escape_html(to_text(in, value)));
}

Value indent_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("indent", args, {"width", "first", "blank"});
  if (value.is_undefined()) fail(value.undefined().message);
  if (!value.is_text())
    fail("unsupported operand type(s) for +=: '", type_name(value), "' and 'str'");
  Text indention;
  if (a[0] && a[0]->is_text()) {
    indention = a[0]->text();
  } else {
    const int64_t width = std::max<int64_t>(a.integer(0, 4), 0);
    in.budget().charge_text(static_cast<size_t>(width));
    indention.pad(static_cast<size_t>(width));
  }
  Text text = value.text();
  text.append("\n");
  const std::vector<Text> lines = split_lines(text);
  in.budget().charge_text(text.size() + lines.size() * indention.size());
  Text out;
  out.markup = value.text().markup;
  if (a.flag(1, false)) out.append(indention);
  for (size_t i = 0; i < lines.size(); i++) {
    if (i) {
      out.append("\n");
      if (a.flag(2, false) || !lines[i].empty()) out.append(indention);
    }
    out.append(lines[i]);
  }
  return made(in, std::move(out));
}

Value truncate_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("truncate", args, {"length", "killwords", "end", "leeway"});
  const int64_t length = a.integer(0, 255);
  const Text end = a[2] ? to_text(in, *a[2]) : Text("...");
  if (a[2] && !a[2]->is_text()) fail("truncate() argument 'end' must be str");
  const int64_t leeway = a[3] && !a[3]->is_none() ? a.integer(3, 5) : 5;
  const int64_t end_length = static_cast<int64_t>(unicode::count_code_points(end.bytes));
  if (length < end_length) fail("expected length >= ", end_length, ", got ", length);
  if (leeway < 0) fail("expected leeway >= 0, got ", leeway);
  if (jinja::length(value) <= length + leeway) return value;
  if (!value.is_text()) unsupported("truncate of a value that is not text");
  const auto offsets = unicode::code_point_offsets(value.bytes());
  Text kept = value.text().sub(0, offsets[length - end_length]);
  if (!a.flag(1, false)) {
    const size_t space = kept.bytes.rfind(' ');
    if (space != std::string::npos) kept = kept.sub(0, space);
  }
  kept.append(end);
  return made(in, std::move(kept));
}

Value wordcount_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("wordcount", args, {});
  const Text text = to_text(in, value);
  int64_t words = 0;
  bool in_word = false;
  for (size_t i = 0; i < text.size();) {
    const char32_t c = unicode::next_code_point(text.bytes, &i);
    const bool word = unicode::is_alnum(c) || c == '_';
    words += word && !in_word;
    in_word = word;
  }
  return Value(words);
}

Value striptags_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("striptags", args, {});
  Text text = to_text(in, value);
  if (text.bytes.find('&') != std::string::npos) unsupported("striptags of text with entities");
  for (const auto& [open, close] : {std::pair("<!--", "-->"), std::pair("<", ">")}) {
    Text kept;
    size_t at = 0;
    while (true) {
      const size_t begin = text.bytes.find(open, at);
      const size_t end = begin == std::string::npos ? begin : text.bytes.find(close, begin);
      if (end == std::string::npos) break;
      kept.append(text, at, begin);
      at = end + std::string_view(close).size();
    }
    kept.append(text, at, text.size());
    text = kept;
  }
  Text out;
  const std::vector<Text> words = split(text, nullptr, -1, false);
  for (size_t i = 0; i < words.size(); i++) {
    if (i) out.append(" ");
    out.append(words[i]);
  }
  return made(in, std::move(out));
}

Value urlencode_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("urlencode", args, {});
  if (!value.is_text() && is_iterable(in, value))
    unsupported("urlencode of a value that is not text");
  const Text text = to_text(in, value);
  Text out;
  for (size_t i = 0; i < text.size(); i++) {
    const uint8_t c = static_cast<uint8_t>(text.bytes[i]);
    if (c < 0x80 && (std::isalnum(c) || std::string_view("_.-~/").find(static_cast<char>(c)) !=
                                            std::string_view::npos)) {
      out.append(text, i, i + 1);
    } else {
      char escape[4];
      std::snprintf(escape, sizeof(escape), "%%%02X", c);
      out.append(escape, text.outside(i));
    }
  }
  return made(in, std::move(out));
}

Value format_filter(Interpreter& in, const Value& value, CallArgs& args) {
  if (!args.positional.empty() && !args.keyword.empty()) {
    fail("can't handle positional and keyword arguments at the same time");
  }
  const Text text = to_text(in, value);
  if (text.markup) unsupported("format of escaped text");
  if (args.keyword.empty())
    return Value(percent_format(in, text, Value::list(args.positional, true)));
  auto named = std::make_shared<Dict>();
  for (const auto& [key, each] : args.keyword)
    named->set(Value(std::string_view(key)), each, in.budget());
  return Value(percent_format(in, text, Value(std::shared_ptr<const Dict>(std::move(named)))));
}

Value int_filter(Interpreter&, const Value& value, CallArgs& args) {
  const Arguments a("int", args, {"default", "base"});
  const Value otherwise = a[0] ? *a[0] : Value(int64_t{0});
  if (value.is_undefined()) fail(value.undefined().message);
  if (value.is_integral()) return Value(value.as_int());
  if (value.is_float()) {
    if (std::isinf(value.as_double())) fail("cannot convert float infinity to integer");
    const auto whole = to_integer(value.as_double());
    return whole ? Value(*whole) : otherwise;
  }
  if (!value.is_text()) return otherwise;
  if (const auto number = parse_int(value.bytes(), a.integer(1, 10))) return Value(*number);
  if (const auto number = parse_float(value.bytes())) {
    if (const auto whole = to_integer(*number)) return Value(*whole);
  }
  return otherwise;
}

Value float_filter(Interpreter&, const Value& value, CallArgs& args) {
  const Arguments a("float", args, {"default"});
  if (value.is_undefined()) fail(value.undefined().message);
  if (value.is_number()) return Value(value.as_double());
  if (value.is_text()) {
    if (const auto number = parse_float(value.bytes())) return Value(*number);
  }
  return a[0] ? *a[0] : Value(0.0);
}

Value abs_filter(Interpreter&, const Value& value, CallArgs& args) {
  const Arguments a("abs", args, {});
  if (!value.is_number()) fail("bad operand type for abs(): '", type_name(value), "'");
  if (value.is_float()) return Value(std::fabs(value.as_double()));
  return value.as_int() < 0 ? unary_operation("-", value) : Value(value.as_int());
}

Value round_filter(Interpreter&, const Value& value, CallArgs& args) {
  const Arguments a("round", args, {"precision", "method"});
  const std::string method = !a[1] ? "common" : a[1]->is_text() ? a[1]->bytes() : "";
  if (method != "common" && method != "ceil" && method != "floor") {
    fail("method must be common, ceil or floor");
  }
  const bool exact = a[0] && a[0]->is_none();  // round(value, None) gives an integer
  if (!value.is_number()) fail("type ", type_name(value), " doesn't define __round__ method");
  const int64_t precision = exact ? 0 : a.integer(0, 0);
  const double d = value.as_double();
  if (method == "common") {
    if (exact) {
      if (value.is_integral()) return Value(value.as_int());
      const auto whole = to_integer(std::nearbyint(d));
      if (!whole) fail("cannot convert float infinity or NaN to integer");
      return Value(*whole);
    }
    if (value.is_float()) return Value(round_float(d, precision));
    if (precision >= 0) return Value(value.as_int());
    if (precision < -18) return Value(int64_t{0});
    int64_t unit = 1;
    for (int64_t i = precision; i < 0; i++) unit *= 10;
    const __int128 n = value.as_int();
    __int128 q = n / unit - (n % unit < 0 ? 1 : 0);  // floor
    const __int128 twice = (n - q * unit) * 2;
    if (twice > unit || (twice == unit && q % 2 != 0)) q++;
    return Value(static_cast<int64_t>(q * unit));
  }
  if (exact) fail("unsupported operand type(s) for ** or pow(): 'int' and 'NoneType'");
  if (std::abs(precision) > 22) unsupported("round to more than 22 digits by ceil or floor");
  const double scale = std::pow(10.0, static_cast<double>(precision));
  const double scaled = d * scale;
  if (!std::isfinite(scaled)) fail("cannot convert float infinity or NaN to integer");
  return Value((method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / scale + 0.0);
}

Value attr_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("attr", args, {"name"}, 1);
  if (!a[0]->is_text()) fail("attribute name must be string, not '", type_name(*a[0]), "'");
  if (auto attribute = type_attribute(in, value, a[0]->bytes())) return *attribute;
  if (value.is_undefined()) fail(value.undefined().message);
  return Value::undefined(
      concat("'", type_name(value), " object' has no attribute '", a[0]->bytes(), "'"));
}

Value tojson_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("tojson", args, {"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonStyle style;
  style.ensure_ascii = a.flag(0, false);
  style.sort_keys = a.flag(3, false);
  if (a[1] && !a[1]->is_none()) {
    if (a[1]->is_text()) {
      style.indent = a[1]->bytes();
    } else {
      const int64_t width = std::max<int64_t>(a.integer(1, 0), 0);
      in.budget().charge_text(static_cast<size_t>(width));
      style.indent = std::string(static_cast<size_t>(width), ' ');
    }
    style.item_separator = Text(",");
  }
  if (a[2] && !a[2]->is_none()) {
    const std::vector<Value> parts = to_items(in, *a[2]);
    if (parts.size() != 2) fail("tojson: separators must be a pair");
    if (!parts[0].is_text() || !parts[1].is_text()) fail("tojson: separators must be strings");
    style.item_separator = parts[0].text();
    style.key_separator = parts[1].text();
  }
  return Value(to_json(in, value, style));
}

}  // namespace

const FilterTable& text_filters() {
  static const FilterTable kFilters = {
      {"upper", upper_filter},
      {"lower", lower_filter},
      {"capitalize", capitalize_filter},
      {"title", title_filter},
      {"trim", trim_filter},
      {"center", center_filter},
      {"string", string_filter},
      {"replace", replace_filter},
      {"default", default_filter},
      {"d", default_filter},
      {"safe", safe_filter},
      {"escape", escape_filter},
      {"e", escape_filter},
      {"forceescape", forceescape_filter},
      {"indent", indent_filter},
      {"truncate", truncate_filter},
      {"wordcount", wordcount_filter},
      {"striptags", striptags_filter},
      {"urlencode", urlencode_filter},
      {"format", format_filter},
      {"int", int_filter},
      {"float", float_filter},
      {"abs", abs_filter},
      {"round", round_filter},
      {"attr", attr_filter},
      {"tojson", tojson_filter},
  };
  return kFilters;
}

const Filter* find_filter(const std::string& name) {
  for (const FilterTable* table : {&text_filters(), &sequence_filters()}) {
    const auto at = table->find(name);
    if (at != table->end()) return &at->second;
  }
  return nullptr;
}

std::string unknown_filter(const std::string& name) {
  for (const char* known :
       {"filesizeformat", "pprint", "random", "urlize", "wordwrap", "xmlattr"}) {
    if (name == known) return "the filter '" + name + "' is not supported by this template engine";
  }
  return "No filter named '" + name + "'";
}

}  // namespace mustafar::jinja
