// Tool calls in the text of a reply, in the styles of published models.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "mustafar/chat.h"
#include "mustafar/tokenizer.h"

namespace mustafar {

struct ToolCall {
  std::string name;
  std::string arguments;  // a JSON object, as the reply has it; where that is Python, in JSON
};

// Parts a reply's text into what is said and what is called, also while it is made. Read are
//
//   <tool_call>{"name": ..., "arguments": {...}}</tool_call>      Hermes, Qwen
//   {"name": ..., "parameters": {...}}                            Llama 3, also several with ";"
//                                                                 between, or behind <|python_tag|>
//   [TOOL_CALLS][{"name": ..., "arguments": {...}}]               Mistral
//   [TOOL_CALLS]name[ARGS]{...}                                   newer Mistral, also with
//                                                                 [CALL_ID] behind the name
//   [name(key=value), ...]                                        models that write Python
//
// Only tools that were offered are called, and only by what can be read to its end: everything else
// is text.
class ToolCallReader {
 public:
  // tools: JSON array of tool definitions, as ChatOptions::tools; empty: none. Throws
  // std::invalid_argument for what is no array of objects.
  explicit ToolCallReader(std::string_view tools);
  // tokenizer: where it has the marks above as special tokens, which have no text in a reply, they
  // are known by their ids.
  ToolCallReader(std::string_view tools, const Tokenizer& tokenizer);
  ~ToolCallReader();
  ToolCallReader(ToolCallReader&&) noexcept;
  ToolCallReader& operator=(ToolCallReader&&) noexcept;

  // Takes more of the reply, and the tokens that made it (they are looked at for marks alone);
  // returns text that is no part of a call, whatever follows.
  std::string push(std::string_view piece, std::span<const int32_t> token_ids = {});

  // Whether push() looks at tokens: the tokenizer has such marks.
  bool reads_tokens() const;

  struct Rest {
    std::string text;
    std::vector<ToolCall> calls;
  };
  // At the reply's end: the text that was held back, and the calls.
  Rest finish() const;

 private:
  struct Impl;
  Impl& impl() const;  // throws StateError where moved from
  std::unique_ptr<Impl> impl_;
};

// The assistant's message as chat templates expect it, to stand in the place of the reply's text.
// Call i has the id that result_message() gives for first_id + i.
ChatMessage call_message(std::string_view text, std::span<const ToolCall> calls,
                         size_t first_id = 0);
// The "tool" message that answers a call.
ChatMessage result_message(const ToolCall& call, size_t id, std::string_view content);

}  // namespace mustafar
