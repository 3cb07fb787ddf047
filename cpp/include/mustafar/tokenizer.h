// Text to token ids and back, from a Hugging Face tokenizer.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "mustafar/chat_template.h"
#include "mustafar/text_range.h"

namespace mustafar {

// Immutable and cheap to copy; safe to use from several threads.
class Tokenizer {
 public:
  // Reads a tokenizer.json, or the one in a folder. Throws TokenizerError naming file and field.
  static Tokenizer load(const std::filesystem::path& path);

  // Ids of a UTF-8 text. add_special: what the post-processor adds (BOS). parse_special: special
  // tokens spelled in the text become their id; otherwise they are text like any other.
  // Invalid UTF-8 is replaced by U+FFFD as in Python's errors="replace".
  std::vector<int32_t> encode(std::string_view text, bool add_special = true,
                              bool parse_special = false) const;

  // Ids of a rendered chat, nothing added: every special token that the template spelled becomes
  // its id; where it overlaps one of the ascending ranges `outside`, which came from users and
  // tools, it is text. Other added tokens are matched as in encode().
  std::vector<int32_t> encode_chat(std::string_view text,
                                   std::span<const TextRange> outside = {}) const;

  // Ids of a conversation as the model expects it, by default up to where its reply begins: the
  // folder's chat template rendered, then encode_chat(). A special token that a message spells
  // stays text. messages: a JSON array of objects with role and content. chat_template: instead of
  // the folder's. Throws as chat_template() and ChatTemplate::render do.
  std::vector<int32_t> apply_chat_template(
      std::string_view messages,
      const ChatTemplateOptions& options = ChatTemplateOptions::before_reply(),
      const std::optional<ChatTemplate>& chat_template = std::nullopt) const;
  // The chat template beside tokenizer.json, read when first asked for; or a built-in one or a
  // file, as --chat-template names it, with that folder's special tokens. Throws TemplateError.
  ChatTemplate chat_template() const;
  ChatTemplate chat_template(const std::string& name_or_file) const;

  // Text of ids; always valid UTF-8. An id that is no token, as in the padding of a model's
  // vocabulary, has no text; a negative one throws TokenizerError.
  std::string decode(std::span<const int32_t> token_ids, bool skip_special = false) const;

  int32_t vocab_size() const;  // one more than the largest id, added tokens included
  std::optional<int32_t> token_to_id(std::string_view token) const;
  // As spelled in tokenizer.json. Throws TokenizerError for an id that is no token.
  std::string id_to_token(int32_t token_id) const;
  // The bytes that a token adds to a text in whose midst it stands, which need not be whole
  // characters; a special token's are its spelling. Throws as id_to_token().
  std::string token_bytes(int32_t token_id) const;
  bool is_special(int32_t token_id) const;
  // The token that begins a text, and those that end one, the tokenizer's own first: of
  // tokenizer_config.json or special_tokens_map.json, config.json and generation_config.json beside
  // tokenizer.json; and what a text begins with where none of them says.
  std::optional<int32_t> bos_id() const;
  std::vector<int32_t> eos_ids() const;
  std::vector<int32_t> special_prefix() const;  // what add_special puts before a text, e.g. BOS

  // Decodes ids one by one, holding back bytes until they are whole UTF-8 characters. The pieces
  // and the flush together equal decode() of all the ids. after: ids that come before the first
  // one pushed; the text is then what follows theirs, with the space between two words and the rest
  // of a character that they begin.
  class Stream {
   public:
    explicit Stream(const Tokenizer& tokenizer, bool skip_special = true,
                    std::span<const int32_t> after = {});
    ~Stream();
    Stream(Stream&&) noexcept;
    Stream& operator=(Stream&&) noexcept;
    std::string push(int32_t token_id);  // text that became certain, often empty or one token
    std::string flush();                 // what was held back; the stream is then as new
    // Whole characters that were held back; what is pushed from now on does not change them.
    std::string settle();

   private:
    struct State;
    State& state() const;  // throws StateError where moved from
    std::unique_ptr<State> state_;
  };

  struct Impl;

 private:
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  const Impl& impl() const;  // throws StateError where moved from
  std::shared_ptr<const Impl> impl_;
};

}  // namespace mustafar
