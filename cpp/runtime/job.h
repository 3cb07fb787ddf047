// A request on its way through the scheduler.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kv/sequence_cache.h"
#include "mustafar/model.h"
#include "runtime/model_impl.h"
#include "runtime/paused_cache.h"
#include "runtime/token_loop.h"

namespace mustafar {

// One of the forward calls that a prompt is computed in.
struct PromptCall {
  int64_t end = 0;      // the prompt's tokens up to here are in the cache after it
  bool pinned = false;  // what the cache holds then is wanted again and again
};

// One sequence to continue. What is not said to be for other threads belongs to the thread that
// runs the scheduler.
struct Job {
  using Clock = std::chrono::steady_clock;

  std::vector<int32_t> tokens;  // the prompt, then what was made
  int64_t n_prompt = 0;
  // How the prompt is computed: the last call ends with it. What the job makes depends on these.
  std::vector<PromptCall> calls;
  int64_t most_tokens = 0;  // that it may come to
  bool long_rope = false;   // see SequenceStep
  std::unique_ptr<TokenLoop> loop;
  int32_t priority = 0;  // higher ones are admitted first
  uint64_t order = 0;    // of its arrival
  std::optional<Clock::time_point> deadline;
  // Set by any thread.
  std::shared_ptr<std::atomic<bool>> cancelled = std::make_shared<std::atomic<bool>>(false);

  // A token was made, or the last text: text that became certain, or none. What was made so far is
  // in the loop's result.
  std::function<void(std::string_view text)> on_text;
  // The end, called once: the result is in loop, or error says why there is none.
  std::function<void(std::exception_ptr error)> on_end;

  // The scheduler's. A cache holds fewer than all tokens: the newest is not in it until the next
  // decode step, and those of a resumed sequence come back step by step.
  std::optional<SequenceCache> cache;
  int64_t reused_tokens = 0;          // of the prompt, that the cache was first made with
  std::unique_ptr<PausedCache> kept;  // of a paused one
  int64_t repruned = 0;               // times that its cache went down the ladder
  bool paused = false;
  bool ended = false;
  std::optional<Clock::time_point> started, first_token;

  std::span<const int32_t> prompt() const { return {tokens.data(), static_cast<size_t>(n_prompt)}; }
  // Whether both compute the same prompt in the same calls.
  bool has_prompt_of(const Job& other) const;
  // Makes the first n tokens of the prompt end with a call; 0 < n <= n_prompt.
  void end_call_at(int64_t n, bool pinned);
  // How many of the calls a cache of so many tokens has behind it.
  size_t calls_done(int64_t length) const;
  // Rows of the next one. length < n_prompt.
  int64_t next_rows(int64_t length) const { return calls[calls_done(length)].end - length; }
};

// A job for a prompt, checked. name: what messages begin with, such as "prompt 3". Throws
// std::invalid_argument, ContextOverflow, TokenizerError.
std::shared_ptr<Job> make_job(const Model::Impl& engine, const Prompt& prompt,
                              const SamplingParams& params, bool parse_special, bool own_text,
                              const std::string& name);

// The one that is admitted first.
inline bool before(const Job& a, const Job& b) {
  return a.priority != b.priority ? a.priority > b.priority : a.order < b.order;
}

}  // namespace mustafar
