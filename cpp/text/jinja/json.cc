#include "text/jinja/json.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "text/jinja/format.h"
#include "text/jinja/interpreter.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {
namespace {

void append_string(const Text& text, bool ensure_ascii, Text* out) {
  out->append("\"");
  for (size_t i = 0; i < text.size();) {
    const size_t at = i;
    char32_t c = unicode::next_code_point(text.bytes, &i);
    const bool outside = text.outside(at);
    const char* named = c == '"'    ? "\\\""
                        : c == '\\' ? "\\\\"
                        : c == '\n' ? "\\n"
                        : c == '\r' ? "\\r"
                        : c == '\t' ? "\\t"
                        : c == '\f' ? "\\f"
                        : c == '\b' ? "\\b"
                                    : nullptr;
    char escape[16];
    if (named) {
      out->append(named, outside);
    } else if (c >= 0x10000 && ensure_ascii) {
      c -= 0x10000;
      std::snprintf(escape, sizeof(escape), "\\u%04x\\u%04x", 0xd800 | (c >> 10 & 0x3ff),
                    0xdc00 | (c & 0x3ff));
      out->append(escape, outside);
    } else if (c < 0x20 || (ensure_ascii && c > 0x7e)) {
      std::snprintf(escape, sizeof(escape), "\\u%04x", c);
      out->append(escape, outside);
    } else {
      out->append(text, at, i);
    }
  }
  out->append("\"");
}

std::string json_float(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value < 0 ? "-Infinity" : "Infinity";
  return float_repr(value);
}

Text key_text(Interpreter& in, const Value& key) {
  if (key.is_text()) return key.text();
  if (key.is_bool()) return Text(key.as_bool() ? "true" : "false");
  if (key.is_none()) return Text("null");
  if (key.is_float()) return Text(json_float(key.as_double()));
  if (key.is_int()) return to_text(in, key);
  fail("keys must be str, int, float, bool or None, not ", type_name(key));
}

class Writer {
 public:
  Writer(Interpreter& in, const JsonStyle& style) : in_(in), style_(style) {}

  void write(const Value& value, int level) {
    const DepthGuard guard(in_.budget());
    in_.budget().charge(1);
    if (out.size() > in_.budget().max_bytes) in_.budget().charge_text(out.size());
    switch (value.kind()) {
      case Value::Kind::kNone:
        out.append("null");
        return;
      case Value::Kind::kBool:
        out.append(value.as_bool() ? "true" : "false");
        return;
      case Value::Kind::kInt:
        out.append(std::to_string(value.as_int()));
        return;
      case Value::Kind::kFloat:
        out.append(json_float(value.as_double()));
        return;
      case Value::Kind::kText:
        in_.budget().charge_text(value.text().size());
        append_string(value.text(), style_.ensure_ascii, &out);
        return;
      case Value::Kind::kList:
        write_list(value.items(), level);
        return;
      case Value::Kind::kDict:
        write_dict(value.dict(), level);
        return;
      default:
        fail("Object of type ", type_name(value), " is not JSON serializable");
    }
  }

  Text out;

 private:
  void new_line(int level) {
    if (!style_.indent) return;
    out.append("\n");
    out.pad(static_cast<size_t>(level), *style_.indent);
  }

  void write_list(const std::vector<Value>& items, int level) {
    if (items.empty()) return out.append("[]");
    out.append("[");
    for (size_t i = 0; i < items.size(); i++) {
      if (i) out.append(style_.item_separator);
      new_line(level + 1);
      write(items[i], level + 1);
    }
    new_line(level);
    out.append("]");
  }

  void write_dict(const Dict& dict, int level) {
    if (dict.entries.empty()) return out.append("{}");
    std::vector<const std::pair<Value, Value>*> entries;
    for (const auto& entry : dict.entries) entries.push_back(&entry);
    if (style_.sort_keys) {
      std::stable_sort(entries.begin(), entries.end(), [&](const auto* a, const auto* b) {
        return ordered(a->first, b->first, "<", in_.budget());
      });
    }
    out.append("{");
    for (size_t i = 0; i < entries.size(); i++) {
      if (i) out.append(style_.item_separator);
      new_line(level + 1);
      append_string(key_text(in_, entries[i]->first), style_.ensure_ascii, &out);
      out.append(style_.key_separator);
      write(entries[i]->second, level + 1);
    }
    new_line(level);
    out.append("}");
  }

  Interpreter& in_;
  const JsonStyle& style_;
};

// Builds values while nlohmann's parser reads, so that depth and integers are checked as they come.
class Builder : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Builder(const char* what) : what_(what) {}

  bool null() override { return add(Value()); }
  bool boolean(bool b) override { return add(Value(b)); }
  bool number_integer(int64_t i) override { return add(Value(i)); }
  bool number_unsigned(uint64_t u) override {
    if (u > static_cast<uint64_t>(INT64_MAX)) too_big();
    return add(Value(static_cast<int64_t>(u)));
  }
  bool number_float(double d, const std::string& text) override {
    if (text.find_first_of(".eE") == std::string::npos) too_big();
    return add(Value(d));
  }
  bool string(std::string& s) override { return add(Value(Text(s, true))); }
  bool binary(nlohmann::json::binary_t&) override { return false; }
  bool start_object(size_t) override { return open(true); }
  bool start_array(size_t) override { return open(false); }
  bool key(std::string& s) override {
    stack_.back().key = Value(Text(s, true));
    return true;
  }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::json::exception& e) override {
    throw std::invalid_argument(concat(what_, ": not JSON at byte ", position, ": ", e.what()));
  }

  Value result;

 private:
  struct Level {
    bool is_dict = false;
    Value key;
    std::vector<Value> items;
    std::shared_ptr<Dict> dict;
  };

  [[noreturn]] void too_big() {
    throw std::invalid_argument(concat(what_, ": an integer beyond 64 bits is not supported"));
  }

  bool open(bool is_dict) {
    if (stack_.size() + 1 >= kMaxContainerDepth) {
      throw std::invalid_argument(
          concat(what_, ": nested deeper than ", kMaxContainerDepth, " levels"));
    }
    stack_.emplace_back();
    stack_.back().is_dict = is_dict;
    if (is_dict) stack_.back().dict = std::make_shared<Dict>();
    return true;
  }

  bool close() {
    Level level = std::move(stack_.back());
    stack_.pop_back();
    return add(level.is_dict ? Value(std::shared_ptr<const Dict>(level.dict))
                             : Value::list(std::move(level.items)));
  }

  bool add(Value value) {
    if (stack_.empty()) {
      result = std::move(value);
    } else if (stack_.back().is_dict) {
      stack_.back().dict->set(stack_.back().key, std::move(value), budget_);
    } else {
      stack_.back().items.push_back(std::move(value));
    }
    return true;
  }

  const char* what_;
  std::vector<Level> stack_;
  Budget budget_{.steps = INT64_MAX, .max_bytes = SIZE_MAX, .max_depth = 1};
};

}  // namespace

Text to_json(Interpreter& in, const Value& value, const JsonStyle& style) {
  Writer writer(in, style);
  writer.write(value, 0);
  in.budget().charge_text(writer.out.size());
  return std::move(writer.out);
}

Value parse_json(std::string_view json, const char* what) {
  Builder builder(what);
  nlohmann::json::sax_parse(json.begin(), json.end(), &builder);
  return builder.result;
}

}  // namespace mustafar::jinja
