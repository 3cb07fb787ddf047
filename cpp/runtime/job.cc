#include "runtime/job.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "mustafar/error.h"
#include "runtime/prompt_ids.h"

namespace mustafar {

std::shared_ptr<Job> make_job(const Model::Impl& engine, const Prompt& prompt,
                              const SamplingParams& params, bool parse_special, bool own_text,
                              const std::string& name) {
  const Tokenizer* tokenizer = engine.tokenizer ? &*engine.tokenizer : nullptr;
  auto job = std::make_shared<Job>();
  job->tokens = prompt_ids(prompt, tokenizer, 0, parse_special);
  job->n_prompt = static_cast<int64_t>(job->tokens.size());
  const int64_t context = engine.config.max_position_embeddings;
  if (job->n_prompt == 0) throw std::invalid_argument(name + " is empty");
  if (job->n_prompt > context) {
    throw ContextOverflow(name + " has " + std::to_string(job->n_prompt) +
                          " tokens, more than the model's context of " + std::to_string(context));
  }
  check_token_ids(job->tokens, engine.config.vocab_size, name + ": ");
  job->loop = std::make_unique<TokenLoop>(params, engine.config, tokenizer);
  if (!own_text) job->loop->start_after(job->tokens);
  job->most_tokens = std::min<int64_t>(job->n_prompt + params.max_new_tokens, context);
  job->long_rope = engine.long_rope(job->most_tokens);
  job->calls = {{.end = job->n_prompt}};
  return job;
}

bool Job::has_prompt_of(const Job& other) const {
  const auto same_end = [](const PromptCall& a, const PromptCall& b) { return a.end == b.end; };
  return long_rope == other.long_rope && std::ranges::equal(calls, other.calls, same_end) &&
         std::ranges::equal(prompt(), other.prompt());
}

void Job::end_call_at(int64_t n, bool pinned) {
  const auto at =
      std::lower_bound(calls.begin(), calls.end(), n,
                       [](const PromptCall& call, int64_t end) { return call.end < end; });
  if (at->end != n) {
    calls.insert(at, {.end = n, .pinned = pinned});
  } else {
    at->pinned = at->pinned || pinned;
  }
}

size_t Job::calls_done(int64_t length) const {
  const auto next =
      std::upper_bound(calls.begin(), calls.end(), length,
                       [](int64_t end, const PromptCall& call) { return end < call.end; });
  return static_cast<size_t>(next - calls.begin());
}

}  // namespace mustafar
