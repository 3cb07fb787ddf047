// Rendering with values rather than JSON text, for the bindings.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "mustafar/chat_template.h"
#include "text/jinja/ast.h"
#include "text/jinja/value.h"

namespace mustafar {

struct ChatTemplate::Impl {
  struct Named {
    std::string source;
    jinja::Template parsed;
  };
  std::map<std::string, Named> templates;  // "default", "tool_use", ...
  std::string name;                        // the one asked for; empty: by the presence of tools
  std::map<std::string, std::string> special_tokens;  // bos_token -> "<s>", ...

  const Named& choose(bool with_tools) const;
};

using TemplateVariables = std::vector<std::pair<std::string, jinja::Value>>;

// tools: None where there are none. options.tools and options.variables are not looked at.
RenderedChat render_values(const ChatTemplate::Impl& impl, const jinja::Value& messages,
                           const jinja::Value& tools, const TemplateVariables& variables,
                           const ChatTemplateOptions& options);

// The text and name of every built-in template.
const std::vector<std::pair<std::string, std::string>>& builtin_chat_templates();

}  // namespace mustafar
