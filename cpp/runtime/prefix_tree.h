// What caches held after some of their calls, kept for sequences that begin alike: a tree whose
// branches are token ids. It belongs to one setting of the cache.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "kv/sequence_cache.h"
#include "runtime/job.h"

namespace mustafar {

// States of caches, at most limit_bytes of them: the least recently used go first, pinned ones
// last. Pages are counted once, however many states share them. Not thread-safe.
class PrefixTree {
 public:
  explicit PrefixTree(int64_t limit_bytes) : limit_bytes_(limit_bytes) {}
  PrefixTree(const PrefixTree&) = delete;

  // The longest state after some of a prompt's calls, but for the last: made by the same calls, so
  // that going on from it gives the same bits. Null: there is none. long_rope: see SequenceStep.
  const SequenceCache* find(std::span<const int32_t> prompt, std::span<const PromptCall> calls,
                            bool long_rope);

  // The state that shares the most tokens with the prompt's, however it was made.
  struct Common {
    const SequenceCache* cache = nullptr;  // null: none shares a token
    int64_t n_tokens = 0;                  // shared; the cache may hold more
    int64_t usable = 0;                    // of them, see usable_tokens()
  };
  Common find_common(std::span<const int32_t> prompt, bool long_rope);

  // Keeps what a cache holds: the tokens, by these calls; without any where it was made otherwise.
  // Others make room for it; where they can't, it is not kept.
  void keep(std::span<const int32_t> tokens, std::span<const PromptCall> calls,
            SequenceCache&& cache, bool pinned);
  // Drops the states that a longer one of these tokens makes needless, but for pinned ones.
  void drop_beginnings(std::span<const int32_t> tokens, bool long_rope);
  // What is kept of these tokens is as other states are.
  void unpin(std::span<const int32_t> tokens);

  // Drops the state used least recently, a pinned one only where there are no others and
  // pinned_too says so; false where there is none to drop.
  bool drop_oldest(bool pinned_too = true);
  void clear();

  int64_t bytes() const { return bytes_; }
  int64_t size() const { return static_cast<int64_t>(states_.size()); }

 private:
  struct Node;
  struct State {
    std::vector<int64_t> call_ends;
    SequenceCache cache;
    bool pinned = false;
    Node* node = nullptr;
  };
  using States = std::list<State>;  // the least recently used first
  // The tokens on the way to a node are those of its ancestors' edges and its own.
  struct Node {
    std::vector<int32_t> edge;  // empty for a root alone
    Node* parent = nullptr;
    std::map<int32_t, std::unique_ptr<Node>> children;  // by the first token of their edges
    std::vector<States::iterator> states;               // of all tokens up to here
  };
  // How far tokens lead: through whole nodes to the last of them, and into the edge of one more.
  struct Path {
    Node* node = nullptr;  // where they end, or the one whose edge they end in
    int64_t n_tokens = 0;  // on the way
    int64_t in_edge = 0;   // of those, of the node's edge
    bool whole() const;    // they end at the node
  };

  Path follow(std::span<const int32_t> tokens, bool long_rope);
  Node* node_at(std::span<const int32_t> tokens, bool long_rope);  // made where there is none
  void use(States::iterator state) { states_.splice(states_.end(), states_, state); }
  void drop(States::iterator state);
  void prune(Node* node);  // and its ancestors, as far as they hold nothing
  void count(const SequenceCache& cache, int sign);

  const int64_t limit_bytes_;
  Node roots_[2];  // of sequences without and with long_rope
  States states_;
  std::unordered_map<const uint8_t*, int32_t> pages_;  // states that hold a page
  int64_t bytes_ = 0;
};

// Tokens that two sequences begin with alike.
int64_t common_length(std::span<const int32_t> a, std::span<const int32_t> b);

// Of the first n_tokens of a cache, how many its fork can go on from: all of them, or those in
// whole blocks and the sinks, where the tail behind them is gone; none where it has dropped blocks
// that they would still see.
int64_t usable_tokens(const SequenceCache& cache, int64_t n_tokens);
// That fork, where usable_tokens() leaves any. Throws OutOfMemory.
SequenceCache fork_beginning(const SequenceCache& cache, int64_t n_tokens);

}  // namespace mustafar
