// The text that ships with the library, for profile="auto": see calibration_text/README.md.
#pragma once

#include <span>
#include <string_view>

namespace mustafar {

// UTF-8, one piece a file of calibration_text/, in the order of their names. Defined in a source
// that the build makes of them.
std::span<const std::string_view> calibration_texts();

}  // namespace mustafar
