#include "cli/eval/made_cases.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace mustafar::cli {
namespace {

constexpr const char* kWords[] = {
    "anchor",  "apple",  "arrow",  "basket",  "beacon",   "blanket", "bottle",  "bridge", "bucket",
    "butter",  "button", "candle", "canvas",  "carpet",   "castle",  "cherry",  "circle", "clock",
    "copper",  "corner", "cotton", "crystal", "curtain",  "diamond", "dragon",  "eagle",  "engine",
    "feather", "finger", "flower", "forest",  "garden",   "ginger",  "glass",   "hammer", "harbor",
    "helmet",  "honey",  "island", "jacket",  "kettle",   "ladder",  "lantern", "lemon",  "letter",
    "marble",  "market", "mirror", "monkey",  "mountain", "needle",  "ocean",   "onion",  "orange",
    "paper",   "pencil", "pepper", "piano",   "pillow",   "planet",  "pocket",  "purple", "rabbit",
    "ribbon",  "river",  "rocket", "saddle",  "school",   "shadow",  "silver",  "spider", "spoon",
    "summer",  "table",  "temple", "thunder", "ticket",   "tiger",   "tower",   "tunnel", "turtle",
    "valley",  "velvet", "violin", "wagon",   "walnut",   "window",  "winter"};
constexpr const char* kTowns[] = {
    "Velden",  "Orlan",   "Tarmouth", "Kessel",    "Brenna", "Sorrow Hill", "Almerik",  "Dunwich",
    "Petrova", "Lindale", "Marsk",    "Ostergate", "Quill",  "Ravenna",     "Stanmore", "Ulverton"};
constexpr const char* kFirstNames[] = {"Marta", "Johan",  "Elsa",  "Victor", "Nadia", "Oscar",
                                       "Clara", "Tobias", "Irene", "Samuel", "Lucia", "Henrik"};
constexpr const char* kLastNames[] = {"Ruiz",   "Keller", "Novak",  "Bergman",  "Costa",  "Fischer",
                                      "Larsen", "Moreau", "Petrov", "Sandoval", "Tanaka", "Weaver"};
constexpr const char* kDays[] = {"Monday",   "Tuesday", "Wednesday",
                                 "Thursday", "Friday",  "Saturday"};
constexpr const char* kInnFirst[] = {"Silver", "Golden", "Crooked", "Blue", "Sleeping", "Laughing"};
constexpr const char* kInnLast[] = {"Heron", "Anchor", "Badger", "Lantern", "Fox", "Barrel"};

template <typename List>
void shuffle(List& list, Random& random) {
  for (size_t i = std::size(list); i > 1; i--) std::swap(list[i - 1], list[random() % i]);
}

// `n` different words.
std::vector<std::string> draw_words(size_t n, Random& random) {
  std::vector<std::string> words(std::begin(kWords), std::end(kWords));
  shuffle(words, random);
  words.resize(std::min(n, words.size()));
  return words;
}

// A seed for the case of these numbers, independent of which others are made.
uint64_t seed_of(uint64_t seed, int64_t length, double depth, int64_t attempt, uint64_t kind) {
  uint64_t state = seed;
  for (const uint64_t part : {static_cast<uint64_t>(length), static_cast<uint64_t>(depth * 1000),
                              static_cast<uint64_t>(attempt), kind}) {
    state = (state ^ part) * 0x9e3779b97f4a7c15u;
    state ^= state >> 29;
  }
  return state;
}

struct Fact {
  std::string sentence, question, answer;
};

std::string keeper_name(Random& random) {
  const std::string first = pick(kFirstNames, random);
  return first + " " + pick(kLastNames, random);
}

Fact make_fact(const std::string& town, Random& random) {
  const std::string year = std::to_string(1500 + random() % 450);
  const std::string name = keeper_name(random);
  const std::string day = pick(kDays, random);
  const std::string first = pick(kInnFirst, random);
  const std::string inn = first + " " + pick(kInnLast, random);
  switch (random() % 4) {
    case 0:
      return {"The keeper of the harbour in " + town + " is called " + name + ".",
              "What is the name of the keeper of the harbour in " + town + "?", name};
    case 1:
      return {"The bell of the church in " + town + " was cast in the year " + year + ".",
              "In which year was the bell of the church in " + town + " cast?", year};
    case 2:
      return {"The market in " + town + " is held every " + day + ".",
              "On which day of the week is the market in " + town + " held?", day};
    default:
      return {"The oldest inn in " + town + " is called the " + inn + ".",
              "What is the oldest inn in " + town + " called?", inn};
  }
}

}  // namespace

void CaseMaker::fill(EvalCase& one, int64_t length, const std::string& head,
                     const std::vector<Prose::Insert>& inserts, int64_t reply_tokens,
                     uint64_t seed) const {
  const auto tokens_of = [&](const EvalCase& made) {
    int64_t n = 0;
    for (size_t i = 0; i < made.turns.size(); i++) {
      const EvalTurn& turn = made.turns[i];
      if (i == 0) {
        const auto opening = dialogue_.open(made.document, turn.question, turn.reply_start);
        n += static_cast<int64_t>(opening.document.size() + opening.question.size());
      } else {
        n += static_cast<int64_t>(dialogue_.next(turn.question, turn.reply_start, {}).size());
      }
      n += reply_tokens;
    }
    return n;
  };
  // The sentences' tokens one by one are not quite those of the text: a little less, until it fits.
  one.document = head;
  int64_t room = length - tokens_of(one);
  for (int attempt = 0; attempt < 8 && room > 0; attempt++) {
    Random random(seed);
    const std::string prose = prose_.document(tokenizer_, room, inserts, random);
    one.document = head + "\n\n" + prose;
    const int64_t excess = tokens_of(one) - length;
    if (excess <= 0) return;
    room -= excess + 2;
  }
  throw std::invalid_argument("a length of " + std::to_string(length) +
                              " tokens has no room for the question and what it asks for");
}

std::vector<EvalCase> CaseMaker::needles(int32_t keys, int32_t reply_tokens) const {
  std::vector<EvalCase> cases;
  for (const int64_t length : options_.lengths) {
    for (const double depth : options_.depths) {
      for (int32_t attempt = 0; attempt < options_.tries; attempt++) {
        const uint64_t seed =
            seed_of(options_.seed, length, depth, attempt, static_cast<uint64_t>(keys));
        Random random(seed);
        const std::vector<std::string> words = draw_words(static_cast<size_t>(keys), random);
        std::vector<Prose::Insert> inserts;
        std::vector<std::string> codes;
        for (int32_t key = 0; key < keys; key++) {
          codes.push_back(std::to_string(1000000 + random() % 9000000));
          const double at = key == 0 ? depth / 100 : static_cast<double>(random() % 1000) / 1000;
          inserts.push_back({at, "The secret code for " + words[key] + " is " + codes[key] + "."});
        }
        EvalCase one;
        one.label = std::to_string(length) + "@" + std::to_string(static_cast<int>(depth));
        one.turns = {{"What is the secret code for " + words[0] + " that the text mentions?",
                      "The secret code for " + words[0] + " is",
                      {codes[0]}}};
        fill(one, length,
             "The following text mentions secret codes. Remember them: you will be asked for one.",
             inserts, reply_tokens, seed);
        cases.push_back(std::move(one));
      }
    }
  }
  return cases;
}

std::vector<EvalCase> CaseMaker::copies(int32_t words) const {
  std::vector<EvalCase> cases;
  for (const int64_t length : options_.lengths) {
    for (int32_t attempt = 0; attempt < options_.tries; attempt++) {
      const uint64_t seed = seed_of(options_.seed, length, 0, attempt, 100);
      Random random(seed);
      std::string list;
      for (const std::string& word : draw_words(static_cast<size_t>(words), random)) {
        list += (list.empty() ? "" : " ") + word;
      }
      EvalCase one;
      one.label = std::to_string(length);
      one.turns = {{"Repeat the list of words from the beginning, all words in the same order.",
                    "The list of words is:",
                    {list}}};
      fill(one, length, "The list of words is: " + list + "\n\nThe rest of the text follows.", {},
           static_cast<int64_t>(tokenizer_.encode(" " + list, false).size()), seed);
      cases.push_back(std::move(one));
    }
  }
  return cases;
}

std::vector<EvalCase> CaseMaker::interviews(int32_t facts, int32_t reply_tokens) const {
  std::vector<EvalCase> cases;
  for (const int64_t length : options_.lengths) {
    for (int32_t attempt = 0; attempt < options_.tries; attempt++) {
      const uint64_t seed = seed_of(options_.seed, length, 0, attempt, 200);
      Random random(seed);
      std::vector<std::string> towns(std::begin(kTowns), std::end(kTowns));
      shuffle(towns, random);
      EvalCase one;
      one.label = std::to_string(length);
      std::vector<Prose::Insert> inserts;
      for (int32_t i = 0; i < facts; i++) {
        const Fact fact = make_fact(towns[i], random);
        inserts.push_back({static_cast<double>(random() % 1000) / 1000, fact.sentence});
        one.turns.push_back({fact.question, "", {fact.answer}});
      }
      shuffle(one.turns, random);
      fill(
          one, length,
          "Read the following text. You will be asked questions about it: answer each in one short "
          "sentence.",
          inserts, reply_tokens, seed);
      cases.push_back(std::move(one));
    }
  }
  return cases;
}

}  // namespace mustafar::cli
