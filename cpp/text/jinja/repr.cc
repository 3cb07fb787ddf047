// str() and repr() of values.
#include "text/jinja/interpreter.h"
#include "text/jinja/numbers.h"
#include "text/unicode/properties.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {

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
        in.budget().check_size(out.size());
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
        in.budget().check_size(out.size());
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
