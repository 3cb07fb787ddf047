// Statements: the text between the tags, and {% ... %}.
#include "text/jinja/parser.h"

#include <algorithm>

#include "text/jinja/expression_parser.h"
#include "text/jinja/token_reader.h"

namespace mustafar::jinja {
namespace {

using Names = ExpressionParser::Names;
using StmtPtr = std::unique_ptr<Stmt>;
using Type = Token::Type;

// The print statements and the text between two block tags, as one statement.
class OutputCollector {
 public:
  void add(int line, ExprPtr expr) {
    if (!output_) {
      output_ = std::make_unique<Stmt>();
      output_->line = line;
    }
    output_->exprs.push_back(std::move(expr));
  }
  void flush(Body* body) {
    if (output_) body->push_back(std::move(output_));
  }

 private:
  StmtPtr output_;
};

class Parser {
 public:
  explicit Parser(std::string_view source) : tokens_(source), expressions_(tokens_) {}

  Template run() {
    Template result;
    result.body = parse_body({});
    expressions_.check_known();
    result.names = expressions_.take_names();
    return result;
  }

 private:
  // Up to one of the end tags, which stays the current token (behind its block begin).
  Body parse_body(Names end_tags) {
    const auto nested = tokens_.nest();
    Body body;
    OutputCollector output;
    while (!tokens_.at(Type::kEnd)) {
      const int line = tokens_.line();
      if (tokens_.at(Type::kData)) {
        output.add(line, parse_data());
      } else if (tokens_.at(Type::kVariableBegin)) {
        tokens_.take();
        output.add(line, expressions_.parse_tuple());
        tokens_.expect(Type::kVariableEnd, "end of print statement");
      } else {
        output.flush(&body);
        tokens_.expect(Type::kBlockBegin, "begin of statement block");
        for (std::string_view tag : end_tags) {
          if (tokens_.at_name(tag)) return body;
        }
        body.push_back(parse_statement());
        tokens_.expect(Type::kBlockEnd, "end of statement block");
      }
    }
    output.flush(&body);
    if (end_tags.size()) {
      std::string expected;
      for (std::string_view tag : end_tags) {
        expected += concat(expected.empty() ? "'" : " or '", tag, "'");
      }
      tokens_.error("Unexpected end of template, expected " + expected);
    }
    return body;
  }

  ExprPtr parse_data() {
    auto data = std::make_unique<Expr>();
    data->line = tokens_.line();
    data->constant = Value(Text(tokens_.take().text));
    return data;
  }

  // The rest of a tag and its body, up to one of the end tags, which stays the current token.
  Body parse_block_until(Names end_tags) {
    tokens_.skip_op(":");
    tokens_.expect(Type::kBlockEnd, "end of statement block");
    return parse_body(end_tags);
  }

  // The same, and the end tag.
  Body parse_block(std::string_view end_tag) {
    Body body = parse_block_until({end_tag});
    tokens_.take();
    return body;
  }

  StmtPtr parse_statement() {
    if (!tokens_.at(Type::kName)) tokens_.error("tag name expected");
    const std::string& tag = tokens_.peek().text;
    if (tag == "if") return parse_if();
    if (tag == "for") return parse_for();
    if (tag == "set") return parse_set();
    if (tag == "macro") return parse_macro();
    if (tag == "call") return parse_call_block();
    if (tag == "filter") return parse_filter_block();
    if (tag == "with") return parse_with();
    if (tag == "print") return parse_print();
    if (tag == "generation") return parse_generation();
    if (tag == "break") return parse_jump(Stmt::Kind::kBreak);
    if (tag == "continue") return parse_jump(Stmt::Kind::kContinue);
    for (const char* name : {"block", "extends", "include", "import", "from", "autoescape"}) {
      if (tag == name) tokens_.unsupported("the tag '" + tag + "'");
    }
    tokens_.error("Encountered unknown tag '" + tag + "'");
  }

  // A statement that starts with the tag at hand, which is taken.
  StmtPtr begin(Stmt::Kind kind) {
    auto stmt = std::make_unique<Stmt>();
    stmt->kind = kind;
    stmt->line = tokens_.line();
    tokens_.take();
    return stmt;
  }

  StmtPtr parse_jump(Stmt::Kind kind) {
    if (!may_jump_) tokens_.error("'" + tokens_.peek().text + "' outside loop");
    return begin(kind);
  }

  StmtPtr parse_if() {
    StmtPtr stmt = begin(Stmt::Kind::kIf);
    const auto unknown_names = expressions_.allow_unknown(true);
    while (true) {
      stmt->exprs.push_back(expressions_.parse_tuple_without_condition());
      stmt->bodies.push_back(parse_block_until({"elif", "else", "endif"}));
      const std::string& end = tokens_.take().text;
      if (end == "elif") continue;
      if (end == "else") stmt->bodies.push_back(parse_block("endif"));
      return stmt;
    }
  }

  StmtPtr parse_for() {
    StmtPtr stmt = begin(Stmt::Kind::kFor);
    const Scoped in_for(in_for_, true);
    stmt->targets.push_back(expressions_.parse_target({"in"}, false));
    check_loop_target(*stmt->targets[0]);
    tokens_.expect_name("in");
    stmt->exprs.push_back(expressions_.parse_tuple_without_condition({"recursive"}));
    const auto unknown_names = expressions_.allow_unknown(false);
    stmt->exprs.push_back(tokens_.skip_name("if") ? expressions_.parse_expression() : nullptr);
    stmt->recursive = tokens_.skip_name("recursive");
    {
      const Scoped may_jump(may_jump_, true);
      stmt->bodies.push_back(parse_block_until({"endfor", "else"}));
    }
    if (tokens_.take().text == "else") stmt->bodies.push_back(parse_block("endfor"));
    return stmt;
  }

  void check_loop_target(const Expr& target) {
    if (target.kind == Expr::Kind::kName && target.text == "loop") {
      tokens_.error("Can't assign to special loop variable in for-loop target");
    }
    for (const ExprPtr& each : target.args) check_loop_target(*each);
  }

  StmtPtr parse_set() {
    StmtPtr stmt = begin(Stmt::Kind::kSet);
    stmt->targets.push_back(expressions_.parse_target({}, true));
    if (in_for_) check_loop_target(*stmt->targets[0]);
    if (tokens_.skip_op("=")) {
      stmt->exprs.push_back(expressions_.parse_tuple());
      return stmt;
    }
    stmt->kind = Stmt::Kind::kSetBlock;
    const auto unknown_names = expressions_.allow_unknown(false);
    stmt->exprs.push_back(expressions_.parse_filters(nullptr));
    stmt->bodies.push_back(parse_block("endset"));
    return stmt;
  }

  StmtPtr parse_macro() {
    StmtPtr stmt = begin(Stmt::Kind::kMacro);
    MacroNode& macro = stmt->macro;
    macro.line = stmt->line;
    macro.name = expressions_.parse_name_target();
    expressions_.note_write(macro.name);
    stmt->symbol = expressions_.symbol_of(macro.name);
    parse_signature(&macro);
    parse_macro_body(&macro, "endmacro");
    return stmt;
  }

  StmtPtr parse_call_block() {
    StmtPtr stmt = begin(Stmt::Kind::kCallBlock);
    stmt->macro.line = stmt->line;
    if (tokens_.at_op("(")) parse_signature(&stmt->macro);
    stmt->exprs.push_back(expressions_.parse_expression());
    if (stmt->exprs[0]->kind != Expr::Kind::kCall) tokens_.error("expected call");
    parse_macro_body(&stmt->macro, "endcall");
    return stmt;
  }

  void parse_signature(MacroNode* macro) {
    tokens_.expect_op("(");
    while (!tokens_.at_op(")")) {
      if (!macro->params.empty()) tokens_.expect_op(",");
      const int line = tokens_.line();
      const std::string name = expressions_.parse_name_target();
      macro->param_names.push_back(name);
      macro->params.push_back(expressions_.symbol_of(name));
      if (tokens_.skip_op("=")) {
        macro->defaults.push_back(expressions_.parse_expression());
      } else if (!macro->defaults.empty()) {
        throw SyntaxError(line, "non-default argument follows default argument");
      }
    }
    tokens_.expect_op(")");
    for (size_t i = 0; i < macro->params.size(); i++) {
      if (std::count(macro->params.begin(), macro->params.begin() + i, macro->params[i])) {
        tokens_.error("duplicate argument '" + macro->param_names[i] + "' in a macro");
      }
    }
  }

  void parse_macro_body(MacroNode* macro, std::string_view end_tag) {
    expressions_.begin_macro();
    {
      const Scoped may_jump(may_jump_, false);
      const auto unknown_names = expressions_.allow_unknown(false);
      macro->body = parse_block(end_tag);
    }
    const MacroUse use = expressions_.end_macro();
    const auto& params = macro->param_names;
    const auto index_of = [&](std::string_view name) {
      return static_cast<size_t>(std::find(params.begin(), params.end(), name) - params.begin());
    };
    const auto has_param = [&](std::string_view name) { return index_of(name) < params.size(); };
    macro->uses_caller = use.caller == MacroUse::kRead;
    macro->uses_kwargs = use.kwargs == MacroUse::kRead && !has_param("kwargs");
    macro->uses_varargs = use.varargs == MacroUse::kRead && !has_param("varargs");
    if (macro->uses_caller && index_of("caller") < params.size() - macro->defaults.size()) {
      tokens_.error("the special \"caller\" argument must be omitted or be given a default");
    }
  }

  StmtPtr parse_generation() {
    StmtPtr stmt = begin(Stmt::Kind::kGeneration);
    const Scoped may_jump(may_jump_, false);
    const auto unknown_names = expressions_.allow_unknown(false);
    stmt->bodies.push_back(parse_block("endgeneration"));
    return stmt;
  }

  StmtPtr parse_filter_block() {
    StmtPtr stmt = begin(Stmt::Kind::kFilterBlock);
    const auto unknown_names = expressions_.allow_unknown(false);
    stmt->exprs.push_back(expressions_.parse_filters(expressions_.parse_filter(nullptr)));
    stmt->bodies.push_back(parse_block("endfilter"));
    return stmt;
  }

  StmtPtr parse_with() {
    StmtPtr stmt = begin(Stmt::Kind::kWith);
    while (!tokens_.at(Type::kBlockEnd)) {
      if (!stmt->targets.empty()) tokens_.expect_op(",");
      stmt->targets.push_back(expressions_.parse_target({}, false));
      tokens_.expect_op("=");
      stmt->exprs.push_back(expressions_.parse_expression());
    }
    const auto unknown_names = expressions_.allow_unknown(false);
    stmt->bodies.push_back(parse_block("endwith"));
    return stmt;
  }

  StmtPtr parse_print() {
    StmtPtr stmt = begin(Stmt::Kind::kOutput);
    while (!tokens_.at(Type::kBlockEnd)) {
      if (!stmt->exprs.empty()) tokens_.expect_op(",");
      stmt->exprs.push_back(expressions_.parse_expression());
    }
    return stmt;
  }

  TokenReader tokens_;
  ExpressionParser expressions_;
  bool may_jump_ = false;  // break and continue have a loop to act on
  bool in_for_ = false;    // somewhere inside a for tag
};

}  // namespace

Template parse_template(std::string_view source) { return Parser(source).run(); }

}  // namespace mustafar::jinja
