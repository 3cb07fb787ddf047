// The k largest of many numbers, in time linear in their count.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mustafar {

// Indices of the k largest values, largest first, ties by the lower index. -0 equals +0; NaN must
// not occur. Takes time O(n + k log k) whatever the values. k is cut to the count.
void top_select(std::span<const float> values, int64_t k, std::vector<int32_t>& indices);

}  // namespace mustafar
