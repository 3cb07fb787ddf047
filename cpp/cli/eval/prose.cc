#include "cli/eval/prose.h"

#include <algorithm>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace mustafar::cli {
namespace {

constexpr size_t kLeastSentence = 20;  // bytes: shorter pieces are headings and the like
constexpr size_t kFewestSentences = 20;

std::vector<std::string> sentences_of(const std::string& text) {
  std::vector<std::string> sentences;
  const auto add = [&](const std::string& line, size_t from, size_t to) {
    from = line.find_first_not_of(" \t\r", from);
    if (from >= to) return;
    const size_t last = line.find_last_not_of(" \t\r", to - 1);
    if (last - from + 1 >= kLeastSentence) sentences.push_back(line.substr(from, last - from + 1));
  };
  // Lines of a paragraph belong together, as in texts that are wrapped.
  std::istringstream stream(text);
  std::string paragraph;
  const auto end_paragraph = [&] {
    size_t from = 0;
    for (size_t i = 0; i + 1 < paragraph.size(); i++) {
      const char c = paragraph[i];
      if ((c == '.' || c == '!' || c == '?') && paragraph[i + 1] == ' ') {
        add(paragraph, from, i + 1);
        from = i + 1;
      }
    }
    add(paragraph, from, paragraph.size());
    paragraph.clear();
  };
  for (std::string line; std::getline(stream, line);) {
    const size_t first = line.find_first_not_of(" \t\r");
    if (first == std::string::npos || line[first] == '=' || line[first] == '#') {
      end_paragraph();
    } else {
      paragraph += (paragraph.empty() ? "" : " ") + line.substr(first);
    }
  }
  end_paragraph();
  return sentences;
}

constexpr const char* kWho[] = {"the baker",       "an old sailor",   "the clerk of the court",
                                "a young teacher", "the gardener",    "her uncle",
                                "the night guard", "a tall stranger", "the ferryman",
                                "my neighbour",    "the blacksmith",  "a travelling singer"};
constexpr const char* kDid[] = {"walked slowly along",
                                "waited for an hour beside",
                                "painted a picture of",
                                "talked for a long time about",
                                "swept the leaves from",
                                "looked with great care at",
                                "told the children a story about",
                                "had never before seen",
                                "kept a small garden behind",
                                "wrote two letters about"};
constexpr const char* kWhere[] = {
    "the stone bridge", "the empty market square", "the mill",
    "the narrow river", "the school on the hill",  "the railway station",
    "the orchard",      "the wooden fence",        "the road to the coast",
    "the library"};
constexpr const char* kWhen[] = {"In the early morning",    "Late in the autumn",
                                 "On most evenings",        "While it was raining",
                                 "Before the shops opened", "After a long winter",
                                 "Once the lamps were lit", "When the wind had dropped"};
constexpr const char* kThen[] = {
    "and nobody thought it strange", "and then went home",   "because there was little else to do",
    "although the weather was poor", "until it grew dark",   "and the dogs began to bark",
    "as people there often do",      "without saying a word"};

std::string made_up(Random& random) {
  const std::string when = pick(kWhen, random), who = pick(kWho, random), did = pick(kDid, random);
  const std::string where = pick(kWhere, random), then = pick(kThen, random);
  std::string who_first = who;
  if (who_first[0] >= 'a') who_first[0] = static_cast<char>(who_first[0] - 'a' + 'A');
  switch (random() % 3) {
    case 0:
      return when + ", " + who + " " + did + " " + where + ", " + then + ".";
    case 1:
      return who_first + " " + did + " " + where + " " + then + ".";
    default:
      return when + ", " + who + " " + did + " " + where + ".";
  }
}

}  // namespace

Prose::Prose(const std::string& text) {
  if (text.empty()) return;
  sentences_ = sentences_of(text);
  if (sentences_.size() < kFewestSentences) {
    throw std::invalid_argument("the text has " + std::to_string(sentences_.size()) +
                                " sentences, at least " + std::to_string(kFewestSentences) +
                                " are needed to hide something among them");
  }
}

std::string Prose::document(const Tokenizer& tokenizer, int64_t tokens, std::vector<Insert> inserts,
                            Random& random) const {
  const auto tokens_of = [&](const std::string& sentence) {
    return static_cast<int64_t>(tokenizer.encode(" " + sentence, /*add_special=*/false).size());
  };
  for (const Insert& insert : inserts) tokens -= tokens_of(insert.sentence);
  std::vector<std::string> sentences;
  std::vector<int64_t> starts;  // tokens before each
  int64_t total = 0;
  size_t at = sentences_.empty() ? 0 : random() % sentences_.size();
  for (;;) {
    std::string sentence =
        sentences_.empty() ? made_up(random) : sentences_[at++ % sentences_.size()];
    const int64_t n = tokens_of(sentence);
    if (total + n > tokens) break;
    sentences.push_back(std::move(sentence));
    starts.push_back(total);
    total += n;
  }
  std::stable_sort(inserts.begin(), inserts.end(),
                   [](const Insert& a, const Insert& b) { return a.depth < b.depth; });
  std::string document;
  const auto append = [&](const std::string& sentence) {
    if (!document.empty()) document += ' ';
    document += sentence;
  };
  size_t next = 0;
  for (size_t i = 0; i < sentences.size(); i++) {
    for (; next < inserts.size() &&
           inserts[next].depth * static_cast<double>(total) <= static_cast<double>(starts[i]);
         next++) {
      append(inserts[next].sentence);
    }
    append(sentences[i]);
  }
  for (; next < inserts.size(); next++) append(inserts[next].sentence);
  return document;
}

}  // namespace mustafar::cli
