// The `loop` variable of a for tag.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "text/jinja/ast.h"
#include "text/jinja/interpreter.h"

namespace mustafar::jinja {

class Loop : public Object {
 public:
  // scope: where the for tag stands. depth: of recursive loops around this one.
  Loop(const Stmt& stmt, Scope& scope, int depth) : stmt_(stmt), scope_(scope), depth_(depth) {}

  // known_length: of what the iterator yields, where that is known without running it.
  void start(std::unique_ptr<Iterator> iterator, std::optional<int64_t> known_length);
  bool advance(Value* item);  // false at the end

  std::string type_name() const override { return "LoopContext"; }
  bool callable() const override { return true; }
  std::optional<int64_t> length() override { return count(); }
  bool truthy() override { return count() != 0; }
  Text repr(Interpreter& in) override;
  std::optional<Value> attribute(Interpreter& in, const std::string& name) override;
  Value call(Interpreter& in, CallArgs& args) override;  // loop(iterable), of a recursive loop
  void release() override;

 private:
  class Cycle;
  class Changed;

  bool peek();      // whether there is a next item
  int64_t count();  // of all items; runs an iterator of unknown length to its end

  const Stmt& stmt_;
  Scope& scope_;
  int depth_;
  std::unique_ptr<Iterator> iterator_;
  std::optional<int64_t> known_length_;
  std::vector<Value> ahead_;  // taken from the iterator before their turn
  int64_t index_ = -1;        // of the current item
  Value current_, before_;
  std::optional<Value> last_changed_;  // what loop.changed was called with
};

}  // namespace mustafar::jinja
