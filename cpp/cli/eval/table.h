// Results as a Markdown table on stdout.
#pragma once

#include <string>
#include <vector>

namespace mustafar::cli {

// All rows have as many cells as there are columns; the first column is aligned to the left.
void print_markdown(const std::vector<std::string>& columns,
                    const std::vector<std::vector<std::string>>& rows);

}  // namespace mustafar::cli
