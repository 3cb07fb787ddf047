#include <algorithm>
#include <unordered_set>

#include "text/jinja/filters.h"
#include "text/jinja/objects.h"

namespace mustafar::jinja {

AttributePath::AttributePath(const Value& path) {
  if (path.is_none()) return;
  if (!path.is_text()) {
    parts_.push_back(path);
    return;
  }
  const std::string dot = ".";
  for (const Text& part : split(path.text(), &dot, -1, false)) {
    const bool digits =
        !part.empty() && part.bytes.find_first_not_of("0123456789") == std::string::npos;
    if (digits && part.size() < 19) {
      parts_.push_back(Value(static_cast<int64_t>(std::stoll(part.bytes))));
    } else {
      parts_.push_back(Value(part));
    }
  }
}

Value AttributePath::get(Interpreter& in, Value item, const Value* otherwise) const {
  for (const Value& part : parts_) {
    item = in.get_item(item, part);
    if (item.is_undefined() && otherwise && !otherwise->is_none()) item = *otherwise;
  }
  return item;
}

Value fold_case(Interpreter& in, const Value& value) {
  if (!value.is_text()) return value;
  in.budget().charge_text(value.text().size());
  return Value(map_case(value.text(), CaseMap::kLower));
}

namespace {

const Value kNone;

const Value& or_none(const Value* value) { return value ? *value : kNone; }

Value list_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("list", args, {});
  return Value::list(to_items(in, value));
}

Value length_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("len", args, {});
  if (value.is_text()) in.budget().charge_text(value.text().size());
  return Value(length(value));
}

Value first_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("first", args, {});
  const auto items = iterate(in, value);
  Value item;
  return items->next(&item) ? item : Value::undefined("No first item, sequence was empty.");
}

Value last_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("last", args, {});
  const auto reversed = make_reversed(in, value);
  if (!reversed) fail("'", type_name(value), "' object is not reversible");
  const auto items = iterate(in, *reversed);
  Value item;
  return items->next(&item) ? item : Value::undefined("No last item, sequence was empty.");
}

Value reverse_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("reverse", args, {});
  if (value.is_text()) {
    const Value step(int64_t{-1});
    return slice_value(in, value, nullptr, nullptr, &step);
  }
  if (auto reversed = make_reversed(in, value)) return *reversed;
  if (!is_iterable(in, value)) fail("argument must be iterable");
  std::vector<Value> items = to_items(in, value);
  std::reverse(items.begin(), items.end());
  return Value::list(std::move(items));
}

Value join_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("join", args, {"d", "attribute"});
  std::vector<Value> items = to_items(in, value);
  if (a[1] && !a[1]->is_none()) {
    const AttributePath path(*a[1]);
    for (Value& item : items) item = path.get(in, item);
  }
  return join_texts(in, items, a[0] ? to_text(in, *a[0]) : Text());
}

Value items_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("items", args, {});
  if (value.is_undefined()) return make_generator(in, [](Value*) { return false; });
  // As in Python, the type is looked at when the first item is asked for.
  return make_generator(in, [value, i = size_t{0}](Value* out) mutable {
    if (!value.is_dict()) fail("Can only get item pairs from a mapping.");
    const auto& entries = value.dict().entries;
    if (i == entries.size()) return false;
    *out = Value::list({entries[i].first, entries[i].second}, true);
    i++;
    return true;
  });
}

// Sorts by keys that were computed once.
std::vector<Value> sort_by(Interpreter& in, std::vector<Value> items,
                           const std::vector<Value>& keys, bool reverse) {
  std::vector<size_t> order(items.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) {
    return reverse ? ordered(keys[y], keys[x], "<", in.budget())
                   : ordered(keys[x], keys[y], "<", in.budget());
  });
  std::vector<Value> out;
  for (size_t i : order) out.push_back(std::move(items[i]));
  return out;
}

Value dictsort_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("dictsort", args, {"case_sensitive", "by", "reverse"});
  const std::string by = a[1] && a[1]->is_text() ? a[1]->bytes() : a[1] ? "" : "key";
  if (by != "key" && by != "value") fail("You can only sort by either \"key\" or \"value\"");
  if (value.is_undefined()) fail(value.undefined().message);
  if (!value.is_dict()) fail("'", type_name(value), "' object has no attribute 'items'");
  std::vector<Value> items, keys;
  for (const auto& [key, each] : value.dict().entries) {
    items.push_back(Value::list({key, each}, true));
    const Value& by_value = by == "key" ? key : each;
    keys.push_back(a.flag(0, false) ? by_value : fold_case(in, by_value));
  }
  return Value::list(sort_by(in, std::move(items), keys, a.flag(2, false)));
}

Value sort_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("sort", args, {"reverse", "case_sensitive", "attribute"});
  std::vector<AttributePath> paths;
  if (a[2] && a[2]->is_text()) {
    const std::string comma = ",";
    for (const Text& path : split(a[2]->text(), &comma, -1, false)) paths.emplace_back(Value(path));
  } else {
    paths.emplace_back(or_none(a[2]));
  }
  std::vector<Value> items = to_items(in, value), keys;
  for (const Value& item : items) {
    std::vector<Value> key;
    for (const AttributePath& path : paths) {
      const Value part = path.get(in, item);
      key.push_back(a.flag(1, false) ? part : fold_case(in, part));
    }
    keys.push_back(Value::list(std::move(key)));
  }
  return Value::list(sort_by(in, std::move(items), keys, a.flag(0, false)));
}

Value unique_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("unique", args, {"case_sensitive", "attribute"});
  const bool case_sensitive = a.flag(0, false);
  auto items = std::shared_ptr<Iterator>(iterate(in, value));
  return make_generator(in, [&in, items, case_sensitive, path = AttributePath(or_none(a[1])),
                             seen = std::unordered_set<std::string>()](Value* out) mutable {
    while (items->next(out)) {
      const Value key = path.get(in, *out);
      if (seen.insert(hash_key(case_sensitive ? key : fold_case(in, key), in.budget())).second) {
        return true;
      }
    }
    return false;
  });
}

Value min_or_max(Interpreter& in, const Value& value, CallArgs& args, bool max) {
  const Arguments a(max ? "max" : "min", args, {"case_sensitive", "attribute"});
  const std::vector<Value> items = to_items(in, value);
  if (items.empty()) return Value::undefined("No aggregated item, sequence was empty.");
  const AttributePath path(or_none(a[1]));
  const auto key_of = [&](const Value& item) {
    const Value key = path.get(in, item);
    return a.flag(0, false) ? key : fold_case(in, key);
  };
  size_t best = 0;
  Value best_key = key_of(items[0]);
  for (size_t i = 1; i < items.size(); i++) {
    const Value key = key_of(items[i]);
    if (ordered(key, best_key, max ? ">" : "<", in.budget())) {
      best = i;
      best_key = key;
    }
  }
  return items[best];
}

Value min_filter(Interpreter& in, const Value& value, CallArgs& args) {
  return min_or_max(in, value, args, false);
}
Value max_filter(Interpreter& in, const Value& value, CallArgs& args) {
  return min_or_max(in, value, args, true);
}

Value sum_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("sum", args, {"attribute", "start"});
  const AttributePath path(or_none(a[0]));
  Value total = a[1] ? *a[1] : Value(int64_t{0});
  if (total.is_text()) fail("sum() can't sum strings [use ''.join(seq) instead]");
  for (const Value& item : to_items(in, value)) total = add(in, total, path.get(in, item));
  return total;
}

Value map_filter(Interpreter& in, const Value& value, CallArgs& args) {
  // As in Python, wrong arguments show when the first item is asked for.
  auto kept = std::make_shared<CallArgs>(args);
  if (!truthy(value)) return make_generator(in, [](Value*) { return false; });
  std::function<Value(const Value&)> function;
  if (kept->positional.empty()) {
    function = [&in, kept, path = std::optional<AttributePath>()](const Value& item) mutable {
      const Arguments a("map", *kept, {"attribute", "default"});
      if (!a[0]) fail("map requires a filter argument");
      if (!path) path.emplace(*a[0]);
      return path->get(in, item, a[1]);
    };
  } else {
    function = [&in, kept](const Value& item) {
      if (!kept->positional[0].is_text())
        fail("No filter named ", repr(in, kept->positional[0]).bytes);
      CallArgs rest;
      rest.positional.assign(kept->positional.begin() + 1, kept->positional.end());
      rest.keyword = kept->keyword;
      return in.apply_filter(kept->positional[0].bytes(), item, rest);
    };
  }
  return make_generator(
      in, [&in, value, function, items = std::shared_ptr<Iterator>()](Value* out) mutable {
        if (!items) items = iterate(in, value);
        Value item;
        if (!items->next(&item)) return false;
        *out = function(item);
        return true;
      });
}

Value select_items(Interpreter& in, const Value& value, CallArgs& args, bool keep,
                   bool by_attribute) {
  auto kept = std::make_shared<CallArgs>(args);
  if (!truthy(value)) return make_generator(in, [](Value*) { return false; });
  return make_generator(
      in, [&in, value, kept, keep, by_attribute, path = std::optional<AttributePath>(),
           items = std::shared_ptr<Iterator>()](Value* out) mutable {
        const size_t test_at = by_attribute ? 1 : 0;
        if (by_attribute && !path) {
          if (kept->positional.empty()) fail("Missing parameter for attribute name");
          path.emplace(kept->positional[0]);
        }
        if (!items) items = iterate(in, value);
        while (items->next(out)) {
          const Value tested = path ? path->get(in, *out) : *out;
          bool holds = false;
          if (kept->positional.size() > test_at) {
            const Value& name = kept->positional[test_at];
            if (!name.is_text()) fail("No test named ", repr(in, name).bytes);
            CallArgs rest;
            rest.positional.assign(kept->positional.begin() + static_cast<int64_t>(test_at) + 1,
                                   kept->positional.end());
            rest.keyword = kept->keyword;
            holds = in.apply_test(name.bytes(), tested, rest);
          } else {
            holds = truthy(tested);
          }
          if (holds == keep) return true;
        }
        return false;
      });
}

template <bool kKeep, bool kByAttribute>
Value select_filter(Interpreter& in, const Value& value, CallArgs& args) {
  return select_items(in, value, args, kKeep, kByAttribute);
}

Value batch_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("batch", args, {"linecount", "fill_with"}, 1);
  const int64_t n = a.integer(0, 1);
  const Value fill = or_none(a[1]);
  auto items = std::shared_ptr<Iterator>(iterate(in, value));
  auto pending = std::make_shared<std::vector<Value>>();
  return make_generator(in, [&in, items, pending, fill, n, done = false](Value* out) mutable {
    if (done) return false;
    Value item;
    while (items->next(&item)) {
      in.budget().charge(1);
      const bool full = static_cast<int64_t>(pending->size()) == n;
      if (full) {
        *out = Value::list(std::move(*pending));
        pending->clear();
      }
      pending->push_back(item);
      if (full) return true;
    }
    done = true;
    if (pending->empty()) return false;
    while (!fill.is_none() && static_cast<int64_t>(pending->size()) < n) {
      in.budget().charge(1);
      pending->push_back(fill);
    }
    *out = Value::list(std::move(*pending));
    return true;
  });
}

Value slice_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("slice", args, {"slices", "fill_with"}, 1);
  const int64_t slices = a.integer(0, 1);
  const Value fill = or_none(a[1]);
  return make_generator(in, [&in, value, slices, fill, at = int64_t{0}, offset = int64_t{0},
                             seq = std::optional<std::vector<Value>>()](Value* out) mutable {
    if (!seq) {
      seq = to_items(in, value);
      if (slices == 0) fail("integer division or modulo by zero");
    }
    if (at >= slices) return false;
    in.budget().charge(1);
    const int64_t n = static_cast<int64_t>(seq->size());
    const int64_t each = n / slices, extra = n % slices;
    const int64_t begin = offset + at * each;
    if (at < extra) offset++;
    const int64_t end = offset + (at + 1) * each;
    std::vector<Value> part(seq->begin() + begin, seq->begin() + end);
    if (!fill.is_none() && at >= extra) part.push_back(fill);
    at++;
    *out = Value::list(std::move(part));
    return true;
  });
}

// What groupby yields: a tuple whose parts have names as well.
Value groupby_filter(Interpreter& in, const Value& value, CallArgs& args) {
  const Arguments a("groupby", args, {"attribute", "default", "case_sensitive"}, 1);
  const AttributePath path(*a[0]);
  std::vector<Value> items = to_items(in, value), keys;
  for (const Value& item : items) {
    const Value key = path.get(in, item, a[1]);
    keys.push_back(a.flag(2, false) ? key : fold_case(in, key));
  }
  std::vector<Value> positions;
  for (size_t i = 0; i < items.size(); i++) positions.push_back(Value(static_cast<int64_t>(i)));
  const std::vector<Value> order = sort_by(in, std::move(positions), keys, false);
  std::vector<Value> groups, group;
  for (size_t i = 0; i < order.size(); i++) {
    const int64_t at = order[i].as_int();
    group.push_back(items[at]);
    const bool last =
        i + 1 == order.size() || !equal(keys[at], keys[order[i + 1].as_int()], in.budget());
    if (!last) continue;
    const Value first_key = path.get(in, group[0], a[1]);
    groups.push_back(Value::list({first_key, Value::list(std::move(group))}, true));
    group.clear();
  }
  return Value::list(std::move(groups));
}

}  // namespace

const FilterTable& sequence_filters() {
  static const FilterTable kFilters = {
      {"list", list_filter},
      {"length", length_filter},
      {"count", length_filter},
      {"first", first_filter},
      {"last", last_filter},
      {"reverse", reverse_filter},
      {"join", join_filter},
      {"items", items_filter},
      {"dictsort", dictsort_filter},
      {"sort", sort_filter},
      {"unique", unique_filter},
      {"min", min_filter},
      {"max", max_filter},
      {"sum", sum_filter},
      {"map", map_filter},
      {"select", select_filter<true, false>},
      {"reject", select_filter<false, false>},
      {"selectattr", select_filter<true, true>},
      {"rejectattr", select_filter<false, true>},
      {"batch", batch_filter},
      {"slice", slice_filter},
      {"groupby", groupby_filter},
  };
  return kFilters;
}

}  // namespace mustafar::jinja
