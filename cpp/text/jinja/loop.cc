#include "text/jinja/loop.h"

#include <utility>

#include "text/jinja/builtins.h"

namespace mustafar::jinja {

// loop.cycle(a, b, ...)
class Loop::Cycle : public Object {
 public:
  explicit Cycle(Loop& loop) : loop_(loop) {}
  std::string type_name() const override { return "method"; }
  bool callable() const override { return true; }
  Value call(Interpreter&, CallArgs& args) override {
    if (!args.keyword.empty()) fail("loop.cycle() takes no keyword arguments");
    if (args.positional.empty()) fail("no items for cycling given");
    return args.positional[loop_.index_ % static_cast<int64_t>(args.positional.size())];
  }

 private:
  Loop& loop_;
};

// loop.changed(a, b, ...): whether the values differ from those of the last call.
class Loop::Changed : public Object {
 public:
  explicit Changed(Loop& loop) : loop_(loop) {}
  std::string type_name() const override { return "method"; }
  bool callable() const override { return true; }
  Value call(Interpreter& in, CallArgs& args) override {
    if (!args.keyword.empty()) fail("loop.changed() takes no keyword arguments");
    Value now = Value::list(args.positional, true);
    const std::optional<Value>& last = loop_.last_changed_;
    const bool changed = !last || !equal(*last, now, in.budget());
    if (changed) loop_.last_changed_ = now;
    return Value(changed);
  }

 private:
  Loop& loop_;
};

void Loop::start(std::unique_ptr<Iterator> iterator, std::optional<int64_t> known_length) {
  iterator_ = std::move(iterator);
  known_length_ = known_length;
}

bool Loop::advance(Value* item) {
  Value value;
  if (!ahead_.empty()) {
    value = ahead_.front();
    ahead_.erase(ahead_.begin());
  } else if (!iterator_->next(&value)) {
    return false;
  }
  index_++;
  before_ = current_;
  current_ = value;
  *item = value;
  return true;
}

bool Loop::peek() {
  Value value;
  if (ahead_.empty() && iterator_->next(&value)) ahead_.push_back(value);
  return !ahead_.empty();
}

int64_t Loop::count() {
  if (!known_length_) {
    Value value;
    while (iterator_->next(&value)) ahead_.push_back(value);
    known_length_ = index_ + 1 + static_cast<int64_t>(ahead_.size());
  }
  return *known_length_;
}

Text Loop::repr(Interpreter&) {
  return Text(concat("<LoopContext ", index_ + 1, "/", count(), ">"));
}

std::optional<Value> Loop::attribute(Interpreter& in, const std::string& name) {
  if (name == "index0") return Value(index_);
  if (name == "index") return Value(index_ + 1);
  if (name == "revindex0") return Value(count() - index_ - 1);
  if (name == "revindex") return Value(count() - index_);
  if (name == "first") return Value(index_ == 0);
  if (name == "last") return Value(!peek());
  if (name == "length") return Value(count());
  if (name == "depth0") return Value(int64_t{depth_});
  if (name == "depth") return Value(int64_t{depth_ + 1});
  if (name == "previtem") {
    return index_ == 0 ? Value::undefined("there is no previous item") : before_;
  }
  if (name == "nextitem") {
    return peek() ? ahead_.front() : Value::undefined("there is no next item");
  }
  if (name == "cycle") return in.keep(std::make_shared<Cycle>(*this));
  if (name == "changed") return in.keep(std::make_shared<Changed>(*this));
  return std::nullopt;
}

Value Loop::call(Interpreter& in, CallArgs& args) {
  const Arguments a("loop", args, {"iterable"}, 1);
  if (!stmt_.recursive) {
    fail("The loop must have the 'recursive' marker to be called recursively.");
  }
  return Value(in.run_loop(stmt_, scope_, *a[0], depth_ + 1));
}

void Loop::release() {
  iterator_.reset();
  ahead_.clear();
  current_ = before_ = Value();
  last_changed_.reset();
}

}  // namespace mustafar::jinja
