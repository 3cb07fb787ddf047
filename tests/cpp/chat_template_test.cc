#include "mustafar/chat_template.h"

#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "mustafar/error.h"
#include "support/source_dir.h"

namespace mustafar {
namespace {

namespace fs = std::filesystem;

std::string render(const std::string& source, const std::string& messages = "[]",
                   const ChatTemplateOptions& options = {}) {
  return ChatTemplate::parse(source).render(messages, options);
}

// The message of the error that a template ends with.
std::string error_of(const std::string& source, const ChatTemplateOptions& options = {}) {
  try {
    return "no error, but: " + render(source, "[]", options).substr(0, 200);
  } catch (const TemplateError& e) {
    return e.what();
  }
}

TEST(ChatTemplateTest, RendersAConversation) {
  const std::string source =
      "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m['content']|trim }}</s>\n{% endfor "
      "%}"
      "{% if add_generation_prompt %}<assistant>{% endif %}";
  ChatTemplateOptions options;
  options.add_generation_prompt = true;
  options.bos_token = "<s>";
  EXPECT_EQ(render(source, R"([{"role": "user", "content": " hi "}])", options),
            "<s><user>hi</s>\n<assistant>");
}

TEST(ChatTemplateTest, MarksWhatCameFromOutside) {
  const ChatTemplate t =
      ChatTemplate::parse("{% for m in messages %}[{{ m.role }}]{{ m.content|upper }}{% endfor %}");
  const RenderedChat chat = t.render_marked(R"([{"role": "user", "content": "a</s>b"}])");
  EXPECT_EQ(chat.text, "[user]A</S>B");
  ASSERT_EQ(chat.outside.size(), 1u);
  EXPECT_EQ(chat.outside[0].begin, 6u);
  EXPECT_EQ(chat.outside[0].end, 12u);
}

TEST(ChatTemplateTest, ErrorsNameTheLine) {
  EXPECT_EQ(error_of("a\n{{ raise_exception('no ' ~ 1) }}"), "chat template, line 2: no 1");
  EXPECT_NE(error_of("\n\n{% if %}").find("line 3"), std::string::npos);
  EXPECT_NE(error_of("\n{{ x.y }}").find("line 2: 'x' is undefined"), std::string::npos);
  EXPECT_NE(error_of("{{ 1|nosuch }}").find("nosuch"), std::string::npos);
  EXPECT_NE(error_of("{% include 'x' %}").find("'include' is not supported"), std::string::npos);
  EXPECT_NE(error_of("\xff").find("UTF-8"), std::string::npos);
}

TEST(ChatTemplateTest, IsSandboxed) {
  EXPECT_EQ(render("{{ ''.__class__ }}"), "");
  for (const char* source : {"{{ ''.__class__.__mro__ }}", "{{ [].append(1) }}",
                             "{{ {}.update({}) }}", "{{ ''['__class__']['__base__'] }}",
                             "{{ messages.clear() }}", "{{ '{0.__class__.__mro__}'.format(1) }}"}) {
    EXPECT_NE(error_of(source).find("unsafe"), std::string::npos) << source << error_of(source);
  }
}

TEST(ChatTemplateTest, BoundsStepsTextAndNesting) {
  ChatTemplateOptions options;
  options.max_steps = 200'000;
  options.max_output_bytes = 1 << 20;
  const auto repeat = [](const std::string& s, int n) {
    std::string out;
    for (int i = 0; i < n; i++) out += s;
    return out;
  };
  const std::vector<std::string> sources = {
      "{% for i in range(10**9) %}{% endfor %}",
      "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
      "{{ '-' * 10**10 }}",
      "{% for i in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
      "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
      "{% macro m(x) %}{{ m([x]) }}{% endmacro %}{{ m(1) }}",
      "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
      "{{ " + repeat("(", 100000),
      "{{ " + repeat("[", 100000),
      "{{ " + repeat("{1:", 100000),
      "{{ " + repeat("-", 100000) + "1 }}",
      "{{ " + repeat("not ", 100000) + "1 }}",
      "{{ " + repeat("1+", 100000) + "1 }}",
      "{{ 1" + repeat("|abs", 100000) + " }}",
      "{{ x" + repeat(".x", 100000) + " }}",
      "{{ x" + repeat("()", 100000) + " }}",
      "{{ 1 " + repeat("if 1 else 1 ", 100000) + " }}",
      repeat("{% if 1 %}", 100000),
      repeat("{% for i in x %}", 100000),
      "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor "
      "%}",
      "{% set n = namespace(s=1) %}{% for i in range(9999) %}{% set n.s = [n.s] %}{% endfor %}",
      "{% set n = namespace(s=1) %}{% for i in range(9999) %}{% set n.s = {'a': n.s} %}{% endfor "
      "%}",
      "{% set n = namespace(s=1) %}{% for i in range(150) %}{% set n.s = [n.s, n.s] %}{% endfor "
      "%}{{ n.s }}",
      "{% set n = namespace(s=1) %}{% for i in range(150) %}{% set n.s = [n.s, n.s] %}{% endfor "
      "%}{{ n.s|tojson }}",
      "{% set n = namespace(a=1, b=1) %}{% for i in range(150) %}{% set n.a = [n.a, n.a] %}"
      "{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
      "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
      "{% set n = namespace(g=[1]) %}{% for i in range(9999) %}{% set n.g = n.g|map('abs') %}{% "
      "endfor %}{{ n.g|list }}",
      "{{ '%99999999999d' % 1 }}",
      "{{ '{:99999999999}'.format(1) }}",
      "{{ 'a'.center(10**12) }}",
      "{{ 'a'.zfill(10**12) }}",
      "{{ ('a' * 99999).replace('a', 'a' * 99999) }}",
      "{{ [0] * 10**12 }}",
      "{{ 'a'|indent(10**12) }}",
      "{{ [1]|batch(10**12, 0)|list }}",
      "{{ []|slice(10**12, 0)|list }}",
      "{{ strftime_now('%c' * 9999) }}",
  };
  for (const std::string& source : sources) {
    EXPECT_EQ(error_of(source, options).rfind("chat template, line ", 0), 0u)
        << source.substr(0, 120) << " -> " << error_of(source, options);
  }
}

TEST(ChatTemplateTest, LongChainsOfReferencesEndWell) {
  // Each of these would recurse once per link if objects were freed the obvious way.
  EXPECT_EQ(render("{% set h = namespace(v=0) %}{% for i in range(20000) %}"
                   "{% set h.v = namespace(prev=h.v) %}{% endfor %}ok"),
            "ok");
  EXPECT_EQ(render("{% set h = namespace(v=[1]) %}{% for i in range(20000) %}"
                   "{% set h.v = h.v|map('abs') %}{% endfor %}ok"),
            "ok");
  EXPECT_EQ(render("{% set a = namespace() %}{% set b = namespace(a=a) %}{% set a.b = b %}ok"),
            "ok");
}

TEST(ChatTemplateTest, ChecksItsArguments) {
  const ChatTemplate t = ChatTemplate::parse("{{ messages }}");
  for (const char* bad : {"", "{", "{}", "[1]", "[[]]", "null", "[{}] x", "[{\"a\": \"\\ud800\"}]",
                          "[{\"a\": \"\xff\"}]", "[{\"a\": 9223372036854775808}]",
                          "[{\"a\": 99999999999999999999999}]"}) {
    EXPECT_THROW(t.render(bad), std::invalid_argument) << bad;
  }
  EXPECT_THROW(t.render(std::string(100000, '[')), std::invalid_argument);
  ChatTemplateOptions options;
  options.tools = "{}";
  EXPECT_THROW(t.render("[]", options), std::invalid_argument);
  options.tools = "";
  options.variables = "[]";
  EXPECT_THROW(t.render("[]", options), std::invalid_argument);
  options.variables = "";
  for (const char* bad :
       {"", "2024", "2024-13-01", "2024-02-30", "2024-01-01x", "2024-01-01T25:00:00"}) {
    options.date = bad;
    EXPECT_THROW(t.render("[]", options), std::invalid_argument) << bad;
  }
  options.date = "2024-02-29";
  EXPECT_EQ(render("{{ strftime_now('%A %d %b %Y') }}", "[]", options), "Thursday 29 Feb 2024");
}

TEST(ChatTemplateTest, IsSafeToShareBetweenThreads) {
  const ChatTemplate t =
      ChatTemplate::parse("{% for m in messages %}{{ m.content|upper }}{% endfor %}");
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; i++) {
    threads.emplace_back([&] {
      for (int k = 0; k < 100; k++) {
        if (t.render(R"([{"content": "a"}, {"content": "b"}])") != "AB") wrong++;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(ChatTemplateTest, BuiltinsParseAndRender) {
  for (const std::string& name : ChatTemplate::builtin_names()) {
    const std::string text = ChatTemplate::builtin(name).render(
        R"([{"role": "system", "content": "S"}, {"role": "user", "content": "question"}])");
    EXPECT_NE(text.find("question"), std::string::npos) << name;
  }
  EXPECT_THROW(ChatTemplate::builtin("nope"), TemplateError);
  EXPECT_THROW(ChatTemplate::from_argument("/no/such/file"), TemplateError);
}

// Every prefix of a published template, and every template with a byte changed, parses or fails
// with the typed error.
TEST(ChatTemplateTest, BrokenSourcesAreErrors) {
  const fs::path folder = testing::source_dir() / ".." / "shared" / "data" / "chat_templates";
  if (!fs::is_directory(folder)) GTEST_SKIP() << folder << " is absent";
  int failed = 0;
  const auto attempt = [&](const std::string& source) {
    try {
      ChatTemplateOptions options;
      options.max_steps = 20000;
      render(source, R"([{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}])",
             options);
    } catch (const TemplateError&) {
      failed++;
    }
  };
  for (const auto& entry : fs::directory_iterator(folder)) {
    std::ifstream in(entry.path(), std::ios::binary);
    std::ostringstream all;
    all << in.rdbuf();
    const std::string source = all.str();
    for (size_t n = 0; n < source.size(); n += 41) attempt(source.substr(0, n));
    const std::string replacements("{}%#()[]'\"|.,-~\\\n0a\xff\0", 22);
    for (size_t at = 0; at < source.size(); at += 23) {
      std::string changed = source;
      changed[at] = replacements[at % replacements.size()];
      attempt(changed);
    }
  }
  EXPECT_GT(failed, 50);
}

}  // namespace
}  // namespace mustafar
