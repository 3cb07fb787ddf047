// The pre_tokenizer of tokenizer.json: cuts a normalized text into the words that BPE merges.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/json_field.h"
#include "text/normalizer.h"
#include "text/regex.h"

namespace mustafar::text {

struct Span {
  uint32_t begin, end;  // bytes of the text at hand
};

// A text in pieces, possibly rewritten on the way.
struct PreTokenized {
  std::string_view text;    // what the spans refer to
  std::string storage;      // holds text once a step has rewritten it
  std::vector<Span> spans;  // in order, none empty
  bool at_start = false;    // the first piece starts where the whole input does

  // Working memory of the steps.
  std::vector<Span> next_spans;
  std::vector<Part> parts;
  std::string next_storage;
};

class PreTokenizer {
 public:
  PreTokenizer() = default;
  // field: an object, or null for none. Throws TokenizerError, also for unsupported types.
  static PreTokenizer parse(const JsonField& field);

  bool empty() const { return steps_.empty(); }
  // text: non-empty. The result's spans are valid as long as text and *out are.
  void apply(std::string_view text, bool at_start, MatchScratch* scratch, PreTokenized* out) const;

 private:
  enum class Kind { kSplit, kByteLevel, kMetaspace };
  enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class Prepend { kNever, kFirst, kAlways };
  struct Step {
    Kind kind = Kind::kSplit;
    Pattern pattern;  // what to split by, where cuts
    Behavior behavior = Behavior::kIsolated;
    bool invert = false;                // kSplit: what lies between matches counts as matches
    bool cuts = true;                   // kByteLevel, kMetaspace: split by the pattern as well
    Prepend prepend = Prepend::kNever;  // kMetaspace, kByteLevel
    std::string replacement;            // kMetaspace: what spaces become
  };

  void add(const JsonField& field);
  void add_split(Pattern pattern, Behavior behavior, bool invert = false);
  void add_metaspace(const JsonField& field);
  static Behavior parse_behavior(const JsonField& field);

  static void split(const Step& step, MatchScratch* scratch, PreTokenized* out);
  static void append_split(const Step& step, uint32_t offset, PreTokenized* out);
  template <typename Rewrite>
  static void rewrite(PreTokenized* out, const Rewrite& piece);

  std::vector<Step> steps_;
};

}  // namespace mustafar::text
