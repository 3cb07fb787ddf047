// Byte shuffles that expand the kept values of eight dims, for instruction sets that have a shuffle
// but no expansion. Included by their files alone; everything is internal to them.
#pragma once

#include <cstdint>

namespace mustafar {
namespace {

// Shuffles that move the first values of 16 bytes to the set bits of a mask byte and zero the rest:
// their top bit, set, says zero.
struct ExpandTable {
  alignas(16) uint8_t words[256][16];  // values of two bytes
  alignas(8) uint8_t bytes[256][8];    // values of one
  // The same and how many values there are, eight times: to be added to the next eight dims'.
  alignas(16) uint8_t pairs[256][16];
};

constexpr ExpandTable make_expand_table() {
  ExpandTable table{};
  for (int mask = 0; mask < 256; mask++) {
    int rank = 0;
    for (int i = 0; i < 8; i++) {
      const bool kept = (mask >> i & 1) != 0;
      table.bytes[mask][i] = table.pairs[mask][i] = static_cast<uint8_t>(kept ? rank : 0x80);
      table.words[mask][2 * i] = static_cast<uint8_t>(kept ? 2 * rank : 0x80);
      table.words[mask][2 * i + 1] = static_cast<uint8_t>(kept ? 2 * rank + 1 : 0x80);
      rank += kept;
    }
    for (int i = 8; i < 16; i++) table.pairs[mask][i] = static_cast<uint8_t>(rank);
  }
  return table;
}
constexpr ExpandTable kExpandTable = make_expand_table();

}  // namespace
}  // namespace mustafar
