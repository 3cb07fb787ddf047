#include "cli/eval/answer_task.h"

#include <algorithm>
#include <utility>

#include "cli/eval/answer_scores.h"
#include "cli/interrupt.h"
#include "cli/terminal.h"

namespace mustafar::cli {

// Counts what was right, in all and by label.
class AnswerTask::Tally {
 public:
  void add(const EvalCase& one, int64_t right, int64_t of, double f1, Json answer) {
    Count& count = by_label(one.label);
    count.right += right;
    count.of += of;
    all_.right += right;
    all_.of += of;
    f1_ += f1;
    answers_.push_back(std::move(answer));
  }

  // dense: the dense cache's result, or null where this is it.
  Json json(const Json* dense, bool with_f1) const {
    const double of = static_cast<double>(all_.of), right = static_cast<double>(all_.right);
    const Interval interval = wilson(right, of);
    Json by = Json::object();
    for (const auto& [label, count] : labels_) by[label] = {count.right, count.of};
    Json json = {{"questions", all_.of}, {"right", all_.right},   {"accuracy", right / of},
                 {"low", interval.low},  {"high", interval.high}, {"agreement", agreement(dense)},
                 {"by", std::move(by)}};
    if (with_f1) json["f1"] = f1_ / static_cast<double>(answers_.size());
    json["answers"] = answers_;
    return json;
  }

 private:
  struct Count {
    int64_t right = 0;
    int64_t of = 0;
  };

  Count& by_label(const std::string& label) {
    for (auto& [name, count] : labels_) {
      if (name == label) return count;
    }
    return labels_.emplace_back(label, Count{}).second;
  }

  // Share of answers (of tokens, where those are lists) that are the dense cache's.
  double agreement(const Json* dense) const {
    if (dense == nullptr) return 1;
    const Json& others = dense->at("answers");
    int64_t same = 0, of = 0;
    for (size_t i = 0; i < answers_.size(); i++) {
      const Json& a = answers_[i];
      const Json& b = i < others.size() ? others[i] : Json();
      if (!a.is_array()) {
        of++;
        same += a == b;
        continue;
      }
      for (size_t t = 0; t < a.size(); t++) same += b.is_array() && t < b.size() && a[t] == b[t];
      of += static_cast<int64_t>(a.size());
    }
    return static_cast<double>(same) / static_cast<double>(of);
  }

  std::vector<std::pair<std::string, Count>> labels_;  // in the order they came
  Count all_;
  double f1_ = 0;
  Json answers_ = Json::array();
};

AnswerTask::AnswerTask(const Model& model, const Dialogue& dialogue, std::string name,
                       Json parameters, AnswerRules rules, int64_t work,
                       std::function<std::vector<EvalCase>()> make_cases)
    : model_(model),
      dialogue_(dialogue),
      name_(std::move(name)),
      parameters_(std::move(parameters)),
      rules_(rules),
      work_(work),
      make_cases_(std::move(make_cases)) {}

void AnswerTask::run(const std::vector<EvalSetting>& settings, const Json* dense,
                     const Progress& progress, const Done& done) {
  if (cases_.empty()) cases_ = make_cases_();
  Json own_dense;
  for (size_t i = 0; i < settings.size(); i++) {
    const int64_t before = work_ * static_cast<int64_t>(i);
    const bool is_dense = dense == nullptr;
    Json result =
        run_one(settings[i].config, dense, [&](int64_t part) { progress(before + part); });
    if (is_dense) dense = &(own_dense = result);
    done(i, std::move(result));
  }
}

AnswerTask::Json AnswerTask::run_one(const KVConfig& config, const Json* dense,
                                     const Progress& progress) const {
  Tally tally;
  for (size_t i = 0; i < cases_.size(); i++) {
    run_case(cases_[i], config, tally);
    progress(static_cast<int64_t>(static_cast<double>(work_) * static_cast<double>(i + 1) /
                                  static_cast<double>(cases_.size())));
  }
  return tally.json(dense, rules_.f1);
}

void AnswerTask::run_case(const EvalCase& one, const KVConfig& config, Tally& tally) const {
  Session session(model_, config);
  session.set_interrupt_check(throw_if_interrupted);
  std::optional<int32_t> last;
  for (size_t i = 0; i < one.turns.size(); i++) {
    const EvalTurn& turn = one.turns[i];
    if (i > 0 && rules_.conversation) {
      last =
          reply(session, dialogue_.next(turn.question, turn.reply_start, last), one, turn, tally);
      continue;
    }
    const Dialogue::Opening opening = dialogue_.open(one.document, turn.question, turn.reply_start);
    if (i == 0) session.prefill(opening.document);
    if (rules_.conversation) {
      last = reply(session, opening.question, one, turn, tally);
      continue;
    }
    Session fork = session.fork();
    if (rules_.forced) {
      force(fork, opening.question, one, turn, tally);
    } else {
      reply(fork, opening.question, one, turn, tally);
    }
  }
}

std::optional<int32_t> AnswerTask::reply(Session& session, const std::vector<int32_t>& ids,
                                         const EvalCase& one, const EvalTurn& turn,
                                         Tally& tally) const {
  SamplingParams params;
  params.temperature = 0;
  params.repetition_penalty = 1;  // an answer is the model's, whatever its folder says
  params.presence_penalty = 0;
  params.frequency_penalty = 0;
  params.max_new_tokens = rules_.max_new_tokens;
  params.stop = dialogue_.stop_texts();
  params.stop.insert(params.stop.end(), rules_.stop.begin(), rules_.stop.end());
  const GenerateResult result = session.generate(Prompt{ids}, params);
  int64_t right = 0;
  double f1 = 0;
  for (const std::string& answer : turn.answers) {
    right += contains_answer(result.text, answer);
    f1 = std::max(f1, word_f1(result.text, answer));
  }
  const int64_t of = rules_.every_answer ? static_cast<int64_t>(turn.answers.size()) : 1;
  tally.add(one, std::min(right, of), of, f1, result.text);

  const std::vector<int32_t>& ends = model_.config().eos_token_ids;
  if (result.token_ids.empty()) return std::nullopt;
  const int32_t last = result.token_ids.back();
  return std::find(ends.begin(), ends.end(), last) != ends.end() ? std::optional(last)
                                                                 : std::nullopt;
}

void AnswerTask::force(Session& session, const std::vector<int32_t>& ids, const EvalCase& one,
                       const EvalTurn& turn, Tally& tally) const {
  const std::vector<int32_t> wanted =
      model_.tokenizer().encode(" " + turn.answers[0], /*add_special=*/false);
  std::span<const float> logits = session.prefill(ids);
  Json said = Json::array();
  int64_t right = 0;
  for (size_t i = 0; i < wanted.size(); i++) {
    if (i > 0) logits = session.decode(wanted[i - 1]);
    const auto top = std::max_element(logits.begin(), logits.end()) - logits.begin();
    said.push_back(top);
    right += top == wanted[i];
  }
  tally.add(one, right, static_cast<int64_t>(wanted.size()), 0, std::move(said));
}

std::vector<std::string> AnswerTask::columns() const {
  std::vector<std::string> names = {name_, "95 %", "as dense"};
  if (rules_.f1) names.push_back("F1");
  return names;
}

std::vector<std::string> AnswerTask::cells(const Json& result) const {
  const auto percent = [&](const char* key) {
    return format_number(100 * result.at(key).get<double>(), 1);
  };
  std::vector<std::string> cells = {percent("accuracy") + " %",
                                    percent("low") + "–" + percent("high"),
                                    percent("agreement") + " %"};
  if (rules_.f1) cells.push_back(percent("f1"));
  return cells;
}

}  // namespace mustafar::cli
