// A document and questions about it, as token ids: first the document, which is computed and
// compressed by itself, then each question in a call of its own.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "mustafar/chat_template.h"
#include "mustafar/model.h"

namespace mustafar::cli {

class Dialogue {
 public:
  // use_chat: with the model's chat template, where it has one; otherwise as plain text with
  // "Question:" and "Answer:". Throws TokenizerError for a model without a tokenizer.
  Dialogue(const Model& model, bool use_chat);

  struct Opening {
    std::vector<int32_t> document;  // up to where it ends
    std::vector<int32_t> question;  // from there to where the reply begins
  };
  // reply_start: words that the reply is made to begin with, or empty.
  Opening open(const std::string& document, const std::string& question,
               const std::string& reply_start) const;
  // What follows a reply up to where the next begins. last: the last token of that reply, if it is
  // one that ended it.
  std::vector<int32_t> next(const std::string& question, const std::string& reply_start,
                            std::optional<int32_t> last) const;

  bool is_chat() const { return chat_.has_value(); }
  // Texts that end a reply: none with a template, whose end is a token.
  std::vector<std::string> stop_texts() const;

 private:
  const Model& model_;
  std::optional<ChatTemplate> chat_;
};

}  // namespace mustafar::cli
