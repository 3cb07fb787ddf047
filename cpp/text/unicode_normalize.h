// Unicode normalisation forms, lower case and word characters. All texts are valid UTF-8.
#pragma once

#include <string>
#include <string_view>

namespace mustafar::text {

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

std::string normalize_unicode(std::string_view text, NormalForm form);
// Character by character, without regard to context.
std::string lower_case(std::string_view text);
bool is_word_character(char32_t code_point);

}  // namespace mustafar::text
