// The filters, in two files by what they work on.
#pragma once

#include <string>
#include <unordered_map>

#include "text/jinja/builtins.h"

namespace mustafar::jinja {

using FilterTable = std::unordered_map<std::string, Filter>;

const FilterTable& text_filters();      // text and numbers
const FilterTable& sequence_filters();  // lists, dicts and iterators

// An attribute path ("a.b", "0", 3) as the filters take it, looked up in an item.
class AttributePath {
 public:
  explicit AttributePath(const Value& path);  // none: the item itself
  // otherwise: used where a part is undefined; null: stays undefined.
  Value get(Interpreter& in, Value item, const Value* otherwise = nullptr) const;

 private:
  std::vector<Value> parts_;
};

// Lower-cases text for comparisons that ignore case; other values as they are.
Value fold_case(Interpreter& in, const Value& value);

}  // namespace mustafar::jinja
