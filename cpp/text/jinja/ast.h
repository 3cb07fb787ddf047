// The parsed template. Comments say which members of a node its kind uses, and for what.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "text/jinja/value.h"

namespace mustafar::jinja {

struct Expr;
struct Stmt;
using ExprPtr = std::unique_ptr<Expr>;
using Body = std::vector<std::unique_ptr<Stmt>>;
using Symbol = int;  // an index into Template::names

struct CallNodes {
  std::vector<ExprPtr> positional;
  std::vector<std::pair<std::string, ExprPtr>> keyword;
  ExprPtr star, double_star;
};

struct Expr {
  enum class Kind {
    kConst,      // constant
    kName,       // symbol, text
    kTuple,      // args
    kList,       // args
    kDict,       // args: key, value, key, ...
    kAttribute,  // args[0] . text
    kItem,       // args[0] [ args[1] ]
    kSlice,      // args[0] [ args[1] : args[2] : args[3] ], the last three may be null
    kCall,       // args[0] ( call )
    kFilter,     // args[0] | text ( call ); args[0] null in a filter block
    kTest,       // args[0] is text ( call )
    kUnary,      // text: "-" or "+"; args[0]
    kBinary,     // text: the operator; args[0], args[1]
    kAnd,
    kOr,
    kNot,
    kCompare,       // args[0] ops[0] args[1] ops[1] args[2] ...
    kConcat,        // args joined as text
    kCondition,     // args[1] if args[0] else args[2]; args[2] may be null
    kNamespaceRef,  // assignment target symbol . text
  };
  Kind kind = Kind::kConst;
  int line = 1;
  int depth = 1;  // levels of the tree below and with this
  Symbol symbol = -1;
  std::string text;
  Value constant;
  std::vector<ExprPtr> args;
  std::vector<std::string> ops;
  CallNodes call;
};

struct MacroNode {
  std::string name;  // empty for a call block
  int line = 1;
  std::vector<Symbol> params;
  std::vector<std::string> param_names;
  std::vector<ExprPtr> defaults;  // of the last parameters
  Body body;
  bool uses_caller = false, uses_kwargs = false, uses_varargs = false;
};

struct Stmt {
  enum class Kind {
    kOutput,  // exprs
    kIf,      // exprs[i] guards bodies[i]; one more body is the else
    kFor,     // target in exprs[0] if exprs[1] (may be null): bodies[0], else bodies[1] (may miss)
    kSet,     // target = exprs[0]
    kSetBlock,     // target = bodies[0] through exprs[0] (filters, may be null)
    kMacro,        // symbol = macro
    kCallBlock,    // exprs[0] is the call, macro its caller
    kFilterBlock,  // exprs[0] around bodies[0]
    kWith,         // targets[i] = exprs[i]: bodies[0]
    kGeneration,   // bodies[0]
    kBreak,
    kContinue,
  };
  Kind kind = Kind::kOutput;
  int line = 1;
  std::vector<ExprPtr> exprs;
  std::vector<ExprPtr> targets;
  std::vector<Body> bodies;
  MacroNode macro;
  Symbol symbol = -1;
  bool recursive = false;
};

struct Template {
  Body body;
  std::vector<std::string> names;  // by symbol
};

}  // namespace mustafar::jinja
