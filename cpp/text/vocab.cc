#include "text/vocab.h"

#include <bit>

#include "text/flat_map.h"

namespace mustafar::text {

Vocab::Vocab(int32_t id_limit, size_t token_count, size_t total_bytes)
    : entries_(id_limit), slots_(std::bit_ceil(token_count * 2 + 2)) {
  bytes_.reserve(total_bytes);
}

Vocab::Conflict Vocab::add(std::string_view token, int32_t id) {
  if (entries_[id].length != kUnassigned) return Conflict::kId;
  const uint64_t hash = hash_bytes(token);
  const size_t mask = slots_.size() - 1;
  size_t i = hash & mask;
  for (; slots_[i].id >= 0; i = (i + 1) & mask) {
    if (slots_[i].hash == hash >> 32 && this->token(slots_[i].id) == token) return Conflict::kToken;
  }
  slots_[i] = {static_cast<uint32_t>(hash >> 32), id};
  entries_[id] = {static_cast<uint32_t>(bytes_.size()), static_cast<uint32_t>(token.size())};
  bytes_.append(token);
  return Conflict::kNone;
}

std::optional<int32_t> Vocab::find(std::string_view token) const {
  const uint64_t hash = hash_bytes(token);
  const size_t mask = slots_.size() - 1;
  for (size_t i = hash & mask; slots_[i].id >= 0; i = (i + 1) & mask) {
    if (slots_[i].hash == hash >> 32 && this->token(slots_[i].id) == token) return slots_[i].id;
  }
  return std::nullopt;
}

}  // namespace mustafar::text
