// The methods of Python's str.
#include <algorithm>
#include <unordered_map>

#include "text/jinja/format.h"
#include "text/jinja/objects.h"
#include "text/unicode/properties.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {
namespace {

Value made(Interpreter& in, Text text) {
  in.budget().charge_text(text.size());
  return Value(std::move(text));
}

Value made(Interpreter& in, std::vector<Text> parts) {
  std::vector<Value> items;
  size_t bytes = 0;
  for (Text& part : parts) {
    bytes += part.size();
    items.emplace_back(std::move(part));
  }
  in.budget().charge_text(bytes);
  in.budget().charge(static_cast<int64_t>(items.size()));
  return Value::list(std::move(items));
}

void no_keywords(const char* name, const CallArgs& args) {
  if (!args.keyword.empty()) fail("str.", name, "() takes no keyword arguments");
}

const Text& text_argument(const Arguments& a, size_t i, const char* name) {
  if (!a[i]->is_text()) {
    if (a[i]->is_undefined()) fail(a[i]->undefined().message);
    fail(name, "() argument must be str, not ", type_name(*a[i]));
  }
  return a[i]->text();
}

template <Text (*kMap)(const Text&)>
Value mapped(Interpreter& in, const Value& self, CallArgs& args) {
  const Arguments a("str method", args, {});
  return made(in, kMap(self.text()));
}

Text upper(const Text& t) { return map_case(t, CaseMap::kUpper); }
Text lower(const Text& t) { return map_case(t, CaseMap::kLower); }

template <bool kLeft, bool kRight>
Value stripped(Interpreter& in, const Value& self, CallArgs& args) {
  no_keywords("strip", args);
  const Arguments a("strip", args, {"chars"});
  if (!a[0] || a[0]->is_none()) return made(in, strip(self.text(), nullptr, kLeft, kRight));
  return made(in, strip(self.text(), &text_argument(a, 0, "strip").bytes, kLeft, kRight));
}

template <bool kFromRight>
Value split_method(Interpreter& in, const Value& self, CallArgs& args) {
  const Arguments a("split", args, {"sep", "maxsplit"});
  const int64_t max = a.integer(1, -1);
  if (!a[0] || a[0]->is_none()) return made(in, split(self.text(), nullptr, max, kFromRight));
  const Text& separator = text_argument(a, 0, "split");
  if (separator.empty()) fail("empty separator");
  return made(in, split(self.text(), &separator.bytes, max, kFromRight));
}

Value splitlines_method(Interpreter& in, const Value& self, CallArgs& args) {
  const Arguments a("splitlines", args, {"keepends"});
  return made(in, split_lines(self.text(), a.flag(0, false)));
}

Value replace_method(Interpreter& in, const Value& self, CallArgs& args) {
  no_keywords("replace", args);
  const Arguments a("replace", args, {"old", "new", "count"}, 2);
  const Text& to = text_argument(a, 1, "replace");
  const bool escape = self.text().markup && !to.markup;
  return made(in, replace(self.text(), text_argument(a, 0, "replace"),
                          escape ? escape_html(to) : to, a.integer(2, -1), in.budget().max_bytes));
}

Value join_method(Interpreter& in, const Value& self, CallArgs& args) {
  no_keywords("join", args);
  const Arguments a("join", args, {"iterable"}, 1);
  const std::vector<Value> items = to_items(in, *a[0]);
  if (self.text().markup) unsupported("join() of escaped text");
  for (const Value& item : items) {
    if (!item.is_text()) fail("join(): expected str instance, ", type_name(item), " found");
  }
  return join_texts(in, items, self.text());
}

Value format_text(Interpreter& in, const Value& self, CallArgs& args) {
  if (self.text().markup) unsupported("format() of escaped text");
  return Value(format_method(in, self.text(), args));
}

Value format_map_text(Interpreter& in, const Value& self, CallArgs& args) {
  const Arguments a("format_map", args, {"mapping"}, 1);
  if (!a[0]->is_dict()) unsupported("format_map() of a value that is not a dict");
  CallArgs named;
  for (const auto& [key, value] : a[0]->dict().entries) {
    if (key.is_text()) named.keyword.emplace_back(key.bytes(), value);
  }
  return format_text(in, self, named);
}

// The part of a text that optional start and stop arguments (code points) select, as byte offsets.
struct Window {
  size_t begin, end;
  bool beyond;  // start lies behind the end, where not even the empty text is found
  std::vector<size_t> offsets;
};

Window window_of(const Value& self, const Arguments& a) {
  Window w;
  w.offsets = unicode::code_point_offsets(self.bytes());
  const int64_t n = static_cast<int64_t>(w.offsets.size()) - 1;
  const auto bound = [&](size_t i, int64_t otherwise) {
    if (!a[i] || a[i]->is_none()) return otherwise;
    const int64_t v = a.integer(i, 0);
    return std::max<int64_t>(v < 0 ? v + n : v, 0);
  };
  const int64_t start = bound(1, 0), stop = std::min(bound(2, n), n);
  w.beyond = start > n || start > stop;
  w.begin = w.offsets[std::min(start, n)];
  w.end = std::max(w.begin, w.offsets[stop]);
  return w;
}

template <bool kRight, bool kMustFind>
Value find_method(Interpreter&, const Value& self, CallArgs& args) {
  no_keywords("find", args);
  const Arguments a("find", args, {"sub", "start", "end"}, 1);
  const std::string& wanted = text_argument(a, 0, "find").bytes;
  const Window w = window_of(self, a);
  const std::string_view part(self.bytes().data() + w.begin, w.end - w.begin);
  const size_t found = w.beyond ? std::string::npos
                       : kRight ? part.rfind(wanted)
                                : part.find(wanted);
  if (found == std::string::npos) {
    if (kMustFind) fail("substring not found");
    return Value(int64_t{-1});
  }
  const auto at = std::lower_bound(w.offsets.begin(), w.offsets.end(), w.begin + found);
  return Value(static_cast<int64_t>(at - w.offsets.begin()));
}

Value count_method(Interpreter&, const Value& self, CallArgs& args) {
  no_keywords("count", args);
  const Arguments a("count", args, {"sub", "start", "end"}, 1);
  const std::string& wanted = text_argument(a, 0, "count").bytes;
  const Window w = window_of(self, a);
  if (w.beyond) return Value(int64_t{0});
  const std::string_view part(self.bytes().data() + w.begin, w.end - w.begin);
  if (wanted.empty()) return Value(static_cast<int64_t>(unicode::count_code_points(part)) + 1);
  int64_t n = 0;
  for (size_t at = part.find(wanted); at != std::string_view::npos;
       at = part.find(wanted, at + wanted.size())) {
    n++;
  }
  return Value(n);
}

template <bool kStart>
Value starts_or_ends(Interpreter&, const Value& self, CallArgs& args) {
  no_keywords("startswith", args);
  const Arguments a("startswith", args, {"prefix", "start", "end"}, 1);
  const Window w = window_of(self, a);
  const std::string_view part(self.bytes().data() + w.begin, w.end - w.begin);
  const auto test = [&](const Value& value) {
    if (!value.is_text()) fail("startswith first arg must be str or a tuple of str");
    return !w.beyond && (kStart ? part.starts_with(value.bytes()) : part.ends_with(value.bytes()));
  };
  if (!a[0]->is_tuple()) return Value(test(*a[0]));
  return Value(std::any_of(a[0]->items().begin(), a[0]->items().end(), test));
}

template <bool kPrefix>
Value remove_affix(Interpreter& in, const Value& self, CallArgs& args) {
  no_keywords("removeprefix", args);
  const Arguments a("removeprefix", args, {"affix"}, 1);
  const std::string& affix = text_argument(a, 0, "removeprefix").bytes;
  const Text& t = self.text();
  if (kPrefix && t.bytes.starts_with(affix)) return made(in, t.sub(affix.size(), t.size()));
  if (!kPrefix && t.bytes.ends_with(affix)) return made(in, t.sub(0, t.size() - affix.size()));
  return self;
}

template <bool kFromRight>
Value partition_method(Interpreter&, const Value& self, CallArgs& args) {
  no_keywords("partition", args);
  const Arguments a("partition", args, {"sep"}, 1);
  const Text& separator = text_argument(a, 0, "partition");
  if (separator.empty()) fail("empty separator");
  const Text& t = self.text();
  const size_t at = kFromRight ? t.bytes.rfind(separator.bytes) : t.bytes.find(separator.bytes);
  if (at == std::string::npos) {
    return kFromRight ? Value::list({Value(Text()), Value(Text()), self}, true)
                      : Value::list({self, Value(Text()), Value(Text())}, true);
  }
  return Value::list({Value(t.sub(0, at)), Value(t.sub(at, at + separator.size())),
                      Value(t.sub(at + separator.size(), t.size()))},
                     true);
}

template <char kAlign>
Value justified(Interpreter& in, const Value& self, CallArgs& args) {
  no_keywords("center", args);
  const Arguments a("center", args, {"width", "fillchar"}, 1);
  const std::string fill = a[1] ? text_argument(a, 1, "center").bytes : " ";
  if (unicode::count_code_points(fill) != 1)
    fail("The fill character must be exactly one character long");
  const int64_t length = static_cast<int64_t>(unicode::count_code_points(self.bytes()));
  const int64_t width = a.integer(0, 0);
  const int64_t missing = std::max<int64_t>(width - length, 0);
  if (missing > 0) in.budget().charge_text(static_cast<size_t>(missing) * fill.size());
  // str.center puts the odd one on the left where the width is odd.
  const int64_t left = kAlign == '<'   ? 0
                       : kAlign == '>' ? missing
                                       : missing / 2 + (missing & width & 1);
  Text out;
  out.pad(static_cast<size_t>(left), fill);
  out.append(self.text());
  out.pad(static_cast<size_t>(missing - left), fill);
  return made(in, std::move(out));
}

Value zfill_method(Interpreter& in, const Value& self, CallArgs& args) {
  no_keywords("zfill", args);
  const Arguments a("zfill", args, {"width"}, 1);
  const int64_t missing =
      a.integer(0, 0) - static_cast<int64_t>(unicode::count_code_points(self.bytes()));
  if (missing <= 0) return self;
  in.budget().charge_text(static_cast<size_t>(missing));
  const bool sign = !self.text().empty() && (self.bytes()[0] == '-' || self.bytes()[0] == '+');
  Text out = self.text().sub(0, sign ? 1 : 0);
  out.pad(static_cast<size_t>(missing), "0");
  out.append(self.text(), sign ? 1 : 0, self.text().size());
  return made(in, std::move(out));
}

template <bool (*kTest)(char32_t)>
Value all_characters(Interpreter&, const Value& self, CallArgs& args) {
  const Arguments a("str test", args, {});
  const std::string& s = self.bytes();
  for (size_t i = 0; i < s.size();) {
    if (!kTest(unicode::next_code_point(s, &i))) return Value(false);
  }
  return Value(!s.empty());
}

bool is_ascii(char32_t c) { return c < 0x80; }

template <bool (*kTest)(char32_t)>
Value all_or_empty(Interpreter& in, const Value& self, CallArgs& args) {
  return self.text().empty() ? Value(true) : all_characters<kTest>(in, self, args);
}

Value istitle_method(Interpreter&, const Value& self, CallArgs& args) {
  const Arguments a("istitle", args, {});
  bool cased = false, previous = false;
  for (size_t i = 0; i < self.text().size();) {
    const char32_t c = unicode::next_code_point(self.bytes(), &i);
    if (unicode::is_upper(c) || unicode::is_title(c)) {
      if (previous) return Value(false);
      previous = cased = true;
    } else if (unicode::is_lower(c)) {
      if (!previous) return Value(false);
      previous = cased = true;
    } else {
      previous = false;
    }
  }
  return Value(cased);
}

}  // namespace

bool text_is_case(const std::string& s, bool want_upper) {
  bool cased = false;
  for (size_t i = 0; i < s.size();) {
    const char32_t c = unicode::next_code_point(s, &i);
    if (want_upper ? unicode::is_lower(c) || unicode::is_title(c)
                   : unicode::is_upper(c) || unicode::is_title(c))
      return false;
    cased = cased || (want_upper ? unicode::is_upper(c) : unicode::is_lower(c));
  }
  return cased;
}

namespace {

template <bool kUpperCase>
Value is_case(Interpreter&, const Value& self, CallArgs& args) {
  const Arguments a("isupper", args, {});
  return Value(text_is_case(self.bytes(), kUpperCase));
}

}  // namespace

std::optional<Method> find_text_method(const std::string& name) {
  static const std::unordered_map<std::string, Method> kMethods = {
      {"capitalize", mapped<capitalize>},
      {"casefold", nullptr},
      {"center", justified<'^'>},
      {"count", count_method},
      {"encode", nullptr},
      {"endswith", starts_or_ends<false>},
      {"expandtabs", nullptr},
      {"find", find_method<false, false>},
      {"format", format_text},
      {"format_map", format_map_text},
      {"index", find_method<false, true>},
      {"isalnum", all_characters<unicode::is_alnum>},
      {"isalpha", all_characters<unicode::is_alpha>},
      {"isascii", all_or_empty<is_ascii>},
      {"isdecimal", all_characters<unicode::is_decimal>},
      {"isdigit", all_characters<unicode::is_digit>},
      {"isidentifier", nullptr},
      {"islower", is_case<false>},
      {"isnumeric", all_characters<unicode::is_numeric>},
      {"isprintable", all_or_empty<unicode::is_printable>},
      {"isspace", all_characters<unicode::is_space>},
      {"istitle", istitle_method},
      {"isupper", is_case<true>},
      {"join", join_method},
      {"ljust", justified<'<'>},
      {"lower", mapped<lower>},
      {"lstrip", stripped<true, false>},
      {"maketrans", nullptr},
      {"partition", partition_method<false>},
      {"removeprefix", remove_affix<true>},
      {"removesuffix", remove_affix<false>},
      {"replace", replace_method},
      {"rfind", find_method<true, false>},
      {"rindex", find_method<true, true>},
      {"rjust", justified<'>'>},
      {"rpartition", partition_method<true>},
      {"rsplit", split_method<true>},
      {"rstrip", stripped<false, true>},
      {"split", split_method<false>},
      {"splitlines", splitlines_method},
      {"startswith", starts_or_ends<true>},
      {"strip", stripped<true, true>},
      {"swapcase", mapped<swap_case>},
      {"title", mapped<title_case>},
      {"translate", nullptr},
      {"upper", mapped<upper>},
      {"zfill", zfill_method},
  };
  const auto at = kMethods.find(name);
  if (at == kMethods.end()) return std::nullopt;
  return at->second;
}

}  // namespace mustafar::jinja
