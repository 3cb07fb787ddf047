// Small files read whole.
#pragma once

#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>

namespace mustafar {

// The first `bytes` bytes of a file; none where it can't be opened or has fewer. Memory that runs
// out is a std::bad_alloc, which a string stream would hide.
std::optional<std::string> read_file(const std::filesystem::path& file, size_t bytes);

}  // namespace mustafar
