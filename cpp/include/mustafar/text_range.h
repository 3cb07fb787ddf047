#pragma once

#include <cstddef>

namespace mustafar {

// Part of a text: bytes [begin, end).
struct TextRange {
  size_t begin = 0, end = 0;
};

}  // namespace mustafar
