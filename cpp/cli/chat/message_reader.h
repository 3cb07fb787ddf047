// Messages from the lines of a terminal or of a pipe.
#pragma once

#include <string>

#include "cli/chat/display.h"
#include "cli/chat/line_editor.h"

namespace mustafar::cli {

class MessageReader {
 public:
  // commands: whether a line that begins with / is one.
  MessageReader(LineEditor& editor, const Style& style, bool commands)
      : editor_(editor), style_(style), commands_(commands) {}

  // A line, or several: after a trailing backslash, from one paste, between """ and """, or in
  // multi-line mode up to a single full stop.
  LineEditor::Outcome read(std::string* message, bool* is_command);

  // Switches the multi-line mode; returns whether it is on now.
  bool toggle_multiline() { return multiline_ = !multiline_; }

 private:
  LineEditor::Outcome read_more(std::string* message);
  // From the line that begins with """ on.
  LineEditor::Outcome read_block(std::string* message);

  LineEditor& editor_;
  const Style& style_;
  bool commands_;
  bool multiline_ = false;
};

}  // namespace mustafar::cli
