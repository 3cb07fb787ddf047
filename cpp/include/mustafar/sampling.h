// How the next token is chosen from logits.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace mustafar {

// Called with the ids of the sequence so far and the logits [vocab], which it may change in place
// (constrained output: set what must not follow to -infinity). Runs before every other step.
using LogitsProcessor =
    std::function<void(std::span<const int32_t> token_ids, std::span<float> logits)>;

// What may follow in an output that is constrained, to JSON after a schema for example. It belongs
// to one generation, which calls it from one thread at a time, whichever computes.
class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;
  // Marks the tokens that may come next: bit id % 32 of allowed[id / 32]. allowed:
  // [vocab_size / 32 + 1], zero; bits beyond the vocabulary have no meaning. Returns whether the
  // output may end here: then its end-of-sequence and stop ids may come too. Asked once more before
  // accept(), it must answer the same.
  virtual bool allow(std::span<uint32_t> allowed) = 0;
  // Takes the token that came, unless it ended the output. Returns false where nothing may follow:
  // then the output ends.
  virtual bool accept(int32_t token) = 0;

  // Told before every allow(): how many tokens the limits leave, the next one included. With that a
  // constraint can bring the output to an end in time.
  virtual void set_tokens_left(int64_t) {}
  // Whether it did so: the finish reason is then kLength, although the output is whole.
  virtual bool ended_early() const { return false; }
};
using ConstraintFactory = std::function<std::unique_ptr<TokenConstraint>()>;

// What a model's folder asks for in generation_config.json; none: it does not say.
struct SamplingDefaults {
  std::optional<double> temperature = {};  // 0 where do_sample is false
  std::optional<int32_t> top_k = {};
  std::optional<double> top_p = {};
  std::optional<double> min_p = {};
  std::optional<double> repetition_penalty = {};
  std::optional<double> presence_penalty = {};
  std::optional<double> frequency_penalty = {};
};

// Where a field says none, the model's folder decides, and where that does not say either, what
// stands behind the field.
struct SamplingParams {
  int32_t max_new_tokens = 256;
  int32_t min_new_tokens = 0;              // end-of-sequence ids can't be chosen before
  std::optional<double> temperature = {};  // 0.8; 0: greedy
  std::optional<int32_t> top_k = {};       // 40; 0: off
  std::optional<double> top_p = {};        // 0.95; 1: off
  std::optional<double> min_p = {};        // 0.05; 0: off; relative to the most probable token
  // 1; divides positive, multiplies negative logits of seen tokens
  std::optional<double> repetition_penalty = {};
  std::optional<double> presence_penalty = {};   // 0; subtracted once from generated tokens
  std::optional<double> frequency_penalty = {};  // 0; subtracted per occurrence among them
  // 64, or all with the folder's repetition_penalty, which counts on that; newest tokens that
  // repetition_penalty looks at; -1: all
  std::optional<int32_t> penalty_window = {};
  std::vector<std::pair<int32_t, float>> logit_bias = {};  // (token id, added to its logit)
  std::optional<uint64_t> seed = {};                       // none: drawn from the system
  std::vector<std::string> stop = {};        // texts that end the output; not part of it
  std::vector<int32_t> stop_token_ids = {};  // beside the model's own
  bool ignore_eos = false;                   // go on past the model's end-of-sequence ids
  int32_t logprobs = 0;  // alternatives to report for every token; -1: none at all
  LogitsProcessor logits_processor = {};
  ConstraintFactory constraint = {};  // called for every output; what it forbids nothing allows

  // With every field decided. model: ModelConfig::sampling.
  SamplingParams with_defaults(const SamplingDefaults& model = {}) const;
  // Throws std::invalid_argument naming the field, its value and the range.
  void validate(int64_t vocab_size) const;
};

enum class FinishReason : uint8_t {
  kLength,     // max_new_tokens
  kStop,       // end-of-sequence, a stop id or a stop text
  kContext,    // the context is full
  kCancelled,  // the caller stopped it
  kTimeout,    // the time that the caller gave it is over
};
const char* name_of(FinishReason reason);

struct TokenLogprob {
  int32_t token_id = 0;
  float logprob = 0;                           // natural, of the model's raw distribution
  std::vector<std::pair<int32_t, float>> top;  // the most probable, descending
};

struct GenerateStats {
  int64_t prompt_tokens = 0;  // of this call
  int64_t cached_tokens = 0;  // of those, that an engine had kept and did not compute
  int64_t generated_tokens = 0;
  int64_t repruned = 0;  // times that an engine compressed the cache again, see OnPressure
  double prefill_seconds = 0;
  double decode_seconds = 0;
};

struct GenerateResult {
  std::string text;                // valid UTF-8
  std::vector<int32_t> token_ids;  // generated, the stop token included
  FinishReason finish_reason = FinishReason::kLength;
  std::vector<TokenLogprob> logprobs;  // one per token where asked for
  GenerateStats stats;
};

}  // namespace mustafar
