// From template text to its tree, with jinja2's grammar.
#pragma once

#include <string_view>

#include "text/jinja/ast.h"
#include "text/jinja/lexer.h"

namespace mustafar::jinja {

// Throws SyntaxError, also for what the engine does not support, naming it.
Template parse_template(std::string_view source);

}  // namespace mustafar::jinja
