// The tokenizer against published vectors, broken files, hostile texts and its own stream.
#include "mustafar/tokenizer.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "mustafar/error.h"
#include "text/bpe.h"
#include "text/regex.h"
#include "text/tokenizer_json.h"
#include "text/unicode/case_mapping.h"
#include "text/unicode/normalize.h"
#include "text/unicode/utf8.h"

namespace mustafar {
namespace {

using nlohmann::json;
using Ids = std::vector<int32_t>;
namespace fs = std::filesystem;

const fs::path kShared = fs::path(MUSTAFAR_SOURCE_DIR) / ".." / "shared" / "data";

std::string read_file(const fs::path& path) {
  std::ostringstream out;
  out << std::ifstream(path, std::ios::binary).rdbuf();
  return out.str();
}

// A folder that goes away with the test.
class TokenizerTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "mustafar-tokenizer-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }

  fs::path write(const std::string& text) const {
    std::ofstream(folder_ / "tokenizer.json", std::ios::binary) << text;
    return folder_ / "tokenizer.json";
  }
  Tokenizer load(const json& j) const { return Tokenizer::load(write(j.dump())); }

  // Loading must fail with a TokenizerError that names the file and says all of what.
  void expect_refused(const std::string& text, const std::vector<std::string>& what) const {
    const fs::path path = write(text);
    try {
      Tokenizer::load(path);
      ADD_FAILURE() << "accepted: " << text.substr(0, 300);
    } catch (const TokenizerError& error) {
      EXPECT_NE(std::string(error.what()).find(path.string()), std::string::npos) << error.what();
      for (const std::string& part : what) {
        EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
            << "'" << part << "' is not in: " << error.what();
      }
    }
  }
  void expect_json_refused(const json& j, const std::vector<std::string>& what) const {
    expect_refused(j.dump(), what);
  }

  fs::path folder_;
};

// All that a stream makes of ids.
std::string stream_text(Tokenizer::Stream* stream, std::span<const int32_t> ids) {
  std::string text;
  for (const int32_t id : ids) text += stream->push(id);
  text += stream->flush();
  return text;
}

// Byte-level, with a few words and two added tokens, one of them special.
json small_byte_level() {
  json j = json::parse(R"({
    "added_tokens": [], "normalizer": null, "post_processor": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "unk_token": null, "vocab": {}, "merges": []}})");
  int32_t id = 0;
  json& vocab = j["model"]["vocab"];
  for (int byte = 33; byte < 127; byte++) vocab[std::string(1, static_cast<char>(byte))] = id++;
  for (const char* symbol : {"Ġ", "Ċ", "Ã", "©", "ð", "Ł", "ĺ", "Ģ"}) vocab[symbol] = id++;
  for (const char* merge : {"t h", "th e", "Ġ the", "a a", "aa aa", "aaaa aaaa"}) {
    j["model"]["merges"].push_back(merge);
    std::string joined = merge;
    joined.erase(joined.find(' '), 1);
    vocab[joined] = id++;
  }
  j["added_tokens"].push_back(
      {{"id", id}, {"content", "<|end|>"}, {"special", true}, {"normalized", false}});
  j["added_tokens"].push_back(
      {{"id", id + 1}, {"content", "<tool>"}, {"special", false}, {"normalized", false}});
  return j;
}

// As Llama-2: a word is the whole text, bytes that have no token fall back to <0xNN>.
json small_sentencepiece() {
  json j = json::parse(R"({
    "added_tokens": [
      {"id": 0, "content": "<unk>", "special": true, "normalized": false},
      {"id": 1, "content": "<s>", "special": true, "normalized": false},
      {"id": 2, "content": "</s>", "special": true, "normalized": false}],
    "normalizer": {"type": "Sequence", "normalizers": [
      {"type": "Prepend", "prepend": "▁"},
      {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "pre_tokenizer": null,
    "post_processor": {"type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
      "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
    "decoder": {"type": "Sequence", "decoders": [
      {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
      {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
      "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2},
      "merges": [["▁", "t"], ["h", "e"], ["▁t", "he"], ["a", "a"], ["aa", "aa"]]}})");
  json& vocab = j["model"]["vocab"];
  int32_t id = 3;
  for (int byte = 0; byte < 256; byte++) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", byte);
    vocab[name] = id++;
  }
  for (const char* token :
       {"▁", "t", "h", "e", "a", "<", "/", "s", ">", "▁t", "he", "▁the", "aa", "aaaa"}) {
    vocab[token] = id++;
  }
  return j;
}

// Texts and the ids that llama.cpp publishes for them.
class VectorTest : public testing::TestWithParam<const char*> {};

TEST_P(VectorTest, MatchesPublishedIds) {
  const fs::path folder = kShared / "tokenizers" / GetParam();
  if (!fs::exists(folder / "tokenizer.json")) GTEST_SKIP() << "no data at " << folder;
  const Tokenizer tokenizer = Tokenizer::load(folder);
  const std::string separator = "\n__ggml_vocab_test__\n";
  const std::string input = read_file(folder / "vectors.inp");
  std::istringstream expected(read_file(folder / "vectors.out"));
  int count = 0;
  for (size_t pos = 0; pos < input.size();) {
    const size_t end = std::min(input.find(separator, pos), input.size());
    const std::string text = input.substr(pos, end - pos);
    pos = end + separator.size();
    std::string line;
    if (!std::getline(expected, line)) break;
    std::istringstream numbers(line);
    const Ids ids{std::istream_iterator<int32_t>(numbers), {}};
    EXPECT_EQ(tokenizer.encode(text, false), ids) << "text: '" << text << "'";
    EXPECT_EQ(tokenizer.decode(ids), text);
    count++;
  }
  EXPECT_GE(count, 40);
}

INSTANTIATE_TEST_SUITE_P(Published, VectorTest, testing::Values("llama-2", "llama-3"),
                         [](const auto& info) {
                           return std::string(info.param) == "llama-2" ? "Llama2" : "Llama3";
                         });

TEST_F(TokenizerTest, EncodesAndDecodesByteLevel) {
  const Tokenizer t = load(small_byte_level());
  const auto id = [&](const char* token) { return t.token_to_id(token).value(); };
  EXPECT_EQ(t.encode("the the"), (Ids{id("the"), id("Ġthe")}));
  EXPECT_EQ(t.encode("é"), (Ids{id("Ã"), id("©")}));
  EXPECT_EQ(t.decode(t.encode("the é\n")), "the é\n");
  EXPECT_EQ(t.encode(""), Ids{});
  EXPECT_EQ(t.decode({}), "");
  EXPECT_EQ(t.vocab_size(), id("<tool>") + 1);
  EXPECT_EQ(t.id_to_token(id("Ġthe")), "Ġthe");
  EXPECT_FALSE(t.token_to_id("absent").has_value());
}

TEST_F(TokenizerTest, SpecialTokensInTextAreTextUnlessAsked) {
  const Tokenizer t = load(small_byte_level());
  const int32_t end = t.token_to_id("<|end|>").value();
  const int32_t tool = t.token_to_id("<tool>").value();
  const std::string text = "the<|end|><tool>";
  const Ids plain = t.encode(text);
  EXPECT_EQ(std::count(plain.begin(), plain.end(), end), 0);
  EXPECT_EQ(plain.back(), tool);  // not special: counts always
  EXPECT_EQ(t.decode(plain, true), text);
  const Ids parsed = t.encode(text, true, true);
  EXPECT_EQ(parsed, (Ids{t.token_to_id("the").value(), end, tool}));
  EXPECT_EQ(t.decode(parsed, false), text);
  EXPECT_EQ(t.decode(parsed, true), "the<tool>");
  EXPECT_TRUE(t.is_special(end));
  EXPECT_FALSE(t.is_special(tool));
  EXPECT_FALSE(t.is_special(-1));
}

TEST_F(TokenizerTest, SentencePieceStyle) {
  const Tokenizer t = load(small_sentencepiece());
  const auto id = [&](const char* token) { return t.token_to_id(token).value(); };
  EXPECT_EQ(t.special_prefix(), Ids{1});
  EXPECT_EQ(t.encode("the the"), (Ids{1, id("▁the"), id("▁the")}));
  EXPECT_EQ(t.encode("é", false), (Ids{id("▁"), id("<0xC3>"), id("<0xA9>")}));
  EXPECT_EQ(t.decode(t.encode("the é 🦙", false)), "the é 🦙");
  // The prefix space goes, others stay.
  EXPECT_EQ(t.decode(t.encode("  the ", false)), "  the ");
  // Spelled in the text it is no BOS, and there is never a second one.
  EXPECT_EQ(t.encode("<s>").front(), 1);
  const Ids spelled = t.encode("<s>", false);
  EXPECT_EQ(std::count(spelled.begin(), spelled.end(), 1), 0);
  EXPECT_EQ(t.encode("<s>", false, true), Ids{1});
}

TEST_F(TokenizerTest, UnknownCharactersFuse) {
  json j = small_sentencepiece();
  j["model"]["byte_fallback"] = false;
  EXPECT_EQ(load(j).encode("aéèêa", false).size(), 4u);
  j["model"]["fuse_unk"] = false;
  EXPECT_EQ(load(j).encode("aéèêa", false).size(), 6u);
}

TEST_F(TokenizerTest, InvalidUtf8IsReplacedAndNulIsText) {
  json j = small_sentencepiece();
  const Tokenizer t = load(j);
  const std::vector<std::pair<std::string, std::string>> cases{
      {"a\xFF", "a\uFFFD"},
      {"\xC3", "\uFFFD"},
      {"\xE4\xBD", "\uFFFD"},                  // one maximal part
      {"\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD"},  // a surrogate
      {"\xC0\x80", "\uFFFD\uFFFD"},            // overlong
      {"\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"},
      {"\x80\x80t", "\uFFFD\uFFFDt"}};
  for (const auto& [text, expected] : cases) {
    EXPECT_EQ(t.encode(text), t.encode(expected));
    EXPECT_EQ(t.decode(t.encode(text, false)), expected);
  }
  const std::string nul("a\0b", 3);
  EXPECT_EQ(t.decode(t.encode(nul, false)), nul);
}

TEST_F(TokenizerTest, IdsThatAreNoTokenHaveNoText) {
  const Tokenizer t = load(small_byte_level());
  const Ids the = t.encode("the"), e_acute = t.encode("é");
  ASSERT_EQ(e_acute.size(), 2u);
  for (const int32_t id : {t.vocab_size(), INT32_MAX}) {
    for (const bool skip : {false, true}) {
      EXPECT_EQ(t.decode(Ids{id, id}, skip), "");
      EXPECT_EQ(t.decode(Ids{the[0], id, the[0]}, skip), "thethe");
      EXPECT_EQ(t.decode(Ids{e_acute[0], id, e_acute[1]}, skip), "é");
      Tokenizer::Stream stream(t, skip);
      EXPECT_EQ(stream.push(id), "");
      EXPECT_EQ(stream_text(&stream, Ids{e_acute[0], id, e_acute[1]}), "é");
    }
    EXPECT_FALSE(t.is_special(id));
  }
}

TEST_F(TokenizerTest, NegativeIdsAndSpellingsOfNoTokenAreErrors) {
  const Tokenizer t = load(small_byte_level());
  Tokenizer::Stream stream(t);
  for (const int32_t id : {-1, INT32_MIN}) {
    EXPECT_THROW(t.decode(Ids{id}), TokenizerError);
    EXPECT_THROW(stream.push(id), TokenizerError);
  }
  for (const int32_t id : {-1, t.vocab_size(), INT32_MAX, INT32_MIN}) {
    EXPECT_THROW(t.id_to_token(id), TokenizerError);
  }
  try {
    t.id_to_token(100000);
    FAIL();
  } catch (const TokenizerError& error) {
    EXPECT_NE(std::string(error.what()).find("100000"), std::string::npos);
  }
}

TEST_F(TokenizerTest, StreamEqualsDecode) {
  std::mt19937 random(1);
  for (const json& j : {small_byte_level(), small_sentencepiece()}) {
    const Tokenizer t = load(j);
    for (int round = 0; round < 300; round++) {
      Ids ids(random() % 12);
      for (int32_t& id : ids) id = static_cast<int32_t>(random() % t.vocab_size());
      for (const bool skip : {false, true}) {
        Tokenizer::Stream stream(t, skip);
        std::string text;
        for (const int32_t id : ids) {
          const std::string piece = stream.push(id);
          EXPECT_EQ(unicode::replace_invalid_utf8(piece), piece);
          text += piece;
        }
        text += stream.flush();
        EXPECT_EQ(text, t.decode(ids, skip));
      }
    }
  }
}

TEST_F(TokenizerTest, StreamHoldsBackHalfCharacters) {
  const Tokenizer t = load(small_byte_level());
  const Ids ids = t.encode("a😀");  // whose bytes are four tokens
  ASSERT_EQ(ids.size(), 5u);
  Tokenizer::Stream stream(t);
  EXPECT_EQ(stream.push(ids[0]), "a");
  for (int i = 1; i < 4; i++) EXPECT_EQ(stream.push(ids[i]), "");
  EXPECT_EQ(stream.push(ids[4]), "😀");
  EXPECT_EQ(stream.push(ids[1]), "");
  EXPECT_EQ(stream.flush(), "\uFFFD");
  EXPECT_EQ(stream.push(ids[0]), "a");  // as new
}

TEST_F(TokenizerTest, StreamContinuesTheTokensBefore) {
  std::mt19937 random(2);
  for (const json& j : {small_byte_level(), small_sentencepiece()}) {
    const Tokenizer t = load(j);
    for (const char* text : {"the the", " the  the ", "é😀the é", "aaaa the 😀😀😀😀😀😀"}) {
      const Ids ids = t.encode(text, false);
      for (size_t cut = 0; cut <= ids.size(); cut++) {
        const std::span<const int32_t> all(ids);
        Tokenizer::Stream stream(t, true, all.first(cut));
        const std::string rest = stream_text(&stream, all.subspan(cut));
        // A character that the cut divides, by up to three bytes, comes whole.
        bool fits = false;
        for (size_t n = 0; n <= std::min<size_t>(cut, 3); n++) {
          fits = fits || t.decode(all.first(cut - n)) + rest == t.decode(ids);
        }
        EXPECT_TRUE(fits) << text << ", cut at " << cut << ": " << rest;
        EXPECT_EQ(stream_text(&stream, all.first(1)), t.decode(all.first(1)));  // as new
      }
    }
  }
}

TEST_F(TokenizerTest, StreamLeavesOutWhatTheTextBeforeHasAlready) {
  for (const json& j : {small_byte_level(), small_sentencepiece()}) {
    const Tokenizer t = load(j);
    const Ids face = t.encode("a😀", false), a = t.encode("aa", false);
    ASSERT_GE(face.size(), 5u);
    const Ids half(face.begin(), face.end() - 2);
    ASSERT_TRUE(t.decode(half).ends_with("\uFFFD"));
    EXPECT_EQ(Tokenizer::Stream(t, true, half).flush(), "");
    Tokenizer::Stream other(t, true, half);
    EXPECT_EQ(stream_text(&other, Ids{a.back()}), t.decode(Ids{a.back()}));
    Tokenizer::Stream settled(t, true, face);
    EXPECT_EQ(settled.settle(), "");
    EXPECT_EQ(settled.push(a.back()), t.decode(Ids{a.back()}));
  }
}

TEST_F(TokenizerTest, SpecialTokensBeforeDoNotHideTheTextBeforeThem) {
  const Tokenizer t = load(small_sentencepiece());
  Ids before = t.encode("the", false);
  before.insert(before.end(), 40, 2);  // </s>
  const int32_t the = t.encode("the", false)[0];
  EXPECT_EQ(Tokenizer::Stream(t, true, before).push(the), " the");
  EXPECT_EQ(Tokenizer::Stream(t, true, Ids(40, 2)).push(the), "the");  // nothing has begun
  EXPECT_EQ(Tokenizer::Stream(t, false, Ids(40, 2)).push(the), " the");
}

TEST_F(TokenizerTest, SettledBytesAreWholeCharacters) {
  const Tokenizer t = load(small_sentencepiece());
  const auto id = [&](const char* token) { return t.token_to_id(token).value(); };
  Tokenizer::Stream stream(t);
  for (const char* byte : {"<0xC3>", "<0xA9>", "<0xC3>"}) EXPECT_EQ(stream.push(id(byte)), "");
  EXPECT_EQ(stream.settle(), "é");
  EXPECT_EQ(stream.push(id("<0xA9>")), "");
  EXPECT_EQ(stream.flush(), "é");
}

TEST_F(TokenizerTest, ByteFallbackRunsAreWholeOrReplaced) {
  const Tokenizer t = load(small_sentencepiece());
  const auto id = [&](const char* token) { return t.token_to_id(token).value(); };
  EXPECT_EQ(t.decode(Ids{id("<0xC3>"), id("<0xA9>")}), "é");
  EXPECT_EQ(t.decode(Ids{id("<0xC3>"), id("<0xA9>"), id("<0xC3>"), id("a")}),
            "\uFFFD\uFFFD\uFFFDa");
}

TEST_F(TokenizerTest, AddedTokenFlags) {
  json j = small_byte_level();
  const auto add = [&](int32_t id, const char* content, const char* flag) {
    json token{{"id", id}, {"content", content}, {"special", false}, {"normalized", false}};
    token[flag] = true;
    j["added_tokens"].push_back(token);
  };
  const int32_t first = 150;
  add(first, "<L>", "lstrip");
  add(first + 1, "<R>", "rstrip");
  add(first + 2, "word", "single_word");
  add(first + 3, "word!", "special");
  const Tokenizer t = load(j);
  const auto id = [&](const char* token) { return t.token_to_id(token).value(); };
  EXPECT_EQ(t.encode("a  <L>"), (Ids{id("a"), first}));
  EXPECT_EQ(t.encode("<R> \n a"), (Ids{first + 1, id("a")}));
  EXPECT_EQ(t.encode("(word)"), (Ids{id("("), first + 2, id(")")}));
  EXPECT_EQ(t.encode("aword"), (Ids{id("a"), id("w"), id("o"), id("r"), id("d")}));
  EXPECT_EQ(t.encode("word!", true, true), (Ids{first + 3}));  // the longest
}

// Work may grow with n log n at most, never with n^2.
TEST_F(TokenizerTest, MergingOneLongWordIsLinear) {
  for (json j : {small_byte_level(), small_sentencepiece()}) {
    const text::TokenizerJson parsed = text::parse_tokenizer_json(j.dump(), "test");
    text::Vocab vocab = text::build_vocab(parsed, -1, 0);
    text::MergeTable merges = text::build_merges(parsed, vocab);
    const text::BpeModel model(std::move(vocab), std::move(merges.map), merges.pairs, {});
    const auto work = [&](size_t n) {
      text::BpeScratch scratch(n);
      Ids ids;
      model.encode(std::string(n, 'a'), &scratch, &ids);
      EXPECT_LE(ids.size(), n / 4 + 4);
      return scratch.work;
    };
    EXPECT_LT(work(1 << 18), 16u << 18);
    EXPECT_LT(work(1 << 18), work(1 << 14) * 20);
  }
}

TEST_F(TokenizerTest, LongTextsRoundTrip) {
  for (const json& j : {small_byte_level(), small_sentencepiece()}) {
    const Tokenizer t = load(j);
    for (const char* unit : {"a", " ", "\n", "the ", "the\n\n", "aé", "ab\n"}) {
      std::string text;
      while (text.size() < 100000) text += unit;
      EXPECT_EQ(t.decode(t.encode(text, false), true), text) << unit;
    }
  }
}

// A long word is cut where no merge reaches across: the result must not show it.
TEST_F(TokenizerTest, SegmentsOfLongWordsDoNotShow) {
  std::mt19937 random(2);
  json j = small_sentencepiece();
  const Tokenizer t = load(j);
  // The same merges with one of the unknown token, which forbids segments.
  j["model"]["vocab"]["<unk>a"] = 1000;
  j["model"]["merges"].push_back({"<unk>", "a"});
  const Tokenizer whole = load(j);
  for (int round = 0; round < 200; round++) {
    std::string text;
    for (int i = 0; i < 80; i++) {
      static const char* const kUnits[] = {"a", "t", "h", "e", " ", "the", "é", "aa"};
      text += kUnits[random() % 8];
    }
    EXPECT_EQ(t.encode(text), whole.encode(text)) << text;
  }
}

TEST_F(TokenizerTest, ConcurrentUse) {
  const Tokenizer t = load(small_byte_level());
  std::string text;
  for (int i = 0; i < 500; i++) text += "the <tool> aaaa\n";
  const Ids expected = t.encode(text);
  std::vector<std::thread> threads;
  std::vector<Ids> results(4);
  for (Ids& result : results) threads.emplace_back([&] { result = t.encode(text); });
  for (std::thread& thread : threads) thread.join();
  for (const Ids& result : results) EXPECT_EQ(result, expected);
}

TEST_F(TokenizerTest, RefusesWhatIsNoTokenizerFile) {
  EXPECT_THROW(Tokenizer::load(folder_ / "absent"), TokenizerError);
  EXPECT_THROW(Tokenizer::load(folder_), TokenizerError);  // no tokenizer.json in it
  ASSERT_EQ(mkfifo((folder_ / "fifo").c_str(), 0600), 0);
  EXPECT_THROW(Tokenizer::load(folder_ / "fifo"), TokenizerError);
  expect_refused("", {"not valid JSON"});
  expect_refused("{", {"not valid JSON", "byte"});
  expect_refused("{} x", {"not valid JSON"});
  expect_refused("[]", {"expected a JSON object, found array"});
  expect_refused("null", {"expected a JSON object, found null"});
  expect_refused("{}", {"'model' is missing"});
  expect_refused("{\"model\": \"\xFF\"}", {"not valid JSON"});
  expect_refused("{\"model\": \"\\ud800\"}", {"not valid JSON"});
  expect_refused("version https://git-lfs.github.com/spec/v1\n", {"git-LFS pointer"});
  expect_refused(std::string(100000, '['), {"levels deep"});
  std::string nested = R"({"model": {"x": )" + std::string(100000, '[');
  expect_refused(nested, {"levels deep"});
  const std::string whole = small_sentencepiece().dump();
  for (size_t size = 0; size < whole.size(); size += 97) {
    expect_refused(whole.substr(0, size), {"not valid JSON"});
  }
}

TEST_F(TokenizerTest, RefusesBrokenVocabularies) {
  const std::string vocab = R"({"model": {"type": "BPE", "merges": [], "vocab": )";
  expect_refused(vocab + "[]}}", {"'vocab' is missing or no object"});
  expect_refused(vocab + R"({"a": -1}}})", {"'a'", "found -1"});
  expect_refused(vocab + R"({"a": 1.5}}})", {"'a'", "found 1.5"});
  expect_refused(vocab + R"({"a": "1"}}})", {"'a'", "found '1'"});
  expect_refused(vocab + R"({"a": true}}})", {"'a'", "found true"});
  expect_refused(vocab + R"({"a": null}}})", {"'a'", "found null"});
  expect_refused(vocab + R"({"a": [1]}}})", {"'a'"});
  expect_refused(vocab + R"({"a": {"b": 1}}}})", {"'a'"});
  expect_refused(vocab + R"({"a": 4294967296}}})", {"found 4294967296"});
  expect_refused(vocab + R"({"a": 18446744073709551616}}})", {"'a'"});
  expect_refused(vocab + R"({"a": 0, "b": 0}}})", {"id 0", "'a'", "'b'"});
  expect_refused(vocab + R"({"a": 0, "a": 1}}})", {"'a' twice"});
  expect_refused(vocab + R"({"a": 9000000}}})", {"9000000", "only 1 tokens"});
}

TEST_F(TokenizerTest, AcceptsSparseIdsAndEmptyTokens) {
  const Tokenizer t = Tokenizer::load(
      write(R"({"model": {"merges": [], "vocab": {"a": 7, "": 2, "<0x-1>": 3, "<0xZZ>": 4}},
                "decoder": {"type": "ByteFallback"}})"));
  EXPECT_EQ(t.vocab_size(), 8);
  EXPECT_EQ(t.encode("ab"), Ids{7});  // no unknown token: 'b' vanishes
  EXPECT_EQ(t.decode(Ids{7, 2, 3, 4}), "a<0x-1><0xZZ>");
  EXPECT_EQ(t.decode(Ids{7, 5, 0, 7}), "aa");  // no tokens have 5 and 0
}

TEST_F(TokenizerTest, RefusesBrokenMerges) {
  const auto with = [](const char* merges) {
    return std::string(R"({"model": {"vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": )") +
           merges + "}}";
  };
  expect_refused(with("{}"), {"'merges' is missing or no array"});
  expect_refused(with(R"(["a"])"), {"model.merges[0]", "'a'"});
  expect_refused(with(R"(["a b c"])"), {"model.merges[0]"});
  expect_refused(with(R"(["a b", "x b"])"), {"model.merges[1]", "'x' is not in model.vocab"});
  expect_refused(with(R"(["b c"])"), {"'bc' is not in model.vocab"});
  expect_refused(with(R"([["a"]])"), {"model.merges[0]", "fewer than two"});
  expect_refused(with(R"([["a", "b", "c"]])"), {"more than two"});
  expect_refused(with(R"([["a", ""]])"), {"empty part"});
  expect_refused(with(R"([["a", ["b"]]])"), {"model.merges[0]"});
  expect_refused(with(R"([["a", 1]])"), {"model.merges[0]"});
  expect_refused(with("[1]"), {"model.merges[0]"});
  expect_refused(with(R"([{"a": "b"}])"), {"model.merges[0]"});
}

TEST_F(TokenizerTest, RefusesBrokenAddedTokens) {
  const auto with = [](const json& token) {
    json j = small_byte_level();
    j["added_tokens"].push_back(token);
    return j;
  };
  expect_json_refused(with({{"id", 500}}), {"added_tokens[2]", "'content' is missing"});
  expect_json_refused(with({{"content", "x"}}), {"added_tokens[2]", "'id' is missing"});
  expect_json_refused(with({{"id", -1}, {"content", "<x>"}}), {"added_tokens[2].id", "found -1"});
  expect_json_refused(with({{"id", "1"}, {"content", "<x>"}}), {"expected an integer", "'1'"});
  expect_json_refused(with({{"id", 500}, {"content", ""}}), {"added_tokens[2].content"});
  expect_json_refused(with({{"id", 500}, {"content", std::string(5000, 'x')}}), {"found 5000"});
  expect_json_refused(with({{"id", 500}, {"content", "<x>"}, {"special", 1}}),
                      {"added_tokens[2].special", "true or false"});
  expect_json_refused(with({{"id", 3}, {"content", "<x>"}}), {"'<x>' has id 3", "in model.vocab"});
  expect_json_refused(with({{"id", 500}, {"content", "the"}}), {"'the' has id 500, but"});
  expect_json_refused(with({{"id", 500}, {"content", "<tool>"}}), {"'<tool>' has the ids"});
  expect_json_refused(with({{"id", 16000000}, {"content", "<x>"}}), {"16000000"});
  json j = small_byte_level();
  j["added_tokens"] = 3;
  expect_json_refused(j, {"added_tokens: expected an array, found number 3"});
}

TEST_F(TokenizerTest, RefusesUnsupportedPartsByName) {
  const auto with = [](const char* part, const json& value) {
    json j = small_byte_level();
    if (std::string(part) == "model") {
      j["model"].update(value);
    } else {
      j[part] = value;
    }
    return j;
  };
  expect_json_refused(with("model", {{"type", "Unigram"}}),
                      {"model: type 'Unigram' is not supported"});
  expect_json_refused(with("model", {{"dropout", 0.1}}), {"model.dropout"});
  expect_json_refused(with("model", {{"end_of_word_suffix", "</w>"}}),
                      {"model.end_of_word_suffix"});
  expect_json_refused(with("model", {{"unk_token", "<nope>"}}),
                      {"'<nope>' is not in the vocabulary"});
  expect_json_refused(with("model", {{"fuse_unk", "yes"}}),
                      {"model.fuse_unk", "found string 'yes'"});
  expect_json_refused(with("normalizer", {{"type", "Precompiled"}}),
                      {"'Precompiled'", "normalizer"});
  expect_json_refused(with("pre_tokenizer", {{"type", "UnicodeScripts"}}), {"'UnicodeScripts'"});
  expect_json_refused(with("decoder", {{"type", "WordPiece"}}), {"'WordPiece'"});
  expect_json_refused(with("post_processor", {{"type", "Foo"}}), {"'Foo'"});
  expect_json_refused(with("normalizer", 7), {"normalizer: expected an object, found number 7"});
  expect_json_refused(with("normalizer", json::object()), {"'type' is missing"});
  expect_json_refused(
      with("decoder", {{"type", "Strip"}, {"content", "ab"}, {"start", 1}, {"stop", 0}}),
      {"decoder.content", "one character"});
  expect_json_refused(
      with("decoder", {{"type", "Strip"}, {"content", "a"}, {"start", -1}, {"stop", 0}}),
      {"decoder.start"});
  const json sequence = {{"Sequence", {{"id", "A"}}}};
  expect_json_refused(with("post_processor", {{"type", "TemplateProcessing"},
                                              {"single", {sequence, sequence}},
                                              {"special_tokens", json::object()}}),
                      {"post_processor.single[1]"});
  expect_json_refused(
      with("post_processor", {{"type", "TemplateProcessing"},
                              {"single", {{{"SpecialToken", {{"id", "<s>"}}}}, sequence}},
                              {"special_tokens", {{"<s>", {{"ids", {999}}}}}}}),
      {"id 999 is no token"});
}

TEST_F(TokenizerTest, RefusesBadPatterns) {
  const auto with = [](const char* pattern) {
    json j = small_byte_level();
    j["pre_tokenizer"] = {{"type", "Split"},
                          {"pattern", {{"Regex", pattern}}},
                          {"behavior", "Isolated"},
                          {"invert", false}};
    return j;
  };
  for (const char* pattern :
       {"(",         ")",    "[a",      "a**",   "(?<n",  "\\",     "[z-a]",  "(?P<n>a)",
        "\\p{Nope}", "\\pL", "(*UTF)a", "(?R)",  "(?1)",  "[a[b]]", "[a&&b]", "\\Ga",
        "(?x) a",    "\\C",  "(?C1)a",  "a{2}?", "[\\W]", "\\xff",  "\\u12"}) {
    expect_json_refused(with(pattern), {"pre_tokenizer.pattern.Regex", "pattern '"});
  }
  json j = with("a");
  j["pre_tokenizer"]["pattern"] = {{"String", ""}};
  expect_json_refused(j, {"empty pattern"});
  j["pre_tokenizer"]["pattern"] = "a";
  expect_json_refused(j, {"pre_tokenizer.pattern"});
  j = with("a");
  j["pre_tokenizer"]["behavior"] = "Sideways";
  expect_json_refused(j, {"pre_tokenizer.behavior", "'Sideways'"});
}

// Exponential patterns meet the match limit, quadratic ones the time budget; both are typed errors.
TEST_F(TokenizerTest, CatastrophicPatternsAreBounded) {
  const std::string text(100000, 'a');
  std::vector<text::Part> parts;
  for (const char* pattern : {"(?:a+)+[^a]", "(?:a|aa)+[cd]", "(?:a+a+)+[bc]", "(a*)*[cd]"}) {
    const text::Regex regex = text::Regex::translated(pattern);
    text::MatchScratch scratch(0.2);
    EXPECT_THROW(regex.find_parts(text, &scratch, &parts), TokenizerError) << pattern;
  }
  const text::Regex quadratic = text::Regex::translated("a*(?=[bc])|a");
  text::MatchScratch scratch(0.05);
  EXPECT_THROW(quadratic.find_parts(std::string(1 << 20, 'a'), &scratch, &parts), TokenizerError);
}

TEST(PatternTest, TranslatesRubySyntax) {
  const auto split = [](const char* pattern, const std::string& text) {
    std::vector<text::Part> parts;
    text::MatchScratch scratch;
    text::Regex::translated(pattern).find_parts(text, &scratch, &parts);
    std::string out;
    for (const text::Part& part : parts) {
      const std::string piece = text.substr(part.begin, part.end - part.begin);
      out += part.is_match ? "[" + piece + "]" : piece;
    }
    return out;
  };
  EXPECT_EQ(split(R"(\d{1,3}+)", "a1234567b"), "a[1234567]b");  // not possessive in Ruby
  EXPECT_EQ(split(R"(\d++\d)", "a12b"), "a12b");
  EXPECT_EQ(split("a.b", "a\nb"), "a\nb");
  EXPECT_EQ(split("(?m:a.b)", "a\nb"), "[a\nb]");
  EXPECT_EQ(split("^a", "a\na"), "[a]\n[a]");
  EXPECT_EQ(split(R"(\h)", "xag"), "x[a]g");
  EXPECT_EQ(split(R"(\s)", "\u180e\u0085\u2003"), "\u180e[\u0085][\u2003]");
  EXPECT_EQ(split(R"([^\s\p{L}\p{N}]+)", "a!\u180e?1"), "a[!\u180e?]1");
  EXPECT_EQ(split(R"(\w+)", "Ⓐé²_ -"), "[Ⓐé²_] -");
  EXPECT_EQ(split("(?i:'s)", "'S 'ſ"), "['S] ['ſ]");
  EXPECT_EQ(split(R"(\p{Han}|\p{^L})", "a漢1"), "a[漢][1]");
  EXPECT_EQ(split("b*", "abbc"), "[]a[bb]c[]");
  EXPECT_EQ(split("x{,2}y", "xxy"), "[xxy]");
  EXPECT_EQ(split("{", "a{b"), "a[{]b");
}

TEST(UnicodeTest, AStepEndsWhereTruncatedTextDoes) {
  for (const std::string_view character : {"é", "€", "😀"}) {
    for (size_t length = 1; length <= character.size(); length++) {
      const std::vector<char> text(character.begin(), character.begin() + length);
      size_t pos = 0;
      const char32_t c = unicode::next_code_point({text.data(), text.size()}, &pos);
      EXPECT_EQ(pos, length);
      EXPECT_EQ(c == 0xFFFD, length < character.size());
    }
  }
}

TEST(UnicodeTest, NormalForms) {
  using unicode::NormalForm;
  const auto nfc = [](std::string_view s) { return unicode::normalize(s, NormalForm::kNfc); };
  EXPECT_EQ(nfc("e\u0301"), "é");
  EXPECT_EQ(nfc("a\u0323\u0302"), "ậ");
  EXPECT_EQ(nfc("a\u0302\u0323"), "ậ");  // marks are put in order first
  EXPECT_EQ(nfc("\u1112\u1161\u11ab"), "한");
  EXPECT_EQ(nfc("\ud558\u11ab"), "한");
  EXPECT_EQ(nfc("\u2126"), "Ω");
  EXPECT_EQ(nfc("\u0958"), "\u0915\u093c");  // excluded from composition
  EXPECT_EQ(nfc("q\u0307\u0323"), "q\u0323\u0307");
  EXPECT_EQ(nfc("plain é 漢"), "plain é 漢");
  EXPECT_EQ(unicode::normalize("한é", NormalForm::kNfd), "\u1112\u1161\u11abe\u0301");
  EXPECT_EQ(unicode::normalize("ﬁ①", NormalForm::kNfkc), "fi1");
  EXPECT_EQ(unicode::normalize("ﬁé", NormalForm::kNfkd), "fie\u0301");
  EXPECT_EQ(unicode::lower_case("ÀİΣK"), "ài\u0307σk");
}

}  // namespace
}  // namespace mustafar
