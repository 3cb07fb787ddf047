// Conversations whose last message goes on: the prompt ends inside it, as transformers'
// continue_final_message has it.
#pragma once

#include <string>

#include "text/jinja/value.h"

namespace mustafar {

// Marks where the last message's field ends, so that the place is found in what the template makes.
class ContinuedMessage {
 public:
  // messages: a list as templates get it. field: of the last message, "content" or what the
  // template reads otherwise; a text or a list of parts, of which the last text counts. source: of
  // the template. Throws std::invalid_argument where there is nothing to go on with.
  ContinuedMessage(const jinja::Value& messages, const std::string& field,
                   const std::string& source, jinja::Budget& budget);

  const jinja::Value& messages() const { return messages_; }  // what to render

  // The rendered text up to the end of the message. Throws std::invalid_argument where the template
  // left the message out.
  jinja::Text cut(const jinja::Text& rendered) const;

 private:
  jinja::Value messages_;
  jinja::Text final_text_;  // as the caller gave it
};

}  // namespace mustafar
