// Unicode's normal forms.
#pragma once

#include <string>
#include <string_view>

namespace mustafar::unicode {

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

std::string normalize(std::string_view text, NormalForm form);  // text: valid UTF-8

}  // namespace mustafar::unicode
