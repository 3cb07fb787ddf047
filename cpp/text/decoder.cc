#include "text/decoder.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "text/byte_level.h"
#include "text/unicode/properties.h"
#include "text/unicode/utf8.h"

namespace mustafar::text {

namespace {

size_t strip_count(const JsonField& field) {
  constexpr int64_t kMax = 1 << 20;
  const int64_t count = field.integer();
  if (count < 0 || count > kMax) field.fail("must be from 0 to " + std::to_string(kMax));
  return static_cast<size_t>(count);
}

}  // namespace

Decoder Decoder::parse(const JsonField& field) {
  Decoder decoder;
  if (field.is_null()) {
    decoder.steps_.push_back({DecodeStep::Kind::kSpaces, {}, {}});
  } else {
    decoder.add(field);
  }
  return decoder;
}

void Decoder::add(const JsonField& field) {
  const std::string type = field.at("type").string();
  DecodeStep step{DecodeStep::Kind::kFuse, {}, {}};
  if (type == "Sequence") {
    for (const JsonField& member : field.at("decoders").elements()) add(member);
    return;
  }
  if (type == "ByteLevel") {
    step.kind = DecodeStep::Kind::kByteLevel;
  } else if (type == "Replace") {
    step.kind = DecodeStep::Kind::kReplace;
    step.pattern = Pattern::parse(field.at("pattern"));
    step.content = field.at("content").string();
  } else if (type == "ByteFallback") {
    step.kind = DecodeStep::Kind::kByteFallback;
  } else if (type == "Strip") {
    step.kind = DecodeStep::Kind::kStrip;
    step.content = field.at("content").character();
    step.start = strip_count(field.at("start"));
    step.stop = strip_count(field.at("stop"));
  } else if (type == "Metaspace") {
    step.kind = DecodeStep::Kind::kMetaspace;
    step.content = field.at("replacement").character();
    step.drops_first = field.has("prepend_scheme") ? field.at("prepend_scheme").string() != "never"
                                                   : field.boolean_or("add_prefix_space", true);
  } else if (type != "Fuse") {
    field.unsupported_type(type,
                           "ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace and Sequence");
  }
  steps_.push_back(std::move(step));
}

namespace {

// The end of the chain.
class Sink final : public DecodeStage {
 public:
  explicit Sink(std::string* out) : out_(*out) {}
  void text(std::string_view fragment) override { out_.append(fragment); }
  void end_token() override {}
  void settle() override {}
  void finish() override {}

 private:
  std::string& out_;
};

class Spaces final : public DecodeStage {
 public:
  explicit Spaces(DecodeStage* next) : next_(*next) {}
  void text(std::string_view fragment) override {
    if (between_) next_.text(" ");
    between_ = false;
    next_.text(fragment);
  }
  void end_token() override { between_ = true; }
  void settle() override { next_.settle(); }
  void finish() override { next_.finish(); }

 private:
  DecodeStage& next_;
  bool between_ = false;
};

class Fuse final : public DecodeStage {
 public:
  explicit Fuse(DecodeStage* next) : next_(*next) {}
  void text(std::string_view fragment) override { next_.text(fragment); }
  void end_token() override {}
  void settle() override { next_.settle(); }
  void finish() override {
    next_.end_token();
    next_.finish();
  }

 private:
  DecodeStage& next_;
};

// A step that needs whole tokens.
class WholeTokenStage : public DecodeStage {
 public:
  explicit WholeTokenStage(DecodeStage* next) : next_(*next) {}
  void text(std::string_view fragment) override { buffer_.append(fragment); }
  void end_token() override {
    token(buffer_);
    buffer_.clear();
  }
  void settle() override { next_.settle(); }
  void finish() override { next_.finish(); }

 protected:
  virtual void token(std::string_view token) = 0;
  void pass(std::string_view token) {
    next_.text(token);
    next_.end_token();
  }
  DecodeStage& next_;

 private:
  std::string buffer_;
};

// What a token of the byte-level alphabet spells; another one, as added tokens may be, spells
// itself.
void append_bytes(std::string_view token, std::string* bytes) {
  const size_t size = bytes->size();
  for (size_t pos = 0; pos < token.size();) {
    const auto byte = byte_level_byte(unicode::next_code_point(token, &pos));
    if (!byte) {
      bytes->resize(size);
      bytes->append(token);
      return;
    }
    *bytes += static_cast<char>(*byte);
  }
}

// All tokens become one, of the bytes that they spell. What is not valid UTF-8 becomes U+FFFD.
class ByteLevel final : public WholeTokenStage {
 public:
  using WholeTokenStage::WholeTokenStage;
  void finish() override {
    if (!bytes_.empty()) next_.text(unicode::kReplacementCharacter);
    next_.end_token();
    next_.finish();
  }

 protected:
  void token(std::string_view token) override {
    append_bytes(token, &bytes_);
    std::string certain;
    size_t pos = 0;
    while (pos < bytes_.size()) {
      const unicode::Utf8Step step = unicode::read_utf8(bytes_, pos);
      if (step.truncated) break;
      certain.append(step.valid ? std::string_view(bytes_).substr(pos, step.length)
                                : unicode::kReplacementCharacter);
      pos += step.length;
    }
    bytes_.erase(0, pos);
    if (!certain.empty()) next_.text(certain);
  }

 private:
  std::string bytes_;  // the start of a character
};

class Replace final : public WholeTokenStage {
 public:
  Replace(const DecodeStep& step, MatchScratch* scratch, DecodeStage* next)
      : WholeTokenStage(next), step_(step), scratch_(scratch) {}

 protected:
  void token(std::string_view token) override {
    pass(step_.pattern.replace(token, step_.content, scratch_));
  }

 private:
  const DecodeStep& step_;
  MatchScratch* scratch_;
};

// The byte that a token <0xNN> stands for.
std::optional<char> fallback_byte(std::string_view token) {
  constexpr std::string_view kBefore = "<0x", kAfter = ">";
  if (token.size() != 6 || !token.starts_with(kBefore) || !token.ends_with(kAfter)) return {};
  const int high = unicode::digit_value(token[3]), low = unicode::digit_value(token[4]);
  const auto is_hex = [](int digit) { return digit >= 0 && digit < 16; };
  if (!is_hex(high) || !is_hex(low)) return {};
  return static_cast<char>(high << 4 | low);
}

// A run of <0xNN> becomes the text of its bytes where that is valid UTF-8, and otherwise one U+FFFD
// for each byte. Which of the two is known only at the run's end, so the whole run is held back.
class ByteFallback final : public WholeTokenStage {
 public:
  using WholeTokenStage::WholeTokenStage;
  // The run ends here, but for the start of a character.
  void settle() override {
    size_t pos = 0;
    while (pos < run_.size()) {
      const unicode::Utf8Step step = unicode::read_utf8(run_, pos);
      if (step.truncated) break;
      pass(step.valid ? std::string_view(run_).substr(pos, step.length)
                      : unicode::kReplacementCharacter);
      pos += step.length;
    }
    run_.erase(0, pos);
    next_.settle();
  }
  void finish() override {
    flush();
    next_.finish();
  }

 protected:
  void token(std::string_view token) override {
    if (const auto byte = fallback_byte(token)) {
      run_ += *byte;
      return;
    }
    flush();
    pass(token);
  }

 private:
  void flush() {
    if (run_.empty()) return;
    if (unicode::is_valid_utf8(run_)) {
      pass(run_);
    } else {
      for (size_t i = 0; i < run_.size(); i++) pass(unicode::kReplacementCharacter);
    }
    run_.clear();
  }
  std::string run_;
};

// Takes up to start characters off each token's start and stop off its end.
class Strip final : public DecodeStage {
 public:
  Strip(const DecodeStep& step, DecodeStage* next) : step_(step), next_(*next) {}

  void text(std::string_view fragment) override {
    while (at_start_ && !fragment.empty()) {
      at_start_ = stripped_ < step_.start && fragment.starts_with(step_.content);
      if (!at_start_) break;
      fragment.remove_prefix(step_.content.size());
      stripped_++;
    }
    if (fragment.empty()) return;
    // The character at the end of the fragment is held back: it is stripped if the token ends here.
    size_t end = fragment.size();
    while (step_.stop > 0 && end >= step_.content.size() &&
           fragment.substr(0, end).ends_with(step_.content)) {
      end -= step_.content.size();
    }
    if (end > 0) {
      release(held_);
      next_.text(fragment.substr(0, end));
    }
    held_ += (fragment.size() - end) / step_.content.size();
  }
  void end_token() override {
    release(held_ - std::min(held_, step_.stop));
    held_ = 0;
    at_start_ = true;
    stripped_ = 0;
    next_.end_token();
  }
  void settle() override { next_.settle(); }
  void finish() override { next_.finish(); }

 private:
  void release(size_t count) {
    for (size_t i = 0; i < count; i++) next_.text(step_.content);
    held_ -= count;
  }

  const DecodeStep& step_;
  DecodeStage& next_;
  bool at_start_ = true;
  size_t stripped_ = 0;
  size_t held_ = 0;  // characters at the end of what came so far
};

class Metaspace final : public DecodeStage {
 public:
  Metaspace(const DecodeStep& step, DecodeStage* next) : step_(step), next_(*next) {}

  void text(std::string_view fragment) override {
    for (size_t pos = 0; pos < fragment.size();) {
      const size_t found = std::min(fragment.find(step_.content, pos), fragment.size());
      if (found > pos) next_.text(fragment.substr(pos, found - pos));
      if (found == fragment.size()) return;
      if (!is_first_ || !step_.drops_first) next_.text(" ");
      pos = found + step_.content.size();
    }
  }
  void end_token() override {
    is_first_ = false;
    next_.end_token();
  }
  void settle() override { next_.settle(); }
  void finish() override { next_.finish(); }

 private:
  const DecodeStep& step_;
  DecodeStage& next_;
  bool is_first_ = true;
};

}  // namespace

std::string Decoder::bytes_of(std::string_view token) const {
  MatchScratch scratch;
  std::string bytes(token);
  bool fused = false;  // with its neighbours: it has no ends of its own
  for (const DecodeStep& step : steps_) {
    switch (step.kind) {
      case DecodeStep::Kind::kByteLevel: {
        std::string spelled;
        append_bytes(bytes, &spelled);
        bytes = std::move(spelled);
        fused = true;
        break;
      }
      case DecodeStep::Kind::kReplace:
        bytes = step.pattern.replace(bytes, step.content, &scratch);
        break;
      case DecodeStep::Kind::kByteFallback:
        if (const auto byte = fallback_byte(bytes)) return {*byte};
        break;
      case DecodeStep::Kind::kFuse:
        fused = true;
        break;
      case DecodeStep::Kind::kStrip:
        for (size_t i = 0; !fused && i < step.start && bytes.starts_with(step.content); i++) {
          bytes.erase(0, step.content.size());
        }
        for (size_t i = 0; !fused && i < step.stop && bytes.ends_with(step.content); i++) {
          bytes.erase(bytes.size() - step.content.size());
        }
        break;
      case DecodeStep::Kind::kMetaspace:
        bytes = Pattern::literal(step.content).replace(bytes, " ", &scratch);
        break;
      case DecodeStep::Kind::kSpaces:
        bytes.insert(0, 1, ' ');
        break;
    }
  }
  return bytes;
}

DecodeRun::DecodeRun(const Decoder& decoder)
    : out_(std::make_unique<std::string>()), scratch_(std::make_unique<MatchScratch>()) {
  stages_.push_back(std::make_unique<Sink>(out_.get()));
  for (auto step = decoder.steps_.rbegin(); step != decoder.steps_.rend(); ++step) {
    DecodeStage* next = stages_.back().get();
    switch (step->kind) {
      case DecodeStep::Kind::kByteLevel:
        stages_.push_back(std::make_unique<ByteLevel>(next));
        break;
      case DecodeStep::Kind::kReplace:
        stages_.push_back(std::make_unique<Replace>(*step, scratch_.get(), next));
        break;
      case DecodeStep::Kind::kByteFallback:
        stages_.push_back(std::make_unique<ByteFallback>(next));
        break;
      case DecodeStep::Kind::kFuse:
        stages_.push_back(std::make_unique<Fuse>(next));
        break;
      case DecodeStep::Kind::kStrip:
        stages_.push_back(std::make_unique<Strip>(*step, next));
        break;
      case DecodeStep::Kind::kMetaspace:
        stages_.push_back(std::make_unique<Metaspace>(*step, next));
        break;
      case DecodeStep::Kind::kSpaces:
        stages_.push_back(std::make_unique<Spaces>(next));
        break;
    }
  }
  std::reverse(stages_.begin(), stages_.end());
}

std::string DecodeRun::take() { return std::exchange(*out_, {}); }

}  // namespace mustafar::text
