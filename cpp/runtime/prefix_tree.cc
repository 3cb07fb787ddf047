#include "runtime/prefix_tree.h"

#include <algorithm>
#include <utility>

namespace mustafar {
namespace {

bool same_calls(std::span<const int64_t> ends, std::span<const PromptCall> calls) {
  return std::equal(ends.begin(), ends.end(), calls.begin(), calls.end(),
                    [](int64_t end, const PromptCall& call) { return end == call.end; });
}

}  // namespace

int64_t common_length(std::span<const int32_t> a, std::span<const int32_t> b) {
  const size_t most = std::min(a.size(), b.size());
  return std::mismatch(a.begin(), a.begin() + static_cast<int64_t>(most), b.begin()).first -
         a.begin();
}

int64_t usable_tokens(const SequenceCache& cache, int64_t n_tokens) {
  const CacheSpec& spec = cache.spec();
  if (!cache.can_cut(n_tokens)) return 0;
  const int64_t stored = spec.compressed(n_tokens);
  if (stored == cache.compressed()) return n_tokens;
  return stored + std::min<int64_t>(spec.config.sink_tokens, n_tokens);
}

SequenceCache fork_beginning(const SequenceCache& cache, int64_t n_tokens) {
  if (cache.spec().compressed(n_tokens) != cache.compressed()) return cache.cut_store(n_tokens);
  SequenceCache fork = cache.fork();
  fork.cut_tail(n_tokens);
  return fork;
}

// Tokens may end in the middle of the last node's edge: `n_tokens` then counts that part.
PrefixTree::Path PrefixTree::follow(std::span<const int32_t> tokens, bool long_rope) {
  Path path{.node = &roots_[long_rope ? 1 : 0]};
  while (path.n_tokens < static_cast<int64_t>(tokens.size())) {
    const auto rest = tokens.subspan(path.n_tokens);
    const auto child = path.node->children.find(rest[0]);
    if (child == path.node->children.end()) break;
    path.node = child->second.get();
    path.in_edge = common_length(path.node->edge, rest);
    path.n_tokens += path.in_edge;
    if (!path.whole()) break;
  }
  return path;
}

bool PrefixTree::Path::whole() const { return in_edge == static_cast<int64_t>(node->edge.size()); }

PrefixTree::Node* PrefixTree::node_at(std::span<const int32_t> tokens, bool long_rope) {
  const Path path = follow(tokens, long_rope);
  Node* node = path.node;
  if (!path.whole()) {  // a new node takes the edge's first part, and the old one's place
    Node* const lower = node;
    std::unique_ptr<Node>& place = lower->parent->children[lower->edge[0]];
    std::unique_ptr<Node> held = std::move(place);
    place = std::make_unique<Node>();
    node = place.get();
    node->parent = lower->parent;
    const auto cut = lower->edge.begin() + path.in_edge;
    node->edge.assign(lower->edge.begin(), cut);
    lower->edge.erase(lower->edge.begin(), cut);
    lower->parent = node;
    node->children[lower->edge[0]] = std::move(held);
  }
  const auto rest = tokens.subspan(path.n_tokens);
  if (rest.empty()) return node;
  auto leaf = std::make_unique<Node>();
  leaf->parent = node;
  leaf->edge.assign(rest.begin(), rest.end());
  return (node->children[rest[0]] = std::move(leaf)).get();
}

const SequenceCache* PrefixTree::find(std::span<const int32_t> prompt,
                                      std::span<const PromptCall> calls, bool long_rope) {
  if (calls.size() < 2) return nullptr;
  const Path path = follow(prompt.first(calls[calls.size() - 2].end), long_rope);
  int64_t depth = path.n_tokens;
  Node* node = path.node;
  if (!path.whole()) {
    depth -= path.in_edge;
    node = node->parent;
  }
  for (size_t n = calls.size() - 1; n > 0 && node != nullptr;) {
    if (calls[n - 1].end > depth) {
      n--;
    } else if (calls[n - 1].end < depth) {
      depth -= static_cast<int64_t>(node->edge.size());
      node = node->parent;
    } else {
      for (const States::iterator& state : node->states) {
        if (!same_calls(state->call_ends, calls.first(n))) continue;
        use(state);
        return &state->cache;
      }
      n--;
    }
  }
  return nullptr;
}

PrefixTree::Common PrefixTree::find_common(std::span<const int32_t> prompt, bool long_rope) {
  const Path path = follow(prompt, long_rope);
  Common best;
  States::iterator found;
  const auto consider = [&](States::iterator state, int64_t n_tokens) {
    const int64_t usable = usable_tokens(state->cache, n_tokens);
    if (usable <= best.usable) return;
    best = {&state->cache, n_tokens, usable};
    found = state;
  };
  // Some state that goes on where the prompt's tokens end or part: every leaf holds one.
  const Node* below = path.node;
  while (below->states.empty() && !below->children.empty()) {
    below = below->children.begin()->second.get();
  }
  if (!below->states.empty()) consider(below->states.front(), path.n_tokens);
  // Those that end before.
  int64_t depth = path.n_tokens;
  if (!path.whole()) depth -= path.in_edge;
  for (Node* node = path.whole() ? path.node : path.node->parent; node != nullptr;
       depth -= static_cast<int64_t>(node->edge.size()), node = node->parent) {
    for (const States::iterator& state : node->states) consider(state, depth);
  }
  if (best.cache != nullptr) use(found);
  return best;
}

void PrefixTree::keep(std::span<const int32_t> tokens, std::span<const PromptCall> calls,
                      SequenceCache&& cache, bool pinned) {
  Node* const node = node_at(tokens, cache.long_rope());
  for (const States::iterator& state : node->states) {
    if (!same_calls(state->call_ends, calls)) continue;
    state->pinned = state->pinned || pinned;
    return use(state);
  }
  count(cache, 1);
  states_.push_back({.call_ends = {}, .cache = std::move(cache), .pinned = pinned, .node = node});
  State& state = states_.back();
  for (const PromptCall& call : calls) state.call_ends.push_back(call.end);
  node->states.push_back(std::prev(states_.end()));
  while (bytes_ > limit_bytes_ && drop_oldest(pinned)) {
  }
}

void PrefixTree::drop_beginnings(std::span<const int32_t> tokens, bool long_rope) {
  const Path path = follow(tokens, long_rope);
  std::vector<States::iterator> needless;
  for (const Node* node = path.node->parent; node != nullptr; node = node->parent) {
    for (const States::iterator& state : node->states) {
      if (!state->pinned) needless.push_back(state);
    }
  }
  for (const States::iterator& state : needless) drop(state);
}

void PrefixTree::unpin(std::span<const int32_t> tokens) {
  for (const bool long_rope : {false, true}) {
    const Path path = follow(tokens, long_rope);
    if (!path.whole() || path.n_tokens != static_cast<int64_t>(tokens.size())) continue;
    for (const States::iterator& state : path.node->states) state->pinned = false;
  }
}

bool PrefixTree::drop_oldest(bool pinned_too) {
  auto oldest = std::find_if(states_.begin(), states_.end(),
                             [](const State& state) { return !state.pinned; });
  if (oldest == states_.end() && pinned_too) oldest = states_.begin();
  if (oldest == states_.end()) return false;
  drop(oldest);
  return true;
}

void PrefixTree::clear() {
  while (drop_oldest()) {
  }
}

void PrefixTree::drop(States::iterator state) {
  Node* const node = state->node;
  std::erase(node->states, state);
  count(state->cache, -1);
  states_.erase(state);
  prune(node);
}

void PrefixTree::prune(Node* node) {
  while (node->parent != nullptr && node->states.empty()) {
    Node* const parent = node->parent;
    std::unique_ptr<Node>& place = parent->children[node->edge[0]];
    if (node->children.size() > 1) return;
    if (node->children.size() == 1) {  // its only child takes its place and its part of the edge
      std::unique_ptr<Node> child = std::move(node->children.begin()->second);
      child->edge.insert(child->edge.begin(), node->edge.begin(), node->edge.end());
      child->parent = parent;
      place = std::move(child);
      return;
    }
    parent->children.erase(node->edge[0]);
    node = parent;
  }
}

// sign: 1 for a state that comes, -1 for one that goes.
void PrefixTree::count(const SequenceCache& cache, int sign) {
  int64_t n_pages = 0;  // that no other state holds
  for (const PageRef& page : cache.pages()) {
    int32_t& holders = pages_[page.data()];
    if (std::max(holders, holders + sign) == 1) n_pages++;
    holders += sign;
    if (holders == 0) pages_.erase(page.data());
  }
  bytes_ += sign * (n_pages * cache.spec().layout.page_bytes + cache.own_bytes());
}

}  // namespace mustafar
