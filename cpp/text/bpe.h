// Byte-pair encoding: the merges of one word.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/flat_map.h"
#include "text/vocab.h"

namespace mustafar::text {

struct BpeOptions {
  bool byte_fallback = false;  // characters outside the vocabulary become their <0xNN> tokens
  bool fuse_unk = false;       // a run of unknown characters becomes one unknown token
  bool ignore_merges = false;  // a word that is a token itself needs no merges
  int32_t unk_id = -1;         // -1: unknown characters vanish
};

// Working memory of one encode call, with the words that it met before.
class BpeScratch {
 public:
  explicit BpeScratch(size_t text_bytes = 0);
  uint64_t work = 0;  // elementary steps taken by merging: what must grow linearly

 private:
  friend class BpeModel;
  struct Symbol {
    uint32_t id;
    int32_t previous, next;  // -1 at the ends
  };
  struct Candidate {
    uint64_t order;  // rank << 32 | position: the lowest rank first, then the leftmost
    uint32_t merged_id;
  };
  struct CacheEntry {
    uint64_t hash = 0;
    uint32_t key_offset = 0, key_length = 0;  // in keys_; length 0 is a free entry
    uint32_t ids_offset = 0, ids_count = 0;   // in ids_
  };

  std::vector<CacheEntry> cache_;  // direct-mapped, a power of two; empty for short texts
  std::string keys_;
  std::vector<int32_t> ids_;
  std::vector<uint32_t> symbols_, ranks_, merged_;  // of the word at hand
  std::vector<Symbol> list_;
  std::vector<Candidate> heap_;
};

class BpeModel {
 public:
  // merges: (left id, right id) -> (rank, merged id). merged tokens must spell left + right.
  BpeModel(Vocab vocab, PairMap merges, const std::vector<uint64_t>& merge_pairs,
           const BpeOptions& options);

  const Vocab& vocab() const { return vocab_; }

  // Appends the ids of a word (valid UTF-8).
  void encode(std::string_view word, BpeScratch* scratch, std::vector<int32_t>* ids) const;

 private:
  int32_t char_id(char32_t code_point, std::string_view bytes) const {
    if (code_point < bmp_ids_.size()) return bmp_ids_[code_point];
    return vocab_.find(bytes).value_or(-1);
  }
  void find_joints(const std::vector<uint64_t>& merge_pairs);
  void encode_cached(std::string_view word, bool whole, BpeScratch* scratch,
                     std::vector<int32_t>* ids) const;
  void encode_in_segments(std::string_view word, BpeScratch* scratch,
                          std::vector<int32_t>* ids) const;
  void split_into_symbols(std::string_view word, BpeScratch* scratch) const;
  void merge_short(BpeScratch* scratch, std::vector<int32_t>* ids) const;
  void merge_long(BpeScratch* scratch, std::vector<int32_t>* ids) const;

  Vocab vocab_;
  PairMap merges_;
  BpeOptions options_;
  std::vector<int32_t> bmp_ids_;       // [65536] id of each character token of the BMP, or -1
  std::array<int32_t, 256> byte_ids_;  // id of <0xNN>, or -1
  // (id of a character, id of the next) that some merge joins: any other boundary between two known
  // characters survives all merges, so that the parts of a long word are encoded one by one.
  PairMap joints_;
  bool can_segment_ = false;
};

}  // namespace mustafar::text
