// Regular expressions of tokenizer.json (Oniguruma's Ruby syntax) on PCRE2.
#pragma once

#include <pcre2.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace mustafar::text {

// The same expression in PCRE2's syntax. Throws TokenizerError naming what has no equal here.
std::string translate_pattern(std::string_view pattern);

// A part of a text that a pattern matched, or that lies between matches.
struct Part {
  uint32_t begin, end;  // bytes
  bool is_match;
};

// Match memory of one thread, and the processor time that patterns may still take in it.
class MatchScratch {
 public:
  explicit MatchScratch(double budget_seconds = 30.0) : budget_seconds_(budget_seconds) {}

 private:
  friend class Regex;
  void prepare();
  void charge(std::string_view pattern);  // throws TokenizerError when the budget is spent

  template <auto kFree>
  struct Free {
    template <typename T>
    void operator()(T* p) const {
      kFree(p);
    }
  };
  std::unique_ptr<pcre2_match_data, Free<pcre2_match_data_free>> data_;
  std::unique_ptr<pcre2_match_context, Free<pcre2_match_context_free>> context_;
  std::unique_ptr<pcre2_jit_stack, Free<pcre2_jit_stack_free>> stack_;
  double budget_seconds_;
  double start_seconds_ = 0;
  uint32_t calls_ = 0;
};

// Immutable; used by several threads, each with its own scratch.
class Regex {
 public:
  // A pattern as in tokenizer.json. Throws TokenizerError with the pattern and what is wrong.
  static Regex translated(std::string_view pattern);
  // PCRE2's own syntax, for patterns of this library.
  static Regex native(std::string_view pattern) { return Regex(pattern, std::string(pattern)); }

  // Cuts valid UTF-8 into matches and what lies between, in order; parts may be empty matches.
  // Throws TokenizerError where the pattern exceeds its match limit or the scratch's budget.
  void find_parts(std::string_view text, MatchScratch* scratch, std::vector<Part>* parts) const;

 private:
  Regex(std::string_view source, const std::string& pattern);
  // Next match at or after pos; false when there is none.
  bool search(std::string_view text, size_t pos, MatchScratch* scratch, Part* match) const;

  std::string source_;
  std::shared_ptr<const pcre2_code> code_;
};

}  // namespace mustafar::text
