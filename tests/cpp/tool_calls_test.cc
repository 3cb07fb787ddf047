#include "mustafar/tool_calls.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "mustafar/error.h"
#include "support/tiny_model.h"

namespace mustafar {
namespace {

constexpr const char* kTools = R"([
  {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}},
  {"name": "add", "parameters": {"type": "object"}},
  {"type": "function", "function": {"name": "clock.now"}}])";

struct Reply {
  std::string said, rest;
  std::vector<ToolCall> calls;
};

Reply read(const std::string& text, size_t piece) {
  ToolCallReader reader(kTools);
  Reply reply;
  for (size_t at = 0; at < text.size(); at += piece)
    reply.said += reader.push(text.substr(at, piece));
  ToolCallReader::Rest rest = reader.finish();
  reply.rest = std::move(rest.text);
  reply.calls = std::move(rest.calls);
  return reply;
}

struct Expected {
  std::string text, said;
  std::vector<ToolCall> calls;
};

std::vector<Expected> spelled_calls() {
  const ToolCall weather{"get_weather", R"({"city": "Köln"})"},
      add{"add", R"({"a":1.50,"b":[2,null]})"};
  const std::string weather_json = R"({"name": "get_weather", "arguments": {"city": "Köln"}})",
                    add_json = R"({"name":"add", "arguments":{"a":1.50,"b":[2,null]}})";
  return {
      {"<tool_call>\n" + weather_json + "\n</tool_call>", "", {weather}},
      {"So:\n\n<tool_call>" + weather_json + "</tool_call>\n<tool_call>" + add_json +
           "</tool_call>",
       "So:",
       {weather, add}},
      {"<tool_call>" + add_json, "", {add}},  // the end of the turn closes it
      {"<tool_call>" + add_json + "</tool_call> done", "done", {add}},
      {R"({"name": "get_weather", "parameters": {"city": "Köln"}})", "", {weather}},
      {R"({"parameters": {"city": "Köln"}, "name": "get_weather"} )", "", {weather}},
      {"\n" + add_json + "; " + add_json, "", {add, add}},
      {"<|python_tag|>" + add_json, "", {add}},
      {R"({"type": "function", "function": )" + add_json + "}", "", {add}},
      {R"({"name": "add", "arguments": "{\"a\": \"}\"}"})", "", {{"add", R"({"a": "}"})"}}},
      {R"({"name": "add"})", "", {{"add", "{}"}}},
      {"[TOOL_CALLS][" + add_json + "]", "", {add}},
      {"Well,[TOOL_CALLS] [" + add_json + ", " + weather_json + "]", "Well,", {add, weather}},
      {R"([TOOL_CALLS]get_weather[ARGS]{"city": "Köln"})", "", {weather}},
      {R"([TOOL_CALLS]get_weather[CALL_ID]9x8y7z6w5[ARGS]{"city": "Köln"})", "", {weather}},
      {R"([TOOL_CALLS]get_weather{"city": "Köln"}[TOOL_CALLS]add{})", "", {weather, {"add", "{}"}}},
      {"[get_weather(city='Köln'), clock.now()]",
       "",
       {{"get_weather", R"({"city":"Köln"})"}, {"clock.now", "{}"}}},
      {"[ add(a = -0x1F, b=(1,), c=(2), d={'x': True, 3: None}, e=1_000.5e-3, f='a' "
       "\"b\\n\\u00e9\",) , ]",
       "",
       {{"add", R"({"a":-31,"b":[1],"c":2,"d":{"x":true,"3":null},"e":1000.5e-3,"f":"ab\né"})"}}},
  };
}

TEST(ToolCalls, AreReadInEveryStyleAndInPiecesOfAnySize) {
  for (const Expected& expected : spelled_calls()) {
    for (const size_t piece : {1, 3, 1000}) {
      SCOPED_TRACE(expected.text + " in pieces of " + std::to_string(piece));
      const Reply reply = read(expected.text, piece);
      EXPECT_EQ(reply.said + reply.rest, expected.said);
      ASSERT_EQ(reply.calls.size(), expected.calls.size());
      for (size_t i = 0; i < reply.calls.size(); i++) {
        EXPECT_EQ(reply.calls[i].name, expected.calls[i].name);
        EXPECT_EQ(reply.calls[i].arguments, expected.calls[i].arguments);
      }
    }
  }
}

TEST(ToolCalls, WhatOnlyLooksLikeOneStaysText) {
  for (const std::string text : {"",
                                 "  ",
                                 "plain\n",
                                 "{",
                                 "[",
                                 "[]",
                                 "{}",
                                 R"({"answer": 42})",
                                 R"({"name": "Bob"})",
                                 R"({"name": "add", "parameters": {"a": 1)",
                                 R"({"name": "add", "arguments": [1]})",
                                 R"({"name": "add", "arguments": {}} is how)",
                                 R"({"name": 3, "arguments": {}})",
                                 R"({"function": {"name": 1}})",
                                 "[1] is a footnote",
                                 "[add(a=x)]",
                                 "[add(1)]",
                                 "[add(a=1), 2]",
                                 "[add(a=1, a=2)]",
                                 "[add(a=007)]",
                                 "[add(a=1e999)]",
                                 "[add(a=-.5e5555)]",
                                 R"({"name": "add", "parameters": {"a": 1e999}})",
                                 "[add(a='\\N{DIGIT ONE}')]",
                                 "[add(a=1)",
                                 "[add(a='x)]",
                                 "[add(a=1)] and so on",
                                 "Use <tool_call> tags",
                                 R"(<tool_call>{"name": "remove", "arguments": {}}</tool_call>)",
                                 "a < b and <tool",
                                 "[TOOL_CALLS] is a mark",
                                 "[TOOL_CALLS]",
                                 "[TOOL_CALLS][]",
                                 "[TOOL_CALLS]add[ARGS]",
                                 "<|python_tag|>print(1)",
                                 "<|python_tag|>}",
                                 "{,}"}) {
    for (const size_t piece : {1, 1000}) {
      const Reply reply = read(text, piece);
      EXPECT_EQ(reply.said + reply.rest, text);
      EXPECT_TRUE(reply.calls.empty()) << text;
    }
  }
}

TEST(ToolCalls, NestedBeyondReasonAreText) {
  const std::string brackets(100000, '[');
  for (const std::string& text :
       {"[add(a=" + brackets, R"({"name": "add", "arguments": )" + brackets}) {
    EXPECT_EQ(read(text, text.size()).rest, text);
  }
}

TEST(ToolCalls, TextThatCannotBecomeOneIsNotHeldBack) {
  for (const std::string text : {"[1] see there", R"({"answer": 4)", "Hello world", "a < b"}) {
    EXPECT_EQ(read(text, 1).said, text);
  }
  const Reply reply = read("Hello <tool", 1);
  EXPECT_EQ(reply.said, "Hello");
  EXPECT_EQ(reply.rest, " <tool");
}

TEST(ToolCalls, WithoutToolsEverythingIsText) {
  ToolCallReader reader("");
  const std::string text = R"(<tool_call>{"name": "add", "arguments": {}}</tool_call>)";
  EXPECT_EQ(reader.push(text), text);
  EXPECT_TRUE(reader.finish().calls.empty());
  EXPECT_EQ(reader.finish().text, "");
}

TEST(ToolCalls, SpecialTokensWithoutTextAreMarks) {
  const testing::TemporaryFolder folder;
  nlohmann::json json = testing::byte_tokenizer();
  for (const char* mark : {"[TOOL_CALLS]", "[ARGS]"}) {
    nlohmann::json added = json["added_tokens"].back();
    added["id"] = added["id"].get<int>() + 1;
    added["content"] = mark;
    json["added_tokens"].push_back(added);
  }
  const Tokenizer tokenizer = Tokenizer::load(folder.write("tokenizer.json", json.dump()));
  const int32_t calls = *tokenizer.token_to_id("[TOOL_CALLS]"),
                args = *tokenizer.token_to_id("[ARGS]");
  ToolCallReader reader(kTools, tokenizer);
  EXPECT_TRUE(reader.reads_tokens());
  EXPECT_FALSE(ToolCallReader(kTools).reads_tokens());
  EXPECT_EQ(reader.push("Yes.", {}), "Yes.");
  EXPECT_EQ(reader.push("", std::vector<int32_t>{calls}), "");
  EXPECT_EQ(reader.push("add", std::vector<int32_t>{args}), "");
  EXPECT_EQ(reader.push(R"({"a": 1})"), "");
  const ToolCallReader::Rest rest = reader.finish();
  EXPECT_EQ(rest.text, "");
  ASSERT_EQ(rest.calls.size(), 1U);
  EXPECT_EQ(rest.calls[0].name, "add");
  EXPECT_EQ(rest.calls[0].arguments, R"({"a": 1})");

  ToolCallReader text_after_all(kTools, tokenizer);
  EXPECT_EQ(text_after_all.push("Oh", std::vector<int32_t>{calls}), "Oh");
  EXPECT_EQ(text_after_all.push(" well"), "");
  EXPECT_EQ(text_after_all.finish().text, " well");
}

TEST(ToolCalls, RefuseToolsOfAnotherShape) {
  for (const char* tools : {"{}", "3", "[1]", "not JSON"}) {
    EXPECT_THROW(ToolCallReader{tools}, std::invalid_argument) << tools;
  }
  ToolCallReader reader(kTools);
  const ToolCallReader moved = std::move(reader);
  EXPECT_THROW(reader.finish(), StateError);
}

TEST(ToolCalls, BecomeMessagesAndSoDoTheirResults) {
  const std::vector<ToolCall> calls = {{"add", R"({"a": 12345678901234567890123})"},
                                       {"clock.now", "{}"}};
  const auto message = nlohmann::json::parse(call_message("Let me see.", calls, 7).json());
  EXPECT_EQ(message["role"], "assistant");
  EXPECT_EQ(message["content"], "Let me see.");
  ASSERT_EQ(message["tool_calls"].size(), 2U);
  EXPECT_EQ(message["tool_calls"][0]["function"]["name"], "add");
  EXPECT_TRUE(message["tool_calls"][0]["function"]["arguments"].is_object());
  EXPECT_EQ(message["tool_calls"][1]["type"], "function");
  for (size_t i = 0; i < 2; i++) {
    const auto result = nlohmann::json::parse(result_message(calls[i], 7 + i, "12:00").json());
    EXPECT_EQ(result["role"], "tool");
    EXPECT_EQ(result["name"], calls[i].name);
    EXPECT_EQ(result["content"], "12:00");
    EXPECT_EQ(result["tool_call_id"], message["tool_calls"][i]["id"]);
    EXPECT_EQ(result["tool_call_id"].get<std::string>().size(), 9U);
  }
}

}  // namespace
}  // namespace mustafar
