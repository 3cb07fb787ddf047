// Lines from a person at a terminal, with editing, history and completion; or from a pipe.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace mustafar::cli {

class LineEditor {
 public:
  enum class Outcome { kLine, kEnd, kInterrupted };

  // What may stand at the cursor, given the line up to it: whole replacements of its last word.
  using Completer = std::function<std::vector<std::string>(const std::string& line)>;

  // Editing where stdin and stdout are terminals, plain reading elsewhere. history_file: empty for
  // none; read now, written at the end (readable by its owner alone).
  LineEditor(std::string program, std::string history_file, Completer completer);
  ~LineEditor();
  LineEditor(const LineEditor&) = delete;
  LineEditor& operator=(const LineEditor&) = delete;

  bool is_terminal() const;
  // A line without its end. prompt: shown at a terminal only; \1 encloses what takes no room.
  // Ctrl-C, as cli/interrupt.h sees it, ends the line.
  Outcome read(const std::string& prompt, std::string* line);
  // Whether the line ended inside a paste, which goes on. Lines that were typed ahead are not
  // pasted: each stays one by itself.
  bool in_paste() const;
  // Why the history can't be kept; empty where it can, or none is wanted.
  const std::string& history_problem() const;
  void remember(const std::string& text);  // adds to the history

  struct Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace mustafar::cli
