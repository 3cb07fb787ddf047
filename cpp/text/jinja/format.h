// `%` formatting (percent_format.cc), and str.format with format() (brace_format.cc).
#pragma once

#include "text/jinja/value.h"

namespace mustafar::jinja {

Text percent_format(Interpreter& in, const Text& format, const Value& values);  // format % values
Text format_value(Interpreter& in, const Value& value, const Text& spec);  // format(value, spec)
Text format_method(Interpreter& in, const Text& format, CallArgs& args);   // format.format(...)

}  // namespace mustafar::jinja
