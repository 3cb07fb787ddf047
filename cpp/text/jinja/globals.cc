// Global functions of a chat template, and the assignment of arguments to parameters.
#include <unordered_map>

#include "text/jinja/objects.h"

namespace mustafar::jinja {

Arguments::Arguments(const std::string& function, const CallArgs& args,
                     std::initializer_list<const char*> names, size_t required)
    : function_(function), names_(names.begin(), names.end()), values_(names.size(), nullptr) {
  if (args.positional.size() > names_.size()) {
    fail(function, "() takes at most ", names_.size(), " argument(s) (", args.positional.size(),
         " given)");
  }
  for (size_t i = 0; i < args.positional.size(); i++) values_[i] = &args.positional[i];
  for (const auto& [name, value] : args.keyword) {
    size_t i = 0;
    while (i < names_.size() && names_[i] != name) i++;
    if (i == names_.size()) fail(function, "() got an unexpected keyword argument '", name, "'");
    if (values_[i]) fail(function, "() got multiple values for argument '", name, "'");
    values_[i] = &value;
  }
  for (size_t i = 0; i < required; i++) {
    if (!values_[i]) fail(function, "() missing required argument: '", names_[i], "'");
  }
}

int64_t Arguments::integer(size_t i, int64_t otherwise) const {
  if (!values_[i]) return otherwise;
  if (values_[i]->is_undefined()) fail(values_[i]->undefined().message);
  if (!values_[i]->is_integral()) {
    fail(function_, "() argument '", names_[i], "' must be int, not ", type_name(*values_[i]));
  }
  return values_[i]->as_int();
}

bool Arguments::flag(size_t i, bool otherwise) const {
  return values_[i] ? truthy(*values_[i]) : otherwise;
}

namespace {

Value range_function(Interpreter&, CallArgs& args) {
  if (!args.keyword.empty()) fail("range() takes no keyword arguments");
  const Arguments a("range", args, {"start", "stop", "step"}, 1);
  const int64_t first = a.integer(0, 0);
  const int64_t step = a.integer(2, 1);
  if (step == 0) fail("range() arg 3 must not be zero");
  const int64_t start = a[1] ? first : 0, stop = a[1] ? a.integer(1, 0) : first;
  return Value(std::shared_ptr<Object>(std::make_shared<Range>(start, stop, step)));
}

// The entries that dict(...) makes of its arguments.
std::shared_ptr<Dict> dict_entries(Interpreter& in, CallArgs& args) {
  auto dict = std::make_shared<Dict>();
  if (args.positional.size() > 1)
    fail("dict expected at most 1 argument, got ", args.positional.size());
  if (args.positional.size() == 1) {
    const Value& from = args.positional[0];
    if (from.is_dict()) {
      for (const auto& [key, value] : from.dict().entries) dict->set(key, value, in.budget());
    } else {
      for (const Value& pair : to_items(in, from)) {
        const std::vector<Value> items = to_items(in, pair);
        if (items.size() != 2)
          fail("dictionary update sequence element has length ", items.size(), "; 2 is required");
        dict->set(items[0], items[1], in.budget());
      }
    }
  }
  for (const auto& [key, value] : args.keyword)
    dict->set(Value(std::string_view(key)), value, in.budget());
  in.budget().charge(static_cast<int64_t>(dict->entries.size()));
  return dict;
}

Value dict_from_keys(Interpreter& in, CallArgs& args) {
  const Arguments a("fromkeys", args, {"iterable", "value"}, 1);
  auto dict = std::make_shared<Dict>();
  for (const Value& key : to_items(in, *a[0])) dict->set(key, a[1] ? *a[1] : Value(), in.budget());
  return Value(std::shared_ptr<const Dict>(std::move(dict)));
}

struct DictType : Object {
  std::string type_name() const override { return "TemplateDict"; }
  bool callable() const override { return true; }
  Value call(Interpreter& in, CallArgs& args) override {
    return Value(std::shared_ptr<const Dict>(dict_entries(in, args)));
  }
  std::optional<Value> attribute(Interpreter& in, const std::string& name) override {
    if (name != "fromkeys") return std::nullopt;
    return in.keep(std::make_shared<BuiltinFunction>("fromkeys", dict_from_keys));
  }
};

Value namespace_function(Interpreter& in, CallArgs& args) {
  auto result = std::make_shared<Namespace>();
  const auto given = dict_entries(in, args);
  for (const auto& [key, value] : given->entries) {
    if (!key.is_text()) unsupported("a namespace attribute that is not a string");
    result->set(key.bytes(), value);
  }
  return in.keep(std::move(result));
}

struct Joiner : Object {
  explicit Joiner(Value separator) : separator(std::move(separator)) {}
  std::string type_name() const override { return "Joiner"; }
  bool callable() const override { return true; }
  Value call(Interpreter&, CallArgs& args) override {
    const Arguments a("joiner", args, {});
    if (used) return separator;
    used = true;
    return Value(Text());
  }
  std::optional<Value> attribute(Interpreter&, const std::string& name) override {
    if (name == "sep") return separator;
    if (name == "used") return Value(used);
    return std::nullopt;
  }
  void release() override { separator = Value(); }
  Value separator;
  bool used = false;
};

Value joiner_function(Interpreter& in, CallArgs& args) {
  const Arguments a("joiner", args, {"sep"});
  return in.keep(std::make_shared<Joiner>(a[0] ? *a[0] : Value(Text(", "))));
}

struct Cycler : Object {
  struct Step : Object {
    Step(Cycler& cycler, bool reset) : cycler(cycler), reset(reset) {}
    std::string type_name() const override { return "method"; }
    bool callable() const override { return true; }
    Value call(Interpreter&, CallArgs& args) override {
      const Arguments a("cycler", args, {});
      if (reset) {
        cycler.at = 0;
        return {};
      }
      const Value current = cycler.items[cycler.at];
      cycler.at = (cycler.at + 1) % cycler.items.size();
      return current;
    }
    Cycler& cycler;
    bool reset;
  };

  std::string type_name() const override { return "Cycler"; }
  std::optional<Value> attribute(Interpreter& in, const std::string& name) override {
    if (name == "next" || name == "reset")
      return in.keep(std::make_shared<Step>(*this, name == "reset"));
    if (name == "current") return items[at];
    if (name == "items") return Value::list(items, true);
    if (name == "pos") return Value(static_cast<int64_t>(at));
    return std::nullopt;
  }
  void release() override { items.clear(); }
  std::vector<Value> items;
  size_t at = 0;
};

Value cycler_function(Interpreter& in, CallArgs& args) {
  if (!args.keyword.empty()) fail("cycler() takes no keyword arguments");
  if (args.positional.empty()) fail("at least one item has to be provided");
  auto cycler = std::make_shared<Cycler>();
  cycler->items = args.positional;
  return in.keep(std::move(cycler));
}

Value raise_exception(Interpreter& in, CallArgs& args) {
  const Arguments a("raise_exception", args, {"message"}, 1);
  throw EvalError(to_text(in, *a[0]).bytes);
}

Value strftime_now(Interpreter& in, CallArgs& args) {
  const Arguments a("strftime_now", args, {"format"}, 1);
  if (!a[0]->is_text()) fail("strftime() argument 1 must be str, not ", type_name(*a[0]));
  const std::string& format = a[0]->bytes();
  constexpr size_t kMaxFormatBytes = 1000;
  if (format.size() > kMaxFormatBytes) {
    fail("strftime_now: the format is longer than ", kMaxFormatBytes, " bytes");
  }
  // Microseconds and the zone are not known here; Python prints them so for a naive time.
  std::string plain;
  for (size_t i = 0; i < format.size(); i++) {
    if (format[i] == '%' && i + 1 < format.size()) {
      const char c = format[++i];
      if (c == 'f') {
        plain += "000000";
      } else if (c != 'z' && c != 'Z') {
        plain += {'%', c};
      }
    } else {
      plain += format[i];
    }
  }
  if (plain.empty()) return Value(Text());
  constexpr size_t kBytesPerLetter = 32, kMoreBytes = 256;  // longer than any date prints
  std::string out(plain.size() * kBytesPerLetter + kMoreBytes, 0);
  out.resize(std::strftime(out.data(), out.size(), plain.c_str(), &in.now()));
  return Value(Text(out));
}

Value lipsum(Interpreter&, CallArgs&) { unsupported("the function 'lipsum'"); }

}  // namespace

std::optional<Value> find_global(Interpreter& in, const std::string& name) {
  static const std::unordered_map<std::string, Function> kFunctions = {
      {"range", range_function},
      {"namespace", namespace_function},
      {"joiner", joiner_function},
      {"cycler", cycler_function},
      {"lipsum", lipsum},
      {"raise_exception", raise_exception},
      {"strftime_now", strftime_now}};
  if (name == "dict") return in.keep(std::make_shared<DictType>());
  const auto at = kFunctions.find(name);
  if (at == kFunctions.end()) return std::nullopt;
  return in.keep(std::make_shared<BuiltinFunction>(at->first.c_str(), at->second));
}

}  // namespace mustafar::jinja
