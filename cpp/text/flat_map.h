// Open-addressing hash tables for the tokenizer's hot look-ups: one cache line per probe.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace mustafar::text {

// Finaliser of splitmix64: every input bit reaches every output bit.
inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

inline uint64_t hash_bytes(std::string_view bytes) {
  uint64_t hash = bytes.size() * 0x9E3779B97F4A7C15u;
  const char* p = bytes.data();
  size_t left = bytes.size();
  for (; left >= 8; p += 8, left -= 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    hash = mix_bits(hash ^ word);
  }
  uint64_t word = 0;
  std::memcpy(&word, p, left);
  return mix_bits(hash ^ word);
}

inline uint64_t pair_key(uint32_t left, uint32_t right) {
  return static_cast<uint64_t>(left) << 32 | right;
}

// From a 64-bit key to two 32-bit values. ~0 is no valid key.
class PairMap {
 public:
  struct Value {
    uint32_t first = 0;
    uint32_t second = 0;
  };

  explicit PairMap(size_t expected_count = 0) { rehash(expected_count); }

  // Inserts or overwrites; true when the key is new.
  bool set(uint64_t key, Value value) {
    if ((count_ + 1) * 2 > slots_.size()) rehash(count_ * 2 + 8);
    Slot& slot = slots_[probe(key)];
    const bool is_new = slot.key == kEmpty;
    count_ += is_new;
    slot = {key, value};
    return is_new;
  }

  const Value* find(uint64_t key) const {
    const Slot& slot = slots_[probe(key)];
    return slot.key == key ? &slot.value : nullptr;
  }

  size_t size() const { return count_; }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  struct Slot {
    uint64_t key = kEmpty;
    Value value;
  };

  // Index of the key's slot, or of the free one where it would go.
  size_t probe(uint64_t key) const {
    const size_t mask = slots_.size() - 1;
    size_t i = mix_bits(key) & mask;
    while (slots_[i].key != key && slots_[i].key != kEmpty) i = (i + 1) & mask;
    return i;
  }

  void rehash(size_t expected_count) {
    std::vector<Slot> old(std::bit_ceil(expected_count * 2 + 8));
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.key != kEmpty) slots_[probe(slot.key)] = slot;
    }
  }

  std::vector<Slot> slots_;
  size_t count_ = 0;
};

}  // namespace mustafar::text
