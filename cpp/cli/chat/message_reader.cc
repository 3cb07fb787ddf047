#include "cli/chat/message_reader.h"

#include <algorithm>
#include <string_view>

namespace mustafar::cli {
namespace {

constexpr std::string_view kQuotes = "\"\"\"";

}  // namespace

LineEditor::Outcome MessageReader::read(std::string* message, bool* is_command) {
  const LineEditor::Outcome outcome = editor_.read(style_.prompt("> "), message);
  if (outcome != LineEditor::Outcome::kLine) return outcome;
  *is_command = commands_ && message->starts_with('/') && !editor_.in_paste();
  if (!*is_command) {
    const LineEditor::Outcome rest =
        message->starts_with(kQuotes) ? read_block(message) : read_more(message);
    if (rest == LineEditor::Outcome::kInterrupted) return rest;
  }
  editor_.remember(*message);
  return LineEditor::Outcome::kLine;
}

LineEditor::Outcome MessageReader::read_more(std::string* message) {
  std::string line;
  while (true) {
    if (multiline_) {
      if (*message == ".") {
        message->clear();
        break;
      }
      if (message->ends_with("\n.")) {
        message->erase(message->size() - 2);
        break;
      }
    } else if (!message->empty() && message->back() == '\\') {
      message->pop_back();
    } else if (!editor_.in_paste()) {
      break;
    }
    const LineEditor::Outcome outcome = editor_.read(style_.prompt(". "), &line);
    if (outcome == LineEditor::Outcome::kInterrupted) return outcome;
    if (outcome == LineEditor::Outcome::kEnd) break;
    *message += "\n" + line;
  }
  return LineEditor::Outcome::kLine;
}

LineEditor::Outcome MessageReader::read_block(std::string* message) {
  std::string text = message->substr(kQuotes.size());
  std::string line;
  while (text.find(kQuotes) == std::string::npos) {
    const LineEditor::Outcome outcome = editor_.read(style_.prompt(". "), &line);
    if (outcome == LineEditor::Outcome::kInterrupted) return outcome;
    if (outcome == LineEditor::Outcome::kEnd) break;
    text += "\n" + line;
  }
  text.erase(std::min(text.find(kQuotes), text.size()));
  if (text.starts_with('\n')) text.erase(0, 1);  // the quotes stood on lines of their own
  if (text.ends_with('\n')) text.pop_back();
  *message = text;
  return LineEditor::Outcome::kLine;
}

}  // namespace mustafar::cli
