// Token strings and ids, both ways.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mustafar::text {

inline constexpr int64_t kMaxTokenId = 1 << 24;

class Vocab {
 public:
  // Room for ids 0 .. id_limit-1, all unassigned.
  Vocab() : Vocab(0, 0, 0) {}
  Vocab(int32_t id_limit, size_t token_count, size_t total_bytes);

  // What stopped an insertion; the token is not added then.
  enum class Conflict { kNone, kToken, kId };
  Conflict add(std::string_view token, int32_t id);  // 0 <= id < id_limit

  std::optional<int32_t> find(std::string_view token) const;
  bool contains(int32_t id) const {
    return id >= 0 && id < size() && entries_[id].length != kUnassigned;
  }
  std::string_view token(int32_t id) const {  // of an id that it contains
    return std::string_view(bytes_).substr(entries_[id].offset, entries_[id].length);
  }
  int32_t size() const { return static_cast<int32_t>(entries_.size()); }  // id_limit

 private:
  static constexpr uint32_t kUnassigned = ~uint32_t{0};
  struct Entry {
    uint32_t offset = 0;
    uint32_t length = kUnassigned;
  };
  struct Slot {
    uint32_t hash = 0;
    int32_t id = -1;
  };

  std::string bytes_;           // all tokens, one after another
  std::vector<Entry> entries_;  // [id_limit]
  std::vector<Slot> slots_;     // power of two, at most half full
};

}  // namespace mustafar::text
