#include "runtime/chat_anchors.h"

#include <algorithm>
#include <string_view>
#include <utility>

namespace mustafar {
namespace {

// Whether both have the same marks on the first `bytes`.
bool same_ranges(std::span<const TextRange> a, std::span<const TextRange> b, size_t bytes) {
  for (size_t i = 0;; i++) {
    const bool in_a = i < a.size() && a[i].begin < bytes, in_b = i < b.size() && b[i].begin < bytes;
    if (!in_a || !in_b) return in_a == in_b;
    if (a[i].begin != b[i].begin || std::min(a[i].end, bytes) != std::min(b[i].end, bytes)) {
      return false;
    }
  }
}

// The ranges behind `begin`, relative to it.
std::vector<TextRange> ranges_from(std::span<const TextRange> ranges, size_t begin) {
  std::vector<TextRange> out;
  for (const TextRange& range : ranges) {
    if (range.end > begin) out.push_back({std::max(range.begin, begin) - begin, range.end - begin});
  }
  return out;
}

}  // namespace

std::vector<int32_t> ChatAnchors::encode(const RenderedChat& chat, std::span<const int32_t> held,
                                         const Tokenizer& tokenizer) const {
  for (auto anchor = anchors.rbegin(); anchor != anchors.rend(); ++anchor) {
    if (anchor->bytes > chat.text.size() || anchor->tokens > held.size() ||
        chat.text.compare(0, anchor->bytes, text, 0, anchor->bytes) != 0 ||
        !same_ranges(chat.outside, outside, anchor->bytes) ||
        common_prefix(held.first(anchor->tokens), tokens) < anchor->tokens) {
      continue;
    }
    std::vector<int32_t> ids(held.begin(), held.begin() + static_cast<int64_t>(anchor->tokens));
    const std::vector<int32_t> rest =
        tokenizer.encode_chat(std::string_view(chat.text).substr(anchor->bytes),
                              ranges_from(chat.outside, anchor->bytes));
    if (!rest.empty() && !tokenizer.is_special(rest.front())) continue;
    ids.insert(ids.end(), rest.begin(), rest.end());
    return ids;
  }
  return tokenizer.encode_chat(chat.text, chat.outside);
}

void ChatAnchors::cut(size_t n_tokens) {
  while (!anchors.empty() && anchors.back().tokens > n_tokens) anchors.pop_back();
}

void ChatAnchors::add_reply(const RenderedChat& prompt, const std::string& reply, size_t n_reused,
                            std::optional<size_t> reply_end, std::span<const int32_t> held) {
  std::erase_if(anchors, [&](const Anchor& anchor) {
    return anchor.bytes > prompt.text.size() || anchor.tokens > n_reused;
  });
  text = prompt.text + reply;
  outside = prompt.outside;
  if (!reply.empty()) outside.push_back({prompt.text.size(), text.size()});
  if (reply_end) anchors.push_back({text.size(), *reply_end});
  tokens.assign(held.begin(), held.end());
}

size_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  return static_cast<size_t>(
      std::mismatch(a.begin(), a.begin() + std::min(a.size(), b.size()), b.begin()).first -
      a.begin());
}

}  // namespace mustafar
