// Checks of compressed blocks that come from outside (state files).
#pragma once

#include <cstdint>
#include <string>

#include "format/block_format.h"

namespace mustafar {

// Throws StateError naming `where`, layer, head and row unless every mask of the page selects
// exactly the values that its layout says are there (and no dim past head_dim), so that reading a
// slot never leaves it. Values are not looked at. page: host memory, [layout.page_bytes].
void check_page(const StoreLayout& layout, const uint8_t* page, const std::string& where);

}  // namespace mustafar
