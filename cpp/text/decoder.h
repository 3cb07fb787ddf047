// The decoder of tokenizer.json: token strings back to text, incrementally.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/json_field.h"
#include "text/normalizer.h"

namespace mustafar::text {

// One step of decoding. Tokens flow through a chain of these, in fragments: a step passes on what
// can't change any more and holds back the rest.
class DecodeStage {
 public:
  virtual ~DecodeStage() = default;
  virtual void text(std::string_view fragment) = 0;  // part of the current token
  virtual void end_token() = 0;
  virtual void settle() = 0;  // between tokens: whole characters are passed on at once
  virtual void finish() = 0;  // after the last token
};

struct DecodeStep {
  enum class Kind { kByteLevel, kReplace, kByteFallback, kFuse, kStrip, kMetaspace, kSpaces };
  Kind kind;
  Pattern pattern;             // kReplace
  std::string content;         // kReplace; kStrip and kMetaspace: one character
  size_t start = 0, stop = 0;  // kStrip: characters at most
  bool drops_first = false;    // kMetaspace: the first token loses its replacement characters
};

class Decoder {
 public:
  Decoder() = default;
  // field: an object, or null, with which tokens are joined by spaces. Throws TokenizerError, also
  // for unsupported types.
  static Decoder parse(const JsonField& field);

  // The bytes that a token adds to a text in whose midst it stands.
  std::string bytes_of(std::string_view token) const;

 private:
  friend class DecodeRun;
  void add(const JsonField& field);

  std::vector<DecodeStep> steps_;
};

// Decoding of one sequence of tokens. The decoder must outlive it.
class DecodeRun {
 public:
  explicit DecodeRun(const Decoder& decoder);

  void token(std::string_view token) {
    stages_.front()->text(token);
    stages_.front()->end_token();
  }
  void settle() { stages_.front()->settle(); }
  void finish() { stages_.front()->finish(); }
  std::string take();  // the text that became certain since the last call

 private:
  std::unique_ptr<std::string> out_;
  std::vector<std::unique_ptr<DecodeStage>> stages_;  // the first receives the tokens
  std::unique_ptr<MatchScratch> scratch_;
};

}  // namespace mustafar::text
