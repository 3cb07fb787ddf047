// Numbers as Python prints and reads them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace mustafar::jinja {

inline constexpr double kTwoTo63 = 0x1p63;  // the first double beyond int64_t
inline bool fits_int64(double value) { return value >= -kTwoTo63 && value < kTwoTo63; }

std::string float_repr(double value);
// snprintf("%.<precision><type>", value).
std::string print_double(char type, int precision, double value);
double round_float(double value, int64_t digits);  // round(value, digits)

std::optional<double> parse_float(std::string_view text);
// int(text, base); none where Python raises ValueError. Throws beyond 64 bits.
std::optional<int64_t> parse_int(std::string_view text, int64_t base);
// Truncates; none for infinities and NaN. Throws beyond 64 bits.
std::optional<int64_t> to_integer(double value);

}  // namespace mustafar::jinja
