#include "runtime/top_select.h"

#include <algorithm>
#include <array>

#include "core/dtype.h"

namespace mustafar {
namespace {

// Unsigned keys in the order of the floats.
inline uint32_t key_of(float x) {
  const uint32_t u = bits_of(x + 0.0f);  // -0 becomes +0
  return u ^ ((u >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

struct Digit {
  int shift;
  int bits;
};
constexpr std::array<Digit, 3> kDigits = {{{21, 11}, {10, 11}, {0, 10}}};
constexpr size_t kMostDigitValues = size_t{1} << 11;

constexpr int64_t kFewShare = 64;  // k is few of n where it is at most one part in so many
// Replacements that a scan may make before it is given up: so many for each of the k, and one for
// each kReplacementsShare values. In random order there are about k ln(n / k).
constexpr int64_t kReplacementsPerKept = 16;
constexpr int64_t kReplacementsShare = 64;

// For few of many: a scan that keeps the best so far, and rarely replaces one of them. Returns
// false where the values come in an order that makes it replace too often.
bool scan_select(std::span<const float> values, int64_t k, std::vector<int32_t>& indices) {
  const auto better = [&](int32_t a, int32_t b) {  // heap order: the worst on top
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  };
  indices.resize(k);
  for (int64_t i = 0; i < k; i++) indices[i] = static_cast<int32_t>(i);
  std::make_heap(indices.begin(), indices.end(), better);
  int64_t budget =
      kReplacementsPerKept * k + static_cast<int64_t>(values.size()) / kReplacementsShare;
  float worst = values[indices.front()];
  for (int64_t i = k; i < static_cast<int64_t>(values.size()); i++) {
    if (!(values[i] > worst)) continue;
    if (--budget < 0) return false;
    std::pop_heap(indices.begin(), indices.end(), better);
    indices.back() = static_cast<int32_t>(i);
    std::push_heap(indices.begin(), indices.end(), better);
    worst = values[indices.front()];
  }
  return true;
}

// The k-th largest key, digit by digit from the top; then everything above it and the first of
// those equal to it.
void radix_select(std::span<const float> values, int64_t k, std::vector<int32_t>& indices) {
  uint32_t prefix = 0;
  uint32_t prefix_mask = 0;
  int64_t missing = k;  // how many of the keys that start with prefix belong to the k largest
  for (const Digit digit : kDigits) {
    std::array<int64_t, kMostDigitValues> counts{};
    const uint32_t digit_mask = (1u << digit.bits) - 1;
    for (const float value : values) {
      const uint32_t key = key_of(value);
      if ((key & prefix_mask) == prefix) counts[(key >> digit.shift) & digit_mask]++;
    }
    uint32_t d = digit_mask;
    while (counts[d] < missing) missing -= counts[d--];
    prefix |= d << digit.shift;
    prefix_mask |= digit_mask << digit.shift;
  }
  indices.clear();
  indices.reserve(k);
  for (size_t i = 0; i < values.size(); i++) {
    const uint32_t key = key_of(values[i]);
    if (key > prefix || (key == prefix && missing-- > 0)) {
      indices.push_back(static_cast<int32_t>(i));
    }
  }
}

}  // namespace

void top_select(std::span<const float> values, int64_t k, std::vector<int32_t>& indices) {
  const int64_t n = static_cast<int64_t>(values.size());
  k = std::clamp<int64_t>(k, 0, n);
  indices.clear();
  if (k == 0) return;
  if (k == n) {
    indices.resize(n);
    for (int64_t i = 0; i < n; i++) indices[i] = static_cast<int32_t>(i);
  } else if (k > n / kFewShare || !scan_select(values, k, indices)) {
    radix_select(values, k, indices);
  }
  std::sort(indices.begin(), indices.end(), [&](int32_t a, int32_t b) {
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  });
}

}  // namespace mustafar
