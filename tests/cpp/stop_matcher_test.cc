#include "runtime/stop_matcher.h"

#include <gtest/gtest.h>

#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace mustafar {
namespace {

using Strings = std::vector<std::string>;

struct Outcome {
  Strings pieces;
  std::string text;
  bool matched = false;
  int64_t kept_tokens = 0;
  std::string remainder;
};

Outcome run(const Strings& stops, const Strings& tokens) {
  StopMatcher matcher(stops);
  Outcome out;
  for (const std::string& token : tokens) {
    out.pieces.push_back(matcher.push(token));
    out.text += out.pieces.back();
    if (matcher.matched()) break;
  }
  out.text += matcher.flush();
  out.matched = matcher.matched();
  out.kept_tokens = matcher.kept_tokens();
  out.remainder = matcher.remainder();
  return out;
}

TEST(StopMatcherTest, WithoutStopsEverythingIsCertainAtOnce) {
  const Outcome out = run({}, {"a", "", "bc"});
  EXPECT_EQ(out.pieces, (Strings{"a", "", "bc"}));
  EXPECT_FALSE(out.matched);
  EXPECT_EQ(out.kept_tokens, 3);
}

TEST(StopMatcherTest, FindsAStopAcrossTokensAndHoldsItsBeginningBack) {
  const Outcome out = run({"\n\nQ:"}, {"yes", ".\n", "\n", "Q", ": more"});
  EXPECT_EQ(out.pieces, (Strings{"yes", ".", "", "", ""}));
  EXPECT_TRUE(out.matched);
  EXPECT_EQ(out.text, "yes.");
  EXPECT_EQ(out.kept_tokens, 1);  // ".\n" runs into the stop text
  EXPECT_EQ(out.remainder, ".");
}

TEST(StopMatcherTest, TokenBoundaryAtTheCutLeavesNoRemainder) {
  const Outcome out = run({"###"}, {"one", " two", "#", "##"});
  EXPECT_EQ(out.text, "one two");
  EXPECT_EQ(out.kept_tokens, 2);
  EXPECT_EQ(out.remainder, "");
}

TEST(StopMatcherTest, StopInsideOneToken) {
  const Outcome out = run({"END"}, {"a", "bENDc"});
  EXPECT_EQ(out.text, "ab");
  EXPECT_EQ(out.kept_tokens, 1);
  EXPECT_EQ(out.remainder, "b");
}

TEST(StopMatcherTest, StopAtTheVeryBeginning) {
  const Outcome out = run({"ab"}, {"a", "b"});
  EXPECT_EQ(out.text, "");
  EXPECT_EQ(out.kept_tokens, 0);
  EXPECT_TRUE(out.matched);
}

TEST(StopMatcherTest, HeldTextIsReleasedWhenItTurnsOutOtherwise) {
  const Outcome out = run({"aab"}, {"a", "a", "a", "c"});
  EXPECT_EQ(out.pieces, (Strings{"", "", "a", "aac"}));
  EXPECT_FALSE(out.matched);
  EXPECT_EQ(out.kept_tokens, 4);
}

TEST(StopMatcherTest, HeldTextIsFlushedAtTheEnd) {
  const Outcome out = run({"<end>"}, {"x<e", "nd"});
  EXPECT_EQ(out.pieces, (Strings{"x", ""}));
  EXPECT_EQ(out.text, "x<end");
  EXPECT_EQ(out.kept_tokens, 2);
}

TEST(StopMatcherTest, TheFirstCompleteStopWinsAndOfThoseTheLongest) {
  EXPECT_EQ(run({"abcd", "bc"}, {"xabcd"}).text, "xa");
  EXPECT_EQ(run({"c", "bc"}, {"xabcd"}).text, "xa");
  EXPECT_EQ(run({"bc", "c"}, {"xab", "c"}).text, "xa");
}

TEST(StopMatcherTest, TokensWithoutTextBelongToWhatFollows) {
  // Two tokens hold the first bytes of a character that the third completes.
  const Outcome cut = run({"\xf0\x9f\x98\x80"}, {"hi", "", "", "\xf0\x9f\x98\x80"});
  EXPECT_EQ(cut.text, "hi");
  EXPECT_EQ(cut.kept_tokens, 1);
  const Outcome kept = run({"!"}, {"hi", "", "\xc3\xa9", "!"});
  EXPECT_EQ(kept.text, "hi\xc3\xa9");
  EXPECT_EQ(kept.kept_tokens, 3);
}

TEST(StopMatcherTest, TextWithoutATokenCountsNone) {
  StopMatcher matcher({"stop"});
  EXPECT_EQ(matcher.push("ab st"), "ab ");
  EXPECT_EQ(matcher.push("\xef\xbf\xbd", false), "st\xef\xbf\xbd");
  EXPECT_EQ(matcher.kept_tokens(), 1);
}

TEST(StopMatcherTest, AfterAMatchNothingMoreComes) {
  StopMatcher matcher({"x"});
  EXPECT_EQ(matcher.push("ax"), "a");
  EXPECT_EQ(matcher.push("b"), "");
  EXPECT_EQ(matcher.flush(), "");
  EXPECT_EQ(matcher.kept_tokens(), 0);
  EXPECT_EQ(matcher.remainder(), "a");
}

TEST(StopMatcherTest, RefusesAnEmptyStop) {
  EXPECT_THROW(StopMatcher({"a", ""}), std::invalid_argument);
}

// Against a search of the whole text, over random texts of two letters cut at random.
TEST(StopMatcherTest, AgreesWithASearchOfTheWholeText) {
  std::mt19937 random(7);
  int n_matched = 0;
  for (int round = 0; round < 5000; round++) {
    const auto word = [&](int most) {
      std::string text;
      for (int n = 1 + static_cast<int>(random() % most); n > 0; n--) text += "ab"[random() % 2];
      return text;
    };
    Strings stops;
    for (int n = static_cast<int>(random() % 3); n >= 0; n--) stops.push_back(word(6));
    Strings tokens;
    std::string whole;
    for (int n = static_cast<int>(random() % 12); n >= 0; n--) {
      tokens.push_back(random() % 8 == 0 ? "" : word(3));
      whole += tokens.back();
    }

    size_t cut = whole.size();
    bool found = false;
    for (size_t end = 1; end <= whole.size() && !found; end++) {
      for (const std::string& stop : stops) {
        if (end >= stop.size() && whole.compare(end - stop.size(), stop.size(), stop) == 0) {
          cut = std::min(cut, end - stop.size());
          found = true;
        }
      }
    }
    const Outcome out = run(stops, tokens);
    ASSERT_EQ(out.matched, found) << whole;
    ASSERT_EQ(out.text, whole.substr(0, cut)) << whole;
    if (!found) continue;
    n_matched++;
    std::string kept;
    for (int64_t i = 0; i < out.kept_tokens; i++) kept += tokens[i];
    ASSERT_EQ(kept + out.remainder, out.text);
    // One token more would reach into the stop text.
    ASSERT_LT(out.kept_tokens, static_cast<int64_t>(tokens.size()));
    size_t next = out.kept_tokens;
    while (next + 1 < tokens.size() && tokens[next].empty()) next++;
    ASSERT_GT(kept.size() + tokens[next].size(), cut);
  }
  EXPECT_GT(n_matched, 1000);
}

// Texts in brackets are hidden; the first stop text counts them, the second does not.
Outcome run_hidden(const Strings& stops, const Strings& tokens) {
  StopMatcher matcher(stops, {true, false});
  Outcome out;
  for (const std::string& token : tokens) {
    const bool is_hidden = token.starts_with('[');
    std::string piece = matcher.push(is_hidden ? "" : token);
    if (is_hidden) piece += matcher.push_hidden(token);
    out.pieces.push_back(piece);
    out.text += piece;
    if (matcher.matched()) break;
  }
  out.text += matcher.flush();
  out.matched = matcher.matched();
  out.kept_tokens = matcher.kept_tokens();
  out.remainder = matcher.remainder();
  return out;
}

TEST(StopMatcherTest, HiddenTextCountsForTheStopTextsThatSeeIt) {
  EXPECT_TRUE(StopMatcher({"a", "b"}, {true, false}).sees_hidden());
  EXPECT_FALSE(StopMatcher({"a", "b"}).sees_hidden());

  Outcome out = run_hidden({"[end]", "zz"}, {"ab", "[end]", "cd"});
  EXPECT_TRUE(out.matched);
  EXPECT_EQ(out.text, "ab");
  EXPECT_EQ(out.kept_tokens, 1);

  out = run_hidden({"b[end]c", "zz"}, {"a", "b", "[end]", "cd"});
  EXPECT_EQ(out.pieces, (Strings{"a", "", "", ""}));
  EXPECT_TRUE(out.matched);
  EXPECT_EQ(out.kept_tokens, 1);

  out = run_hidden({"b[end]c", "zz"}, {"ab", "[end]", "xy", "[end]"});  // begins, but is none
  EXPECT_EQ(out.pieces, (Strings{"a", "", "bxy", ""}));
  EXPECT_FALSE(out.matched);
  EXPECT_EQ(out.kept_tokens, 4);

  out = run_hidden({"b[end]c", "zz"}, {"ab", "[other]", "c"});
  EXPECT_EQ(out.pieces, (Strings{"a", "b", "c"}));

  out = run_hidden({"x[end]", "bc"}, {"a", "b", "[end]", "cd"});  // the output must not have "bc"
  EXPECT_TRUE(out.matched);
  EXPECT_EQ(out.text, "a");
  EXPECT_EQ(out.kept_tokens, 1);

  out = run_hidden({"[end]c", "bc"}, {"ab", "[end]", "c"});  // of two at once the longer output
  EXPECT_EQ(out.text, "a");
  EXPECT_EQ(out.remainder, "a");
  EXPECT_EQ(out.kept_tokens, 0);
}

}  // namespace
}  // namespace mustafar
