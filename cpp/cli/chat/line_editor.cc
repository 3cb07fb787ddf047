#include "cli/chat/line_editor.h"

#include <histedit.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <clocale>
#include <cstdio>
#include <utility>

#include "cli/interrupt.h"

namespace mustafar::cli {
namespace {

constexpr int kHistoryLines = 1000;
constexpr int kPasteMs = 15;  // a pasted line follows the one before it within this time

// The editor shows text in the locale's encoding.
void use_utf8_locale() {
  const char* current = std::setlocale(LC_CTYPE, "");
  const std::string name = current ? current : "";
  if (name.find("UTF-8") == std::string::npos && name.find("utf8") == std::string::npos) {
    if (!std::setlocale(LC_CTYPE, "C.UTF-8")) std::setlocale(LC_CTYPE, "en_US.UTF-8");
  }
}

// Waits for a byte of stdin: 1 with one, 0 at the end, -1 when Ctrl-C came instead.
int read_byte(unsigned char* byte) {
  while (true) {
    if (interrupted()) return -1;
    pollfd fd = {STDIN_FILENO, POLLIN, 0};
    if (poll(&fd, 1, -1) < 0 && errno == EINTR) continue;
    const ssize_t n = ::read(STDIN_FILENO, byte, 1);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    return n == 1 ? 1 : 0;
  }
}

// How many bytes follow the first of a UTF-8 character; -1 where it starts none.
int continuation_bytes(unsigned char first) {
  if (first < 0x80) return 0;
  if (first < 0xc2) return -1;
  return first < 0xe0 ? 1 : first < 0xf0 ? 2 : first < 0xf5 ? 3 : -1;
}

}  // namespace

struct LineEditor::Impl {
  std::string history_file;
  Completer completer;
  EditLine* editor = nullptr;
  History* history = nullptr;
  std::string prompt;
  std::string buffered;  // of a pipe
  bool pipe_ended = false;

  static Impl& of(EditLine* editor) {
    void* data = nullptr;
    el_get(editor, EL_CLIENTDATA, &data);
    return *static_cast<Impl*>(data);
  }

  static char* show_prompt(EditLine* editor) { return of(editor).prompt.data(); }

  // One character of stdin; a byte that starts none becomes U+FFFD.
  static int get_character(EditLine*, wchar_t* out) {
    unsigned char byte = 0;
    const int got = read_byte(&byte);
    if (got != 1) return got;
    const int more = continuation_bytes(byte);
    wchar_t code = more < 0    ? 0xfffd
                   : more == 0 ? byte
                               : static_cast<wchar_t>(byte & (0x3f >> more));
    for (int i = 0; i < more; i++) {
      const int next = read_byte(&byte);
      if (next != 1) return next;
      code = code << 6 | (byte & 0x3f);
    }
    *out = code;
    return 1;
  }

  static unsigned char complete(EditLine* editor, int) {
    const LineInfo* info = el_line(editor);
    const std::string line(info->buffer, info->cursor);
    const std::vector<std::string> words = of(editor).completer(line);
    if (words.empty()) return CC_REFRESH_BEEP;
    const size_t space = line.find_last_of(' ');
    const std::string typed = space == std::string::npos ? line : line.substr(space + 1);
    std::string common = words[0];
    for (const std::string& word : words) {
      common.erase(std::mismatch(common.begin(), common.end(), word.begin(), word.end()).first,
                   common.end());
    }
    std::string rest = common.substr(std::min(typed.size(), common.size()));
    if (words.size() == 1 && common.back() != '/' && common.back() != '=') rest += ' ';
    if (!rest.empty()) return el_insertstr(editor, rest.c_str()) == 0 ? CC_REFRESH : CC_ERROR;
    std::fputs("\n", stdout);
    for (const std::string& word : words) std::fprintf(stdout, "%s  ", word.c_str());
    std::fputs("\n", stdout);
    std::fflush(stdout);
    return CC_REDISPLAY;
  }

  Outcome read_pipe(std::string* line) {
    while (true) {
      const size_t end = buffered.find('\n');
      if (end != std::string::npos) {
        *line = buffered.substr(0, end);
        buffered.erase(0, end + 1);
        if (!line->empty() && line->back() == '\r') line->pop_back();
        return Outcome::kLine;
      }
      if (pipe_ended) {
        if (buffered.empty()) return Outcome::kEnd;
        *line = std::exchange(buffered, {});
        return Outcome::kLine;
      }
      if (interrupted()) return Outcome::kInterrupted;
      pollfd fd = {STDIN_FILENO, POLLIN, 0};
      if (poll(&fd, 1, -1) < 0) continue;
      char chunk[4096];
      const ssize_t n = ::read(STDIN_FILENO, chunk, sizeof(chunk));
      if (n < 0 && errno == EINTR) continue;
      if (n > 0) {
        buffered.append(chunk, static_cast<size_t>(n));
      } else {
        pipe_ended = true;
      }
    }
  }

  void save_history() {
    if (!history || history_file.empty()) return;
    const mode_t before = umask(0077);
    HistEvent event;
    ::history(history, &event, H_SAVE, history_file.c_str());
    umask(before);
  }
};

LineEditor::LineEditor(std::string program, std::string history_file, Completer completer)
    : impl_(std::make_unique<Impl>()) {
  impl_->history_file = std::move(history_file);
  impl_->completer = std::move(completer);
  if (isatty(STDIN_FILENO) != 1 || isatty(STDOUT_FILENO) != 1) return;
  use_utf8_locale();
  impl_->editor = el_init(program.c_str(), stdin, stdout, stderr);
  if (!impl_->editor) return;
  EditLine* editor = impl_->editor;
  el_set(editor, EL_CLIENTDATA, impl_.get());
  el_set(editor, EL_PROMPT_ESC, &Impl::show_prompt, '\1');
  el_set(editor, EL_EDITOR, "emacs");
  el_set(editor, EL_SIGNAL, 0);
  el_set(editor, EL_GETCFN, &Impl::get_character);
  el_set(editor, EL_ADDFN, "mustafar-complete", "Complete a command or a file", &Impl::complete);
  el_set(editor, EL_BIND, "\t", "mustafar-complete", nullptr);
  el_set(editor, EL_BIND, "^R", "em-inc-search-prev", nullptr);
  impl_->history = history_init();
  if (!impl_->history) return;
  HistEvent event;
  ::history(impl_->history, &event, H_SETSIZE, kHistoryLines);
  ::history(impl_->history, &event, H_SETUNIQUE, 1);
  el_set(editor, EL_HIST, ::history, impl_->history);
  if (!impl_->history_file.empty()) {
    ::history(impl_->history, &event, H_LOAD, impl_->history_file.c_str());
  }
}

LineEditor::~LineEditor() {
  impl_->save_history();
  if (impl_->editor) el_end(impl_->editor);
  if (impl_->history) history_end(impl_->history);
}

bool LineEditor::is_terminal() const { return impl_->editor != nullptr; }

LineEditor::Outcome LineEditor::read(const std::string& prompt, std::string* line) {
  line->clear();
  if (!impl_->editor) return impl_->read_pipe(line);
  impl_->prompt = prompt;
  int count = 0;
  const char* text = el_gets(impl_->editor, &count);
  if (interrupted()) {
    std::fputs("\n", stdout);
    std::fflush(stdout);
    el_reset(impl_->editor);
    return Outcome::kInterrupted;
  }
  if (!text || count <= 0) return Outcome::kEnd;
  line->assign(text);
  while (!line->empty() && (line->back() == '\n' || line->back() == '\r')) line->pop_back();
  return Outcome::kLine;
}

bool LineEditor::has_pending() const {
  if (!impl_->editor) return false;
  pollfd fd = {STDIN_FILENO, POLLIN, 0};
  return poll(&fd, 1, kPasteMs) > 0 && (fd.revents & POLLIN);
}

void LineEditor::remember(const std::string& text) {
  if (!impl_->history || text.empty()) return;
  HistEvent event;
  ::history(impl_->history, &event, H_ENTER, text.c_str());
}

}  // namespace mustafar::cli
