#include "text/regex.h"

#include <algorithm>
#include <ctime>
#include <new>

#include "mustafar/error.h"
#include "text/unicode/utf8.h"

namespace mustafar::text {

namespace {

// Bounds on one match attempt: backtracking steps, and bytes of backtracking stack.
constexpr uint32_t kMatchLimit = 5'000'000;
constexpr size_t kStackStartBytes = 64 << 10;
constexpr size_t kStackLimitBytes = 64 << 20;
constexpr uint32_t kHeapLimitKilobytes = 128 << 10;
// A search looks at this many starts, then the clock is read; so it is after as many searches.
constexpr size_t kStartsPerSearch = 1024;
constexpr uint32_t kCallsPerClockRead = 512;

double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

std::string message_of(int code) {
  PCRE2_UCHAR buffer[256];
  const int length = pcre2_get_error_message(code, buffer, sizeof buffer);
  return length > 0 ? std::string(reinterpret_cast<char*>(buffer), length)
                    : "PCRE2 error " + std::to_string(code);
}

}  // namespace

void MatchScratch::prepare() {
  if (data_) return;
  data_.reset(pcre2_match_data_create(1, nullptr));
  context_.reset(pcre2_match_context_create(nullptr));
  stack_.reset(pcre2_jit_stack_create(kStackStartBytes, kStackLimitBytes, nullptr));
  if (!data_ || !context_) throw std::bad_alloc();
  pcre2_set_match_limit(context_.get(), kMatchLimit);
  pcre2_set_heap_limit(context_.get(), kHeapLimitKilobytes);
  if (stack_) pcre2_jit_stack_assign(context_.get(), nullptr, stack_.get());
  start_seconds_ = thread_seconds();
}

void MatchScratch::charge(std::string_view pattern) {
  if (thread_seconds() - start_seconds_ < budget_seconds_) return;
  throw TokenizerError("pattern " + unicode::in_quotes(pattern) + " took more than " +
                       std::to_string(budget_seconds_) + " s of processor time on this text");
}

Regex::Regex(std::string_view source, const std::string& pattern) : source_(source) {
  constexpr uint32_t kOptions =
      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C | PCRE2_USE_OFFSET_LIMIT;
  const std::unique_ptr<pcre2_compile_context, void (*)(pcre2_compile_context*)> context(
      pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
  if (!context) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_bsr(context.get(), PCRE2_BSR_UNICODE);
  pcre2_set_max_pattern_length(context.get(), 1 << 16);
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                   kOptions, &error, &offset, context.get());
  if (!code) {
    throw TokenizerError("pattern " + unicode::in_quotes(source) +
                         " is not valid: " + message_of(error));
  }
  code_ = std::shared_ptr<const pcre2_code>(
      code, [](const pcre2_code* c) { pcre2_code_free(const_cast<pcre2_code*>(c)); });
  // Where no executable memory is granted, matching interprets: slower, and the same.
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
}

Regex Regex::translated(std::string_view pattern) {
  return Regex(pattern, translate_pattern(pattern));
}

bool Regex::search(std::string_view text, size_t pos, MatchScratch* scratch, Part* match) const {
  for (;;) {
    if (++scratch->calls_ % kCallsPerClockRead == 0) scratch->charge(source_);
    const size_t last_start = std::min(pos + kStartsPerSearch, text.size());
    pcre2_set_offset_limit(scratch->context_.get(), last_start);
    const int rc =
        pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), pos,
                    PCRE2_NO_UTF_CHECK, scratch->data_.get(), scratch->context_.get());
    if (rc >= 0) {
      const PCRE2_SIZE* range = pcre2_get_ovector_pointer(scratch->data_.get());
      if (range[0] < pos || range[1] < range[0]) {
        throw TokenizerError("pattern " + unicode::in_quotes(source_) + " matches backwards");
      }
      *match = {static_cast<uint32_t>(range[0]), static_cast<uint32_t>(range[1]), true};
      return true;
    }
    if (rc != PCRE2_ERROR_NOMATCH) {
      throw TokenizerError("pattern " + unicode::in_quotes(source_) + " failed at byte " +
                           std::to_string(pos) + " of a text: " + message_of(rc));
    }
    if (last_start == text.size()) return false;
    scratch->charge(source_);
    pos = last_start + 1;
    while (pos < text.size() && unicode::is_continuation(text[pos])) pos++;
  }
}

void Regex::find_parts(std::string_view text, MatchScratch* scratch,
                       std::vector<Part>* parts) const {
  scratch->prepare();
  parts->clear();
  const auto size = static_cast<uint32_t>(text.size());
  uint32_t covered = 0;  // end of the last part
  Part match{};
  for (size_t pos = 0; pos <= text.size() && search(text, pos, scratch, &match);) {
    if (match.begin == match.end && match.begin == covered && !parts->empty()) {
      // An empty match right behind the last one: go on behind the next character.
      if (pos == text.size()) break;
      unicode::next_code_point(text, &pos);
      continue;
    }
    if (covered != match.begin) parts->push_back({covered, match.begin, false});
    parts->push_back(match);
    covered = match.end;
    pos = match.end;
  }
  if (covered != size) parts->push_back({covered, size, false});
}

}  // namespace mustafar::text
