// The values of a template: Python's None, bool, int, float, str, list, tuple and dict, jinja2's
// Undefined, and a few objects (namespaces, iterators, functions) behind one interface.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "text/jinja/errors.h"
#include "text/jinja/text.h"

namespace mustafar::jinja {

class Value;
class Interpreter;
struct List;
struct Dict;
struct Object;

struct Undefined {
  std::string message;  // what raising it says
};

struct CallArgs {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> keyword;
};

// Immutable and cheap to copy: copies share text and containers.
class Value {
 public:
  enum class Kind { kUndefined, kNone, kBool, kInt, kFloat, kText, kList, kDict, kObject };

  Value() = default;  // None
  explicit Value(bool b) : kind_(Kind::kBool), int_(b) {}
  explicit Value(int64_t i) : kind_(Kind::kInt), int_(i) {}
  explicit Value(double d) : kind_(Kind::kFloat), double_(d) {}
  explicit Value(Text text);
  explicit Value(std::string_view text) : Value(Text(text)) {}
  explicit Value(const char*) = delete;
  explicit Value(std::shared_ptr<const List> list);
  explicit Value(std::shared_ptr<const Dict> dict);
  explicit Value(std::shared_ptr<Object> object) : kind_(Kind::kObject), data_(std::move(object)) {}
  static Value undefined(std::string message);
  static Value list(std::vector<Value> items, bool tuple = false);

  Kind kind() const { return kind_; }
  bool is_undefined() const { return kind() == Kind::kUndefined; }
  bool is_none() const { return kind() == Kind::kNone; }
  bool is_bool() const { return kind() == Kind::kBool; }
  bool is_int() const { return kind() == Kind::kInt; }  // bool is not
  bool is_float() const { return kind() == Kind::kFloat; }
  bool is_text() const { return kind() == Kind::kText; }
  bool is_list() const { return kind() == Kind::kList; }  // tuples too
  bool is_tuple() const;
  bool is_dict() const { return kind() == Kind::kDict; }
  bool is_object() const { return kind() == Kind::kObject; }
  bool is_integral() const { return is_int() || is_bool(); }
  bool is_number() const { return is_integral() || is_float(); }

  bool as_bool() const { return int_ != 0; }
  int64_t as_int() const { return int_; }  // of a bool too
  double as_double() const { return is_float() ? double_ : static_cast<double>(int_); }
  const Text& text() const { return *static_cast<const Text*>(data_.get()); }
  const std::string& bytes() const { return text().bytes; }
  const List& list() const { return *static_cast<const List*>(data_.get()); }
  const std::vector<Value>& items() const;  // of a list or tuple
  const Dict& dict() const { return *static_cast<const Dict*>(data_.get()); }
  Object& object() const { return *static_cast<Object*>(data_.get()); }
  const Undefined& undefined() const { return *static_cast<const Undefined*>(data_.get()); }

  // The object as a T, or null.
  template <typename T>
  T* as() const {
    return is_object() ? dynamic_cast<T*>(&object()) : nullptr;
  }

  bool same_as(const Value& other) const;  // Python's `is`
  int depth() const;                       // levels of containers

 private:
  Value(Kind kind, std::shared_ptr<void> data) : kind_(kind), data_(std::move(data)) {}

  Kind kind_ = Kind::kNone;
  int64_t int_ = 0;  // bool, int
  double double_ = 0;
  std::shared_ptr<void> data_;  // Undefined, Text, List, Dict (none of them ever changed) or Object
};

struct List {
  std::vector<Value> items;
  bool tuple = false;
  int depth = 1;
};

// Keeps insertion order.
struct Dict {
  std::vector<std::pair<Value, Value>> entries;
  std::unordered_map<std::string, size_t> index;  // by hash_key
  int depth = 1;

  const Value* find(std::string_view key) const;
  const Value* find(const Value& key, Budget& budget) const;  // throws for an unhashable key
  void set(const Value& key, Value value, Budget& budget);
};

// Yields values one by one.
struct Iterator {
  virtual ~Iterator() = default;
  virtual bool next(Value* out) = 0;
};

struct Object {
  virtual ~Object() = default;
  virtual std::string type_name() const = 0;
  virtual Text repr(Interpreter& in);  // default: not supported
  virtual bool truthy() { return true; }
  virtual std::optional<int64_t> length() { return std::nullopt; }
  virtual std::optional<Value> attribute(Interpreter& in, const std::string& name);
  virtual std::optional<Value> item(Interpreter& in, const Value& key);
  virtual std::unique_ptr<Iterator> iterate(Interpreter& in);  // null: not iterable
  virtual bool callable() const { return false; }
  virtual Value call(Interpreter& in, CallArgs& args);  // default: not callable
  virtual bool equals(const Object& other, Budget&) const { return this == &other; }
  virtual int depth() const { return 1; }
  virtual void release() {}  // drops references, so that long chains do not unwind recursively
};

// Containers nested deeper than this are refused.
inline constexpr int kMaxContainerDepth = 200;

std::string type_name(const Value& value);  // "str", "dict", ...
bool truthy(const Value& value);
bool equal(const Value& a, const Value& b, Budget& budget);
// a op b for "<", "<=", ">" or ">="; throws where Python does.
bool ordered(const Value& a, const Value& b, std::string_view op, Budget& budget);
bool contains(Interpreter& in, const Value& container, const Value& item);
// A string equal for equal keys; throws for an unhashable value.
std::string hash_key(const Value& value, Budget& budget);
// str() and repr().
Text to_text(Interpreter& in, const Value& value);
Text repr(Interpreter& in, const Value& value);
Text repr_text(const Text& text);
// Length as len() has it; throws for a value without one.
int64_t length(const Value& value);
// Throws for a value that is not iterable.
std::unique_ptr<Iterator> iterate(Interpreter& in, const Value& value);
std::vector<Value> to_items(Interpreter& in, const Value& value);
bool is_iterable(Interpreter& in, const Value& value);

}  // namespace mustafar::jinja
