// Numbers as Python prints and reads them, `%` formatting and str.format.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "text/jinja/value.h"

namespace mustafar::jinja {

std::string float_repr(double value);
double round_float(double value, int64_t digits);  // round(value, digits)
std::optional<double> parse_float(std::string_view text);
// int(text, base); none where Python raises ValueError. Throws beyond 64 bits.
std::optional<int64_t> parse_int(std::string_view text, int64_t base);
std::optional<int64_t> to_integer(
    double value);  // truncates; none for inf, NaN; throws beyond 64 bits

Text percent_format(Interpreter& in, const Text& format, const Value& values);  // format % values
Text format_value(Interpreter& in, const Value& value, const Text& spec);  // format(value, spec)
Text format_method(Interpreter& in, const Text& format, CallArgs& args);   // format.format(...)

}  // namespace mustafar::jinja
