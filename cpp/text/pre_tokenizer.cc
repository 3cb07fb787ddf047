#include "text/pre_tokenizer.h"

#include <algorithm>
#include <utility>

#include "text/byte_level.h"
#include "text/unicode/utf8.h"

namespace mustafar::text {

namespace {

// The pattern that ByteLevel splits by unless told otherwise: GPT-2's.
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kWhiteSpace = R"([\p{Z}\t-\r\x{85}])";
// Runs of word characters, runs of what is neither word nor space.
constexpr std::string_view kWords =
    R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}]+)"
    R"(|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}\p{Z}\t-\r\x{85}]+)";
constexpr std::string_view kPunctuation = R"([\p{P}!-\/:-@\[-`{-~])";

}  // namespace

PreTokenizer PreTokenizer::parse(const JsonField& field) {
  PreTokenizer pre_tokenizer;
  if (!field.is_null()) pre_tokenizer.add(field);
  return pre_tokenizer;
}

PreTokenizer::Behavior PreTokenizer::parse_behavior(const JsonField& field) {
  const std::string name = field.string();
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  field.fail("unknown behavior " + unicode::in_quotes(name));
}

void PreTokenizer::add_split(Pattern pattern, Behavior behavior, bool invert) {
  Step step;
  step.pattern = std::move(pattern);
  step.behavior = behavior;
  step.invert = invert;
  steps_.push_back(std::move(step));
}

void PreTokenizer::add(const JsonField& field) {
  const std::string type = field.at("type").string();
  if (type == "Sequence") {
    for (const JsonField& member : field.at("pretokenizers").elements()) add(member);
  } else if (type == "Split") {
    add_split(Pattern::parse(field.at("pattern")), parse_behavior(field.at("behavior")),
              field.boolean_or("invert", false));
  } else if (type == "ByteLevel") {
    Step step;
    step.kind = Kind::kByteLevel;
    step.prepend = field.boolean_or("add_prefix_space", true) ? Prepend::kAlways : Prepend::kNever;
    step.cuts = field.boolean_or("use_regex", true);
    if (step.cuts) step.pattern = Pattern::of(Regex::translated(kGpt2Pattern));
    steps_.push_back(std::move(step));
  } else if (type == "Metaspace") {
    add_metaspace(field);
  } else if (type == "Digits") {
    add_split(Pattern::of(Regex::native(R"(\p{N})")), field.boolean_or("individual_digits", false)
                                                          ? Behavior::kIsolated
                                                          : Behavior::kContiguous);
  } else if (type == "Punctuation") {
    add_split(Pattern::of(Regex::native(kPunctuation)),
              field.has("behavior") ? parse_behavior(field.at("behavior")) : Behavior::kIsolated);
  } else if (type == "Whitespace") {
    add_split(Pattern::of(Regex::native(kWords)), Behavior::kRemoved, true);
  } else if (type == "WhitespaceSplit") {
    add_split(Pattern::of(Regex::native(kWhiteSpace)), Behavior::kRemoved);
  } else {
    field.unsupported_type(type,
                           "ByteLevel, Split, Metaspace, Digits, Punctuation, Whitespace, "
                           "WhitespaceSplit and Sequence");
  }
}

// Two spellings: prepend_scheme and split today, add_prefix_space before.
void PreTokenizer::add_metaspace(const JsonField& field) {
  Step step;
  step.kind = Kind::kMetaspace;
  step.behavior = Behavior::kMergedWithNext;
  step.replacement = field.at("replacement").string();
  size_t end = 0;
  if (!step.replacement.empty()) unicode::next_code_point(step.replacement, &end);
  if (end == 0 || end != step.replacement.size()) {
    field.at("replacement")
        .fail("must be one character, found " + unicode::in_quotes(step.replacement));
  }
  const std::string scheme = field.has("prepend_scheme") ? field.at("prepend_scheme").string() : "";
  if (scheme == "always") {
    step.prepend = Prepend::kAlways;
  } else if (scheme == "first") {
    step.prepend = Prepend::kFirst;
  } else if (scheme == "never") {
    step.prepend = Prepend::kNever;
  } else if (scheme.empty()) {
    step.prepend = field.boolean_or("add_prefix_space", true) ? Prepend::kAlways : Prepend::kNever;
  } else {
    field.at("prepend_scheme").fail("unknown scheme " + unicode::in_quotes(scheme));
  }
  if (!field.boolean_or("add_prefix_space", true) && step.prepend != Prepend::kNever) {
    field.fail("add_prefix_space false contradicts prepend_scheme " + unicode::in_quotes(scheme));
  }
  step.pattern = Pattern::literal(step.replacement);
  step.cuts = field.boolean_or("split", true);
  steps_.push_back(std::move(step));
}

// out->parts, offset by the start of their piece, become spans as the behavior says.
void PreTokenizer::append_split(const Step& step, uint32_t offset, PreTokenized* out) {
  std::vector<Span>& spans = out->next_spans;
  const size_t first = spans.size();
  const auto is_match = [&](const Part& part) { return part.is_match != step.invert; };
  const auto push = [&](const Part& part) {
    spans.push_back({offset + part.begin, offset + part.end});
  };
  bool previous = false;
  switch (step.behavior) {
    case Behavior::kIsolated:
      for (const Part& part : out->parts) push(part);
      break;
    case Behavior::kRemoved:
      for (const Part& part : out->parts) {
        if (!is_match(part)) push(part);
      }
      break;
    case Behavior::kContiguous:
      for (const Part& part : out->parts) {
        if (is_match(part) == previous && spans.size() > first) {
          spans.back().end = offset + part.end;
        } else {
          push(part);
        }
        previous = is_match(part);
      }
      break;
    case Behavior::kMergedWithPrevious:
      for (const Part& part : out->parts) {
        if (is_match(part) && !previous && spans.size() > first) {
          spans.back().end = offset + part.end;
        } else {
          push(part);
        }
        previous = is_match(part);
      }
      break;
    case Behavior::kMergedWithNext:
      for (auto part = out->parts.rbegin(); part != out->parts.rend(); ++part) {
        if (is_match(*part) && !previous && spans.size() > first) {
          spans.back().begin = offset + part->begin;
        } else {
          push(*part);
        }
        previous = is_match(*part);
      }
      std::reverse(spans.begin() + static_cast<std::ptrdiff_t>(first), spans.end());
      break;
  }
}

void PreTokenizer::split(const Step& step, MatchScratch* scratch, PreTokenized* out) {
  out->next_spans.clear();
  for (const Span& span : out->spans) {
    step.pattern.find_parts(out->text.substr(span.begin, span.end - span.begin), scratch,
                            &out->parts);
    append_split(step, span.begin, out);
  }
  std::erase_if(out->next_spans, [](const Span& span) { return span.begin == span.end; });
  if (out->next_spans.empty() || out->spans.empty() ||
      out->next_spans[0].begin != out->spans[0].begin) {
    out->at_start = false;
  }
  out->spans.swap(out->next_spans);
}

// Each piece becomes what piece(bytes, is_first, &storage) appends for it.
template <typename Rewrite>
void PreTokenizer::rewrite(PreTokenized* out, const Rewrite& piece) {
  out->next_storage.clear();
  out->next_storage.reserve(out->text.size() + out->text.size() / 2);
  bool is_first = true;
  for (Span& span : out->spans) {
    const auto begin = static_cast<uint32_t>(out->next_storage.size());
    piece(out->text.substr(span.begin, span.end - span.begin), is_first, &out->next_storage);
    span = {begin, static_cast<uint32_t>(out->next_storage.size())};
    is_first = false;
  }
  out->storage.swap(out->next_storage);
  out->text = out->storage;
}

void PreTokenizer::apply(std::string_view text, bool at_start, MatchScratch* scratch,
                         PreTokenized* out) const {
  out->text = text;
  out->spans.assign(1, {0, static_cast<uint32_t>(text.size())});
  out->at_start = at_start;
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::kSplit:
        split(step, scratch, out);
        break;
      case Kind::kByteLevel:
        if (step.prepend == Prepend::kAlways) {
          rewrite(out, [](std::string_view piece, bool, std::string* to) {
            if (!piece.starts_with(' ')) *to += ' ';
            to->append(piece);
          });
        }
        if (step.cuts) split(step, scratch, out);
        rewrite(out, [](std::string_view piece, bool, std::string* to) {
          append_byte_level(piece, to);
        });
        break;
      case Kind::kMetaspace: {
        const bool first_counts = out->at_start;
        rewrite(out, [&](std::string_view piece, bool is_first, std::string* to) {
          const size_t begin = to->size();
          for (size_t pos = 0; pos < piece.size();) {
            const size_t space = std::min(piece.find(' ', pos), piece.size());
            to->append(piece.substr(pos, space - pos));
            if (space < piece.size()) to->append(step.replacement);
            pos = space + 1;
          }
          const bool prepend = step.prepend == Prepend::kAlways ||
                               (step.prepend == Prepend::kFirst && is_first && first_counts);
          if (prepend && !std::string_view(*to).substr(begin).starts_with(step.replacement)) {
            to->insert(begin, step.replacement);
          }
        });
        if (step.cuts) split(step, scratch, out);
        break;
      }
    }
  }
}

}  // namespace mustafar::text
