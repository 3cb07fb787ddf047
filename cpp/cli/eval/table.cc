#include "cli/eval/table.h"

#include <algorithm>
#include <cstdio>

namespace mustafar::cli {
namespace {

// Characters of a UTF-8 text; all of ours are one column wide.
size_t width_of(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

void print_cell(const std::string& text, size_t width, bool left) {
  const int pad = static_cast<int>(width - width_of(text));
  if (left) {
    std::printf("| %s%*s ", text.c_str(), pad, "");
  } else {
    std::printf("| %*s%s ", pad, "", text.c_str());
  }
}

}  // namespace

void print_markdown(const std::vector<std::string>& columns,
                    const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (size_t c = 0; c < columns.size(); c++) {
    widths.push_back(std::max<size_t>(3, width_of(columns[c])));
    for (const auto& row : rows) widths[c] = std::max(widths[c], width_of(row[c]));
  }
  const auto print_row = [&](const std::vector<std::string>& cells) {
    for (size_t c = 0; c < cells.size(); c++) print_cell(cells[c], widths[c], c == 0);
    std::printf("|\n");
  };
  print_row(columns);
  for (size_t c = 0; c < columns.size(); c++) {
    std::printf("|%s%s", std::string(widths[c] + 1, '-').c_str(), c == 0 ? "-" : ":");
  }
  std::printf("|\n");
  for (const auto& row : rows) print_row(row);
}

}  // namespace mustafar::cli
