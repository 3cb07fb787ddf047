// Chat templates: the Jinja programs that turn a conversation into a model's prompt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "mustafar/text_range.h"

namespace mustafar {

struct ChatTemplateOptions {
  bool add_generation_prompt = false;  // end with what starts the assistant's turn
  // End inside the last message, so that the reply continues it: the field to continue, "content"
  // or what else the template reads; empty: no. Goes without add_generation_prompt.
  std::string continue_final_message = {};
  // Special tokens as text; none: the folder's, or empty.
  std::optional<std::string> bos_token = {}, eos_token = {};
  std::string tools = {};      // JSON array of tool definitions; empty: no tools
  std::string variables = {};  // JSON object of further variables; empty: none
  // What strftime_now prints: "YYYY-MM-DD" or "YYYY-MM-DDTHH:MM:SS"; none: the local time.
  std::optional<std::string> date = {};
  // Bounds on a template gone wild. A step is about one operation or 16 bytes of text made.
  int64_t max_steps = 20'000'000;
  int64_t max_output_bytes = int64_t{64} << 20;

  static ChatTemplateOptions before_reply() {  // with add_generation_prompt
    ChatTemplateOptions options;
    options.add_generation_prompt = true;
    return options;
  }
};

struct RenderedChat {
  std::string text;
  // The parts of the text that came from messages, tools and variables rather than from the
  // template, ascending. A special token spelled there is text, not a token. A message's role
  // counts as the template's where it is a plain word.
  std::vector<TextRange> outside;
};

// A parsed template. Immutable, cheap to copy, safe to use from several threads. Renders as
// transformers does with jinja2, in a sandbox: no attribute of Python is reachable, and steps, text
// and nesting are bounded.
class ChatTemplate {
 public:
  // Throws TemplateError naming line and construct.
  static ChatTemplate parse(std::string_view source);

  // The template of a Hugging Face folder: chat_template.jinja and those named by files
  // additional_chat_templates/NAME.jinja, else tokenizer_config.json (a text or a list of named
  // ones), else chat_template.json; special tokens from tokenizer_config.json.
  // name: one of several named templates; empty: "default", or "tool_use" where tools are given.
  // Throws TemplateError, for a folder without one naming what can be done.
  static ChatTemplate from_folder(const std::filesystem::path& folder,
                                  const std::string& name = "");
  // Whether from_folder would find a template, parseable or not.
  static bool folder_has_template(const std::filesystem::path& folder);

  // A template that comes with this library, see builtin_names(). Throws TemplateError.
  static ChatTemplate builtin(const std::string& name);
  static std::vector<std::string> builtin_names();

  // What --chat-template names: a built-in template, a file, or one of the folder's by its name.
  // The special tokens are the folder's, where one is given.
  static ChatTemplate from_argument(const std::string& name_or_file,
                                    const std::filesystem::path& folder = {});

  // messages: a JSON array of objects with role and content. Throws TemplateError for a template
  // that fails, raises or runs away, std::invalid_argument for arguments that are no JSON.
  std::string render(std::string_view messages, const ChatTemplateOptions& options = {}) const;
  RenderedChat render_marked(std::string_view messages,
                             const ChatTemplateOptions& options = {}) const;

  const std::string& source() const;  // of the default template
  std::string bos_token() const;      // of the folder, or empty
  std::string eos_token() const;

  struct Impl;
  const Impl& impl() const;  // throws StateError where moved from

 private:
  explicit ChatTemplate(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

}  // namespace mustafar
