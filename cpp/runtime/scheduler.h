// Continuous batching: requests join and leave a running batch between decode steps.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "kv/sequence_cache.h"
#include "model/llama.h"
#include "mustafar/model.h"
#include "runtime/model_impl.h"
#include "runtime/token_loop.h"

namespace mustafar {

// One sequence to continue. What is not said to be for other threads belongs to the thread that
// runs the scheduler.
struct Job {
  using Clock = std::chrono::steady_clock;

  std::vector<int32_t> tokens;  // the prompt, then what was made
  int64_t n_prompt = 0;
  int64_t most_tokens = 0;  // that it may come to
  std::unique_ptr<TokenLoop> loop;
  int32_t priority = 0;  // higher ones are admitted first
  uint64_t order = 0;    // of its arrival
  std::optional<Clock::time_point> deadline;
  // Set by any thread.
  std::shared_ptr<std::atomic<bool>> cancelled = std::make_shared<std::atomic<bool>>(false);

  // Text that became certain; not called with none.
  std::function<void(std::string_view text)> on_text;
  // The end, called once: the result is in loop, or error says why there is none.
  std::function<void(std::exception_ptr error)> on_end;

  // The scheduler's. A cache holds fewer than all tokens: the newest is not in it until the next
  // decode step, and those of a resumed sequence come back step by step.
  std::optional<SequenceCache> cache;
  bool paused = false;
  bool ended = false;
  std::optional<Clock::time_point> started, first_token;
};

// A job for a prompt, checked. name: what messages begin with, such as "prompt 3". Throws
// std::invalid_argument, ContextOverflow, TokenizerError.
std::shared_ptr<Job> make_job(const Model::Impl& engine, const Prompt& prompt,
                              const SamplingParams& params, bool parse_special, bool own_text,
                              const std::string& name);

struct SchedulerOptions {
  int32_t max_batch = 64;        // sequences that hold a cache
  int32_t prefill_tokens = 512;  // of prompts computed between two decode steps, about
  // Called between the parts of a round; what it throws ends the round and comes out of it.
  std::function<void()> between = {};
};

// Rounds of: prompts that fit the round's tokens, all in one forward call; a part of one longer
// prompt, by the rows of a layer; one decode step of all sequences that have begun. What a sequence
// gets does not depend on the others.
//
// Memory: a job is admitted where what it needs for its prompt and a block more, beside what those
// that run will hold a block later, is free. Where memory runs out in spite of that, the youngest
// job is paused: its cache is dropped, and made again by the same calls when another job has ended,
// so that its result stays what it would have been. A job that runs alone and has no room fails
// with OutOfMemory.
class Scheduler {
 public:
  struct Counts {
    int64_t finished = 0, cancelled = 0, failed = 0;
    int64_t prompt_tokens = 0;     // computed, those of resumed jobs again
    int64_t generated_tokens = 0;  // chosen
  };

  Scheduler(Model::Impl& engine, const KVConfig& kv, SchedulerOptions options);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;

  // Throws OutOfMemory where the budget could not hold the prompt if it were empty.
  void check_memory(const Job& job) const;  // any thread
  void add(std::shared_ptr<Job> job);
  bool idle() const { return waiting_.empty() && active_.empty() && long_job_ == nullptr; }
  void round();
  void end_all(FinishReason reason);
  void fail_all(const std::exception_ptr& error);

  const Counts& counts() const { return counts_; }
  int64_t n_running() const;
  int64_t n_waiting() const;  // that have not begun
  int64_t n_paused() const;

 private:
  using JobPtr = std::shared_ptr<Job>;
  struct Interrupt;

  void pause_point();
  void sweep();
  bool sweep(Job& job);  // whether it has ended
  std::vector<JobPtr> admit();
  bool fits(const Job& job, const std::vector<JobPtr>& group) const;
  void run_group(std::span<const JobPtr> group);
  void start_long(JobPtr job);
  void advance_long(double budget);
  void finish_long();
  void decode_step();
  void decode(std::span<const JobPtr> jobs);
  // Makes room by pausing the youngest; false where only one job is left.
  bool pause_youngest();
  void pause(JobPtr job);
  void first_tokens(Prefill& prefill, std::span<const JobPtr> jobs);
  void take_logits(Job& job, const TopLogits* top, std::span<const float> row);
  void emit(Job& job, std::string_view text);
  void retire(Job& job);
  void fail(Job& job, std::exception_ptr error);
  void end(Job& job, std::exception_ptr error);
  void for_each_job(const std::function<void(Job&)>& visit);  // then drops those that have ended
  void drop_ended();
  void count_workspace();
  bool runs_alone() const { return active_.empty() && long_job_ == nullptr; }

  Model::Impl& engine_;
  const SchedulerOptions options_;
  const std::shared_ptr<const CacheSpec> spec_;
  const std::shared_ptr<BlockPool> pool_;
  std::optional<ForwardBuffers> step_buffers_;  // of decode steps and of prompts in one call
  std::optional<ForwardBuffers> long_buffers_;
  int64_t counted_workspace_ = 0;

  std::deque<JobPtr> waiting_;  // by priority, then arrival
  std::vector<JobPtr> active_;  // past their prompt
  JobPtr long_job_;             // whose prompt takes several rounds
  std::unique_ptr<Prefill> long_prefill_;
  int64_t n_admitted_ = 0;  // whose prompts are computed in this round
  bool blocked_ = false;    // nothing is admitted until a job has ended
  std::vector<float> logits_;
  Counts counts_;
};

}  // namespace mustafar
