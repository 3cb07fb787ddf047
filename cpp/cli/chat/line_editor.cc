#include "cli/chat/line_editor.h"

#include <fcntl.h>
#include <histedit.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <clocale>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <deque>
#include <string_view>
#include <utility>

#include "cli/interrupt.h"

namespace mustafar::cli {
namespace {

constexpr int kHistoryLines = 1000;
constexpr int kMarkMs = 25;  // the bytes of an escape sequence follow each other within this time

// Terminals put these around what is pasted, once they are asked to.
constexpr const char* kAskForMarks = "\033[?2004h";
constexpr const char* kNoMarks = "\033[?2004l";
constexpr std::string_view kPasteBegins = "[200~", kPasteEnds = "[201~";  // behind an escape

constexpr wchar_t kEscape = 0x1b, kQuoteNext = 0x16, kReplacement = 0xfffd;

volatile std::sig_atomic_t resized = 0;

void on_resize(int) { resized = 1; }

// The editor shows text in the locale's encoding.
void use_utf8_locale() {
  const char* current = std::setlocale(LC_CTYPE, "");
  const std::string name = current ? current : "";
  if (name.find("UTF-8") == std::string::npos && name.find("utf8") == std::string::npos) {
    if (!std::setlocale(LC_CTYPE, "C.UTF-8")) std::setlocale(LC_CTYPE, "en_US.UTF-8");
  }
}

// Stdin's terminal, opened once more so that reading it never waits: Ctrl-C takes away what was
// typed before it, also behind the back of a poll that has seen it.
int open_terminal() {
  const int fd = ::open("/proc/self/fd/0", O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
  return fd >= 0 ? fd : STDIN_FILENO;
}

// Waits for a byte of the terminal: 1 with one, 0 at the end, -1 when Ctrl-C came instead. on_wake:
// called after signals. They come while it waits and at no other time, or one between the question
// and the wait would be slept through.
template <typename OnWake>
int read_byte(int terminal, unsigned char* byte, const OnWake& on_wake) {
  sigset_t signals, before;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGWINCH);
  while (true) {
    pthread_sigmask(SIG_BLOCK, &signals, &before);
    const bool stop = interrupted();
    int ready = -1;
    if (!stop) {
      on_wake();
      pollfd fd = {terminal, POLLIN, 0};
      ready = ppoll(&fd, 1, nullptr, &before);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (stop) return -1;
    if (ready < 0) continue;  // a signal
    const ssize_t n = ::read(terminal, byte, 1);
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

// Of a whole character: none may be spelled longer than it needs, nor be half of one of UTF-16.
bool is_character(wchar_t code, int more) {
  constexpr wchar_t kLeast[] = {0, 0x80, 0x800, 0x10000};
  return code >= kLeast[more] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff);
}

std::string why_not_writable(const std::string& file) {
  if (file.empty()) return "";
  struct stat status{};
  const auto said = [&](int error) { return file + ": " + std::strerror(error); };
  if (::stat(file.c_str(), &status) == 0) {
    if (S_ISDIR(status.st_mode)) return said(EISDIR);
    return ::access(file.c_str(), W_OK) == 0 ? "" : said(errno);
  }
  const size_t slash = file.find_last_of('/');
  const std::string folder = slash == std::string::npos ? "." : file.substr(0, slash + 1);
  return ::access(folder.c_str(), W_OK | X_OK) == 0 ? "" : said(errno);
}

}  // namespace

struct LineEditor::Impl {
  std::string history_file;
  Completer completer;
  EditLine* editor = nullptr;
  History* history = nullptr;
  int terminal = STDIN_FILENO;
  std::string prompt;
  std::deque<unsigned char> put_back;
  bool pasting = false;
  bool editing = false;
  bool quoted = false;  // the tab that is read next was announced
  std::string history_problem;
  struct sigaction previous_resize = {};
  std::string buffered;  // of a pipe
  bool pipe_ended = false;

  static Impl& of(EditLine* editor) {
    void* data = nullptr;
    el_get(editor, EL_CLIENTDATA, &data);
    return *static_cast<Impl*>(data);
  }

  static char* show_prompt(EditLine* editor) { return of(editor).prompt.data(); }

  // A byte of the terminal, or of what was looked at and put back.
  int next_byte(unsigned char* byte) {
    if (put_back.empty()) return read_byte(terminal, byte, [this] { show_resize(); });
    *byte = put_back.front();
    put_back.pop_front();
    return 1;
  }

  bool has_byte_soon() const {
    pollfd fd = {STDIN_FILENO, POLLIN, 0};
    return !put_back.empty() || (poll(&fd, 1, kMarkMs) > 0 && (fd.revents & POLLIN));
  }

  // Takes the rest of a mark behind an escape; what is none is put back.
  bool take_paste_mark() {
    std::string seen;
    unsigned char byte = 0;
    while (has_byte_soon() && next_byte(&byte) == 1) {
      seen += static_cast<char>(byte);
      if (seen == kPasteBegins || seen == kPasteEnds) {
        pasting = seen == kPasteBegins;
        return true;
      }
      if (!kPasteBegins.starts_with(seen) && !kPasteEnds.starts_with(seen)) break;
    }
    put_back.insert(put_back.begin(), seen.begin(), seen.end());
    return false;
  }

  // A paste that ends with its last line is over.
  void end_paste_behind_line() {
    unsigned char byte = 0;
    if (!pasting || !has_byte_soon() || next_byte(&byte) != 1) return;
    if (byte != kEscape || !take_paste_mark()) put_back.push_front(byte);
  }

  // One character; bytes that are none become U+FFFD, and those behind them are read anew.
  int read_character(unsigned char first, wchar_t* out) {
    const int more = continuation_bytes(first);
    *out = kReplacement;
    if (more < 0) return 1;
    wchar_t code = more == 0 ? first : static_cast<wchar_t>(first & (0x3f >> more));
    for (int i = 0; i < more; i++) {
      unsigned char byte = 0;
      const int next = next_byte(&byte);
      if (next < 0) return next;
      if (next == 0) return 1;
      if ((byte & 0xc0) != 0x80) {
        put_back.push_front(byte);
        return 1;
      }
      code = code << 6 | (byte & 0x3f);
    }
    if (is_character(code, more)) *out = code;
    return 1;
  }

  static int get_character(EditLine* editor, wchar_t* out) {
    Impl& self = of(editor);
    while (true) {
      unsigned char byte = 0;
      const int got = self.next_byte(&byte);
      if (got != 1) return got;
      if (byte == kEscape && self.take_paste_mark()) continue;
      if (self.pasting && byte < 0x20 && byte != '\r' && byte != '\n') {
        // Keys have no meaning inside a paste; a tab is a tab.
        if (byte != '\t') continue;
        if (!std::exchange(self.quoted, !self.quoted)) {
          self.put_back.push_front(byte);
          *out = kQuoteNext;
          return 1;
        }
      }
      return self.read_character(byte, out);
    }
  }

  // The line again where the terminal has another size now.
  void show_resize() {
    if (!resized || !editing) return;
    resized = 0;
    el_resize(editor);
    std::fputs("\r\033[J", stdout);
    std::fflush(stdout);
    el_set(editor, EL_REFRESH);
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
  impl_->history_problem = why_not_writable(impl_->history_file);
  if (!impl_->history_problem.empty()) impl_->history_file.clear();
  impl_->editor = el_init(program.c_str(), stdin, stdout, stderr);
  if (!impl_->editor) return;
  impl_->terminal = open_terminal();
  EditLine* editor = impl_->editor;
  el_set(editor, EL_CLIENTDATA, impl_.get());
  el_set(editor, EL_PROMPT_ESC, &Impl::show_prompt, '\1');
  el_set(editor, EL_EDITOR, "emacs");
  el_set(editor, EL_SIGNAL, 0);
  el_set(editor, EL_GETCFN, &Impl::get_character);
  el_set(editor, EL_ADDFN, "mustafar-complete", "Complete a command or a file", &Impl::complete);
  el_set(editor, EL_BIND, "\t", "mustafar-complete", nullptr);
  el_set(editor, EL_BIND, "^R", "em-inc-search-prev", nullptr);
  struct sigaction action = {};
  action.sa_handler = on_resize;
  sigemptyset(&action.sa_mask);
  sigaction(SIGWINCH, &action, &impl_->previous_resize);
  std::fputs(kAskForMarks, stdout);
  std::fflush(stdout);
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
  if (impl_->editor) {
    sigaction(SIGWINCH, &impl_->previous_resize, nullptr);
    std::fputs(kNoMarks, stdout);
    std::fflush(stdout);
    el_end(impl_->editor);
    if (impl_->terminal != STDIN_FILENO) ::close(impl_->terminal);
  }
  if (impl_->history) history_end(impl_->history);
}

bool LineEditor::is_terminal() const { return impl_->editor != nullptr; }

LineEditor::Outcome LineEditor::read(const std::string& prompt, std::string* line) {
  line->clear();
  if (!impl_->editor) return impl_->read_pipe(line);
  impl_->prompt = prompt;
  if (resized) el_resize(impl_->editor);
  resized = 0;
  impl_->editing = true;
  int count = 0;
  const char* text = el_gets(impl_->editor, &count);
  impl_->editing = false;
  if (interrupted()) {
    std::fputs("\n", stdout);
    std::fflush(stdout);
    el_reset(impl_->editor);
    impl_->pasting = false;
    impl_->put_back.clear();
    return Outcome::kInterrupted;
  }
  if (!text || count <= 0) return Outcome::kEnd;
  line->assign(text);
  while (!line->empty() && (line->back() == '\n' || line->back() == '\r')) line->pop_back();
  impl_->end_paste_behind_line();
  return Outcome::kLine;
}

bool LineEditor::in_paste() const { return impl_->pasting; }
const std::string& LineEditor::history_problem() const { return impl_->history_problem; }

void LineEditor::remember(const std::string& text) {
  if (!impl_->history || text.empty()) return;
  HistEvent event;
  ::history(impl_->history, &event, H_ENTER, text.c_str());
}

}  // namespace mustafar::cli
