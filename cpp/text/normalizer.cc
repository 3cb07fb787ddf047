#include "text/normalizer.h"

#include <utility>

#include "text/byte_level.h"
#include "text/unicode/case_mapping.h"
#include "text/unicode/properties.h"
#include "text/unicode/utf8.h"

namespace mustafar::text {

Pattern Pattern::parse(const JsonField& field) {
  Pattern pattern;
  if (field.has("Regex")) {
    const JsonField regex = field.at("Regex");
    try {
      pattern.regex_ = Regex::translated(regex.string());
    } catch (const TokenizerError& error) {
      regex.fail(error.what());
    }
  } else {
    pattern.literal_ = field.at("String").string();
    if (pattern.literal_.empty()) field.fail("an empty pattern matches everywhere");
  }
  return pattern;
}

Pattern Pattern::of(Regex regex) {
  Pattern pattern;
  pattern.regex_ = std::move(regex);
  return pattern;
}

Pattern Pattern::literal(std::string text) {
  Pattern pattern;
  pattern.literal_ = std::move(text);
  return pattern;
}

void Pattern::find_parts(std::string_view text, MatchScratch* scratch,
                         std::vector<Part>* parts) const {
  if (regex_) return regex_->find_parts(text, scratch, parts);
  parts->clear();
  size_t covered = 0;
  for (;;) {
    const size_t found = text.find(literal_, covered);
    const size_t begin = std::min(found, text.size());
    if (begin != covered) {
      parts->push_back({static_cast<uint32_t>(covered), static_cast<uint32_t>(begin), false});
    }
    if (found == std::string_view::npos) return;
    covered = found + literal_.size();
    parts->push_back({static_cast<uint32_t>(found), static_cast<uint32_t>(covered), true});
  }
}

std::string Pattern::replace(std::string_view text, std::string_view content,
                             MatchScratch* scratch) const {
  std::vector<Part> parts;
  find_parts(text, scratch, &parts);
  if (text.size() + parts.size() * content.size() > kMaxTextBytes) {
    throw TokenizerError("a normalizer makes the text longer than " +
                         std::to_string(kMaxTextBytes) + " bytes");
  }
  std::string out;
  out.reserve(text.size() + parts.size() / 2 * content.size());
  for (const Part& part : parts) {
    out.append(part.is_match ? content : text.substr(part.begin, part.end - part.begin));
  }
  return out;
}

Normalizer Normalizer::parse(const JsonField& field) {
  Normalizer normalizer;
  if (!field.is_null()) normalizer.add(field);
  return normalizer;
}

void Normalizer::add(const JsonField& field) {
  const std::string type = field.at("type").string();
  Step step{};
  if (type == "Sequence") {
    for (const JsonField& member : field.at("normalizers").elements()) add(member);
    return;
  }
  if (type == "Prepend") {
    step.kind = Kind::kPrepend;
    step.content = field.at("prepend").string();
  } else if (type == "Replace") {
    step.kind = Kind::kReplace;
    step.pattern = Pattern::parse(field.at("pattern"));
    step.content = field.at("content").string();
  } else if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
    step.kind = Kind::kForm;
    step.form = type == "NFC"    ? unicode::NormalForm::kNfc
                : type == "NFD"  ? unicode::NormalForm::kNfd
                : type == "NFKC" ? unicode::NormalForm::kNfkc
                                 : unicode::NormalForm::kNfkd;
  } else if (type == "Lowercase") {
    step.kind = Kind::kLowercase;
  } else if (type == "Strip") {
    step.kind = Kind::kStrip;
    step.strip_left = field.at("strip_left").boolean();
    step.strip_right = field.at("strip_right").boolean();
  } else if (type == "ByteLevel") {
    step.kind = Kind::kByteLevel;
  } else {
    field.unsupported_type(type,
                           "NFC, NFD, NFKC, NFKD, Lowercase, Strip, Prepend, Replace, "
                           "ByteLevel and Sequence");
  }
  steps_.push_back(std::move(step));
}

namespace {

std::string_view strip(std::string_view text, bool left, bool right) {
  while (left && !text.empty()) {
    size_t pos = 0;
    if (!unicode::is_white_space(unicode::next_code_point(text, &pos))) break;
    text.remove_prefix(pos);
  }
  while (right && !text.empty()) {
    const size_t start = unicode::previous_boundary(text, text.size());
    size_t pos = start;
    if (!unicode::is_white_space(unicode::next_code_point(text, &pos))) break;
    text = text.substr(0, start);
  }
  return text;
}

}  // namespace

std::string Normalizer::apply(std::string_view text, MatchScratch* scratch) const {
  std::string current(text);
  for (const Step& step : steps_) {
    if (current.empty()) return current;
    switch (step.kind) {
      case Kind::kPrepend:
        current.insert(0, step.content);
        break;
      case Kind::kReplace:
        current = step.pattern.replace(current, step.content, scratch);
        break;
      case Kind::kForm:
        current = unicode::normalize(current, step.form);
        break;
      case Kind::kLowercase:
        current = unicode::lower_case(current);
        break;
      case Kind::kStrip:
        current = std::string(strip(current, step.strip_left, step.strip_right));
        break;
      case Kind::kByteLevel: {
        std::string mapped;
        append_byte_level(current, &mapped);
        current = std::move(mapped);
        break;
      }
    }
  }
  return current;
}

}  // namespace mustafar::text
