// Questions about documents: the document is computed and compressed once per setting, questions
// come in calls of their own and are answered token by token, greedily.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cli/eval/dialogue.h"
#include "cli/eval/task.h"
#include "mustafar/session.h"

namespace mustafar::cli {

struct EvalTurn {
  std::string question;
  std::string reply_start;           // words that the reply is made to begin with
  std::vector<std::string> answers;  // one of them, or each, is to be in the reply
};

struct EvalCase {
  std::string label;  // what it is counted under, as "4096@50"
  std::string document;
  std::vector<EvalTurn> turns;
};

struct AnswerRules {
  bool conversation = false;  // every turn after the last one's reply; else each after the document
  bool every_answer = false;  // each answer counts for itself; else any one is right
  // The reply is not free: answers[0] is fed token by token, and what counts is how many of its
  // tokens were the most probable.
  bool forced = false;
  bool f1 = false;  // report word F1 as well
  int32_t max_new_tokens = 32;
  std::vector<std::string> stop;  // texts that end a reply, beside those of the dialogue
};

class AnswerTask final : public EvalTask {
 public:
  // make_cases: called once, before the first setting is run. work: see EvalTask.
  AnswerTask(const Model& model, const Dialogue& dialogue, std::string name, Json parameters,
             AnswerRules rules, int64_t work, std::function<std::vector<EvalCase>()> make_cases);

  std::string name() const override { return name_; }
  Json parameters() const override { return parameters_; }
  int64_t work() const override { return work_; }
  void run(const std::vector<EvalSetting>& settings, const Json* dense, const Progress& progress,
           const Done& done) override;
  std::vector<std::string> columns() const override;
  std::vector<std::string> cells(const Json& result) const override;

 private:
  class Tally;
  Json run_one(const KVConfig& config, const Json* dense, const Progress& progress) const;
  void run_case(const EvalCase& one, const KVConfig& config, Tally& tally) const;
  // Both append `ids` in one call and return the last token if it ended the reply.
  std::optional<int32_t> reply(Session& session, const std::vector<int32_t>& ids,
                               const EvalCase& one, const EvalTurn& turn, Tally& tally) const;
  void force(Session& session, const std::vector<int32_t>& ids, const EvalCase& one,
             const EvalTurn& turn, Tally& tally) const;

  const Model& model_;
  const Dialogue& dialogue_;
  const std::string name_;
  const Json parameters_;
  const AnswerRules rules_;
  const int64_t work_;
  const std::function<std::vector<EvalCase>()> make_cases_;
  std::vector<EvalCase> cases_;
};

}  // namespace mustafar::cli
