#include "text/bpe.h"

#include <algorithm>
#include <bit>
#include <cstdio>

#include "text/unicode/utf8.h"

namespace mustafar::text {

namespace {

constexpr size_t kCacheWordBytes = 64;    // longer words are too rare to remember
constexpr size_t kSegmentWordBytes = 32;  // longer words are cut where no merge can reach across
constexpr size_t kShortSymbols = 48;      // up to here a scan for the best pair beats a heap
constexpr uint32_t kNoMerge = ~uint32_t{0};

std::string byte_token(int byte) {
  char name[8];
  std::snprintf(name, sizeof name, "<0x%02X>", byte);
  return name;
}

}  // namespace

BpeScratch::BpeScratch(size_t text_bytes) {
  if (text_bytes >= 128)
    cache_.resize(std::clamp<size_t>(std::bit_ceil(text_bytes / 8), 64, 1 << 15));
}

BpeModel::BpeModel(Vocab vocab, PairMap merges, const std::vector<uint64_t>& merge_pairs,
                   const BpeOptions& options)
    : vocab_(std::move(vocab)),
      merges_(std::move(merges)),
      options_(options),
      bmp_ids_(0x10000, -1) {
  for (int32_t id = 0; id < vocab_.size(); id++) {
    if (!vocab_.contains(id)) continue;
    const std::string_view token = vocab_.token(id);
    if (token.empty() || token.size() > 3) continue;
    size_t end = 0;
    const char32_t code_point = unicode::next_code_point(token, &end);
    if (end == token.size()) bmp_ids_[code_point] = id;
  }
  for (int byte = 0; byte < 256; byte++) {
    byte_ids_[byte] = options_.byte_fallback ? vocab_.find(byte_token(byte)).value_or(-1) : -1;
  }
  find_joints(merge_pairs);
}

void BpeModel::find_joints(const std::vector<uint64_t>& merge_pairs) {
  // Symbols that are no characters (<0xNN>, the unknown token) have no first and last character.
  PairMap special(byte_ids_.size() + 1);
  for (const int32_t id : byte_ids_) {
    if (id >= 0) special.set(id, {});
  }
  if (options_.unk_id >= 0) special.set(options_.unk_id, {});
  joints_ = PairMap(merge_pairs.size() / 8);
  for (const uint64_t pair : merge_pairs) {
    if (special.find(pair >> 32) || special.find(pair & 0xFFFFFFFF)) return;
    const std::string_view left = vocab_.token(static_cast<int32_t>(pair >> 32));
    const std::string_view right = vocab_.token(static_cast<int32_t>(pair & 0xFFFFFFFF));
    const size_t last = unicode::previous_boundary(left, left.size());
    size_t pos = last;
    const int32_t last_id = char_id(unicode::next_code_point(left, &pos), left.substr(last));
    pos = 0;
    const char32_t first = unicode::next_code_point(right, &pos);
    const int32_t first_id = char_id(first, right.substr(0, pos));
    // A merge of characters outside the vocabulary never happens.
    if (last_id >= 0 && first_id >= 0) joints_.set(pair_key(last_id, first_id), {});
  }
  can_segment_ = true;
}

void BpeModel::encode(std::string_view word, BpeScratch* scratch, std::vector<int32_t>* ids) const {
  if (word.empty()) return;
  if (word.size() <= kSegmentWordBytes || !can_segment_) {
    encode_cached(word, true, scratch, ids);
    return;
  }
  if (options_.ignore_merges) {
    if (const auto id = vocab_.find(word)) {
      ids->push_back(*id);
      return;
    }
  }
  encode_in_segments(word, scratch, ids);
}

void BpeModel::encode_in_segments(std::string_view word, BpeScratch* scratch,
                                  std::vector<int32_t>* ids) const {
  size_t begin = 0;
  int32_t previous = -1;
  for (size_t pos = 0; pos < word.size();) {
    const size_t start = pos;
    const char32_t code_point = unicode::next_code_point(word, &pos);
    const int32_t id = char_id(code_point, word.substr(start, pos - start));
    // Never next to an unknown character: runs of those may fuse.
    if (previous >= 0 && id >= 0 && !joints_.find(pair_key(previous, id))) {
      encode_cached(word.substr(begin, start - begin), false, scratch, ids);
      begin = start;
    }
    previous = id;
  }
  encode_cached(word.substr(begin), false, scratch, ids);
}

// whole: a word of its own, for which ignore_merges counts, rather than a part of one.
void BpeModel::encode_cached(std::string_view word, bool whole, BpeScratch* scratch,
                             std::vector<int32_t>* ids) const {
  BpeScratch::CacheEntry* entry = nullptr;
  uint64_t hash = 0;
  if (!scratch->cache_.empty() && word.size() <= kCacheWordBytes) {
    hash = hash_bytes(word) * 2 + whole;
    entry = &scratch->cache_[(hash >> 16) & (scratch->cache_.size() - 1)];
    if (entry->hash == hash && entry->key_length == word.size() &&
        std::string_view(scratch->keys_).substr(entry->key_offset, entry->key_length) == word) {
      const auto begin = scratch->ids_.begin() + entry->ids_offset;
      ids->insert(ids->end(), begin, begin + entry->ids_count);
      return;
    }
  }
  const size_t first = ids->size();
  const auto direct =
      whole && options_.ignore_merges ? vocab_.find(word) : std::optional<int32_t>();
  if (direct) {
    ids->push_back(*direct);
  } else {
    split_into_symbols(word, scratch);
    if (scratch->symbols_.size() <= kShortSymbols) {
      merge_short(scratch, ids);
    } else {
      merge_long(scratch, ids);
    }
  }
  if (!entry) return;
  *entry = {hash, static_cast<uint32_t>(scratch->keys_.size()), static_cast<uint32_t>(word.size()),
            static_cast<uint32_t>(scratch->ids_.size()),
            static_cast<uint32_t>(ids->size() - first)};
  scratch->keys_.append(word);
  scratch->ids_.insert(scratch->ids_.end(), ids->begin() + first, ids->end());
}

void BpeModel::split_into_symbols(std::string_view word, BpeScratch* scratch) const {
  std::vector<uint32_t>& symbols = scratch->symbols_;
  symbols.clear();
  bool unknown_pending = false;
  const auto flush_unknown = [&] {
    if (unknown_pending) symbols.push_back(options_.unk_id);
    unknown_pending = false;
  };
  for (size_t pos = 0; pos < word.size();) {
    const size_t start = pos;
    const char32_t code_point = unicode::next_code_point(word, &pos);
    const std::string_view bytes = word.substr(start, pos - start);
    const int32_t id = char_id(code_point, bytes);
    if (id >= 0) {
      flush_unknown();
      symbols.push_back(id);
      continue;
    }
    if (options_.byte_fallback && std::all_of(bytes.begin(), bytes.end(), [&](char b) {
          return byte_ids_[static_cast<unsigned char>(b)] >= 0;
        })) {
      // A pending unknown token stays pending and follows the bytes: so does the reference.
      for (const char b : bytes) symbols.push_back(byte_ids_[static_cast<unsigned char>(b)]);
      continue;
    }
    if (options_.unk_id < 0) continue;
    if (!options_.fuse_unk) flush_unknown();
    unknown_pending = true;
  }
  flush_unknown();
  scratch->work += symbols.size();
}

// Repeatedly joins the pair of lowest rank, the leftmost first. ranks[i] belongs to (i, i+1).
void BpeModel::merge_short(BpeScratch* scratch, std::vector<int32_t>* ids) const {
  std::vector<uint32_t>& symbols = scratch->symbols_;
  std::vector<uint32_t>& ranks = scratch->ranks_;
  std::vector<uint32_t>& merged = scratch->merged_;
  size_t n = symbols.size();
  ranks.resize(n + 1);
  merged.resize(n + 1);
  const auto look_up = [&](size_t i) {
    const PairMap::Value* merge =
        i + 1 < n ? merges_.find(pair_key(symbols[i], symbols[i + 1])) : nullptr;
    ranks[i] = merge ? merge->first : kNoMerge;
    merged[i] = merge ? merge->second : 0;
  };
  for (size_t i = 0; i < n; i++) look_up(i);
  while (n > 1) {
    const size_t best = std::min_element(ranks.begin(), ranks.begin() + (n - 1)) - ranks.begin();
    scratch->work += n;
    if (ranks[best] == kNoMerge) break;
    symbols[best] = merged[best];
    std::copy(symbols.begin() + best + 2, symbols.begin() + n, symbols.begin() + best + 1);
    std::copy(ranks.begin() + best + 2, ranks.begin() + n, ranks.begin() + best + 1);
    std::copy(merged.begin() + best + 2, merged.begin() + n, merged.begin() + best + 1);
    n--;
    look_up(best);
    if (best > 0) look_up(best - 1);
  }
  ids->insert(ids->end(), symbols.begin(), symbols.begin() + n);
}

// The same order by a heap over a linked list: n log n for a word of any length.
void BpeModel::merge_long(BpeScratch* scratch, std::vector<int32_t>* ids) const {
  std::vector<BpeScratch::Symbol>& list = scratch->list_;
  std::vector<BpeScratch::Candidate>& heap = scratch->heap_;
  const auto n = static_cast<int32_t>(scratch->symbols_.size());
  list.resize(n);
  for (int32_t i = 0; i < n; i++) list[i] = {scratch->symbols_[i], i - 1, i + 1 < n ? i + 1 : -1};

  const auto later = [](const auto& a, const auto& b) { return a.order > b.order; };
  const auto candidate = [&](int32_t left) {
    const PairMap::Value* merge = merges_.find(pair_key(list[left].id, list[list[left].next].id));
    if (!merge) return false;
    heap.push_back({pair_key(merge->first, static_cast<uint32_t>(left)), merge->second});
    return true;
  };
  heap.clear();
  for (int32_t i = 0; i + 1 < n; i++) candidate(i);
  std::make_heap(heap.begin(), heap.end(), later);

  constexpr uint32_t kRemoved = ~uint32_t{0};
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const BpeScratch::Candidate top = heap.back();
    heap.pop_back();
    scratch->work++;
    BpeScratch::Symbol& left = list[top.order & 0xFFFFFFFF];
    if (left.id == kRemoved || left.next < 0) continue;
    BpeScratch::Symbol& right = list[left.next];
    const PairMap::Value* merge = merges_.find(pair_key(left.id, right.id));
    if (!merge || merge->second != top.merged_id) continue;  // one of the two has changed since
    left.id = top.merged_id;
    left.next = right.next;
    right.id = kRemoved;
    const auto position = static_cast<int32_t>(top.order & 0xFFFFFFFF);
    if (left.next >= 0) list[left.next].previous = position;
    if (left.previous >= 0 && candidate(left.previous)) {
      std::push_heap(heap.begin(), heap.end(), later);
    }
    if (left.next >= 0 && candidate(position)) std::push_heap(heap.begin(), heap.end(), later);
  }
  for (int32_t i = n > 0 ? 0 : -1; i >= 0; i = list[i].next) {
    ids->push_back(static_cast<int32_t>(list[i].id));
  }
}

}  // namespace mustafar::text
