// A chat template; after a zero byte, messages as JSON.
#include <stdexcept>

#include "fuzz_input.h"
#include "mustafar/chat_template.h"
#include "mustafar/error.h"

using namespace mustafar;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string input = fuzz::text(data, size);
  const size_t split = input.find('\0');
  const std::string messages =
      split == std::string::npos
          ? R"([{"role": "system", "content": "s"}, {"role": "user", "content": "x<|y|>"},
               {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f",
               "arguments": {"a": [1, 2.5, true]}}}]}, {"role": "tool", "content": "é"}])"
          : input.substr(split + 1);
  ChatTemplateOptions options;
  options.add_generation_prompt = true;
  options.bos_token = "<s>";
  options.eos_token = "</s>";
  options.tools = R"([{"type": "function", "function": {"name": "f", "parameters": {}}}])";
  options.date = "2025-03-07";
  options.max_steps = 200'000;
  options.max_output_bytes = 1 << 20;
  fuzz::expect_only<TemplateError>([&] {
    try {
      const ChatTemplate parsed = ChatTemplate::parse(input.substr(0, split));
      const RenderedChat chat = parsed.render_marked(messages, options);
      size_t at = 0;
      for (const TextRange& range : chat.outside) {
        if (range.begin < at || range.end <= range.begin || range.end > chat.text.size()) {
          std::abort();
        }
        at = range.end;
      }
    } catch (const std::invalid_argument&) {  // messages that are no messages
    }
  });
  return 0;
}
