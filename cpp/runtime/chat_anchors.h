// How a session's tokens and the text of a conversation belong together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "mustafar/chat_template.h"
#include "mustafar/tokenizer.h"

namespace mustafar {

// What the cache holds as text, kept so that a reply's own tokens are used again even where the
// tokenizer would have split its text another way.
struct ChatAnchors {
  // The first `tokens` of the cache spell the first `bytes` of `text`.
  struct Anchor {
    size_t bytes = 0, tokens = 0;
  };

  std::string text;
  std::vector<TextRange> outside;  // of text: what no template wrote
  std::vector<Anchor> anchors;     // ascending
  std::vector<int32_t> tokens;

  // Ids of a rendered conversation; held: what the session holds. A reply's own tokens are used
  // again where its text and all before it are unchanged and a token of the template follows,
  // whatever the tokenizer would make of the text now.
  std::vector<int32_t> encode(const RenderedChat& chat, std::span<const int32_t> held,
                              const Tokenizer& tokenizer) const;

  // The session holds only its first n_tokens from now on.
  void cut(size_t n_tokens);

  // A reply has been made to a rendered prompt, whose first n_reused tokens were held already; the
  // session holds `held` now. reply_end: how many of those spell prompt and reply; none: no number
  // of them does.
  void add_reply(const RenderedChat& prompt, const std::string& reply, size_t n_reused,
                 std::optional<size_t> reply_end, std::span<const int32_t> held);
};

// How many ids both begin with.
size_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b);

}  // namespace mustafar
