#include "cli/eval/jsonl_cases.h"

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <utility>

#include "mustafar/error.h"

namespace mustafar::cli {
namespace {

using Json = nlohmann::json;

std::string trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first == std::string::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

std::optional<std::vector<std::string>> texts_of(const Json& object, const char* field) {
  if (!object.contains(field) || !object[field].is_array()) return std::nullopt;
  std::vector<std::string> texts;
  for (const Json& text : object[field]) {
    if (!text.is_string()) return std::nullopt;
    texts.push_back(text.get<std::string>());
  }
  if (texts.empty()) return std::nullopt;
  return texts;
}

std::optional<std::string> text_of(const Json& object, const char* field) {
  if (!object.contains(field) || !object[field].is_string()) return std::nullopt;
  return object[field].get<std::string>();
}

std::optional<EvalCase> longbench_case(const Json& object, const std::string& label) {
  const auto context = text_of(object, "context"), input = text_of(object, "input");
  auto answers = texts_of(object, "answers");
  if (!context || !input || !answers) return std::nullopt;
  EvalCase one;
  one.label = text_of(object, "dataset").value_or(label);
  one.document = trimmed(*context);
  const std::string question = trimmed(*input);
  one.turns = {{question.empty() ? "Summarise the text in a few sentences."
                                 : "Answer from the text above, as briefly as you can. " + question,
                "", std::move(*answers)}};
  return one;
}

std::optional<EvalCase> ruler_case(const Json& object, const std::string& label) {
  const auto input = text_of(object, "input");
  auto outputs = texts_of(object, "outputs");
  if (!input || !outputs) return std::nullopt;
  const std::string text = trimmed(*input);
  size_t line = text.rfind('\n');
  if (line == std::string::npos) line = text.rfind(". ");
  if (line == std::string::npos) return std::nullopt;
  EvalCase one;
  one.label = label;
  one.document = trimmed(text.substr(0, line + 1));
  one.turns = {{trimmed(text.substr(line + 1)), "", std::move(*outputs)}};
  return one;
}

// Cuts the document's middle out until the whole has at most `room` tokens; returns how many it
// has.
int64_t fit(EvalCase& one, const Model& model, const Dialogue& dialogue, int64_t room) {
  const Tokenizer& tokenizer = model.tokenizer();
  const EvalTurn& turn = one.turns[0];
  const auto count = [&] {
    const auto opening = dialogue.open(one.document, turn.question, turn.reply_start);
    return static_cast<int64_t>(opening.document.size() + opening.question.size());
  };
  int64_t n = count();
  while (n > room) {
    const std::vector<int32_t> ids = tokenizer.encode(one.document, /*add_special=*/false);
    const int64_t half = (static_cast<int64_t>(ids.size()) - (n - room) - 8) / 2;
    if (half < 1) throw Error("a question alone has more than " + std::to_string(room) + " tokens");
    const std::vector<int32_t> head(ids.begin(), ids.begin() + half),
        tail(ids.end() - half, ids.end());
    one.document = trimmed(tokenizer.decode(head) + tokenizer.decode(tail));
    n = count();
  }
  return n;
}

}  // namespace

JsonlCases read_jsonl(const std::string& text, const std::string& file, const Model& model,
                      const Dialogue& dialogue, int64_t room, int64_t max_cases) {
  JsonlCases all;
  const std::string stem = std::filesystem::path(file).stem().string();
  std::istringstream lines(text);
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    number++;
    if (trimmed(line).empty()) continue;
    if (max_cases >= 0 && static_cast<int64_t>(all.cases.size()) == max_cases) break;
    const std::string place = file + ", line " + std::to_string(number);
    const Json object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object()) throw Error(place + " is not a JSON object");
    std::optional<EvalCase> one = longbench_case(object, stem);
    const bool ruler = !one;
    if (ruler) one = ruler_case(object, stem);
    if (!one || one->document.empty()) {
      throw Error(place +
                  " has neither context, input and answers (LongBench) nor input and outputs "
                  "(RULER), texts and lists of texts");
    }
    if (!all.cases.empty() && ruler != all.every_answer) {
      throw Error(place + " is of another kind than the lines before it");
    }
    all.every_answer = ruler;
    try {
      all.tokens += fit(*one, model, dialogue, room);
    } catch (const Error& error) {
      throw Error(place + ": " + error.what());
    }
    all.cases.push_back(std::move(*one));
  }
  if (all.cases.empty()) throw Error(file + " has no questions");
  return all;
}

}  // namespace mustafar::cli
