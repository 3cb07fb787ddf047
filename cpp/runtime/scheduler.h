// Continuous batching: requests join and leave a running batch between decode steps.
#pragma once

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
#include "mustafar/engine.h"
#include "mustafar/error.h"
#include "runtime/job.h"
#include "runtime/model_impl.h"
#include "runtime/prefix_tree.h"

namespace mustafar {

// Multiply-adds of a token in the matrices of one layer.
inline double layer_products(const ModelConfig& c) {
  const double width = static_cast<double>(c.n_heads) * c.head_dim;
  const double kv_width = static_cast<double>(c.n_kv_heads) * c.head_dim;
  return c.hidden_size * (2 * width + 2 * kv_width + 3.0 * c.intermediate_size);
}

struct SchedulerOptions {
  int32_t max_batch = 64;        // sequences that hold a cache
  int32_t prefill_tokens = 512;  // of prompts computed between two decode steps, about
  PrefixCache prefix_cache = PrefixCache::kExact;
  std::optional<int64_t> prefix_bytes = {};  // see EngineOptions
  // What caches are brought to where memory is short (OnPressure::kSparser): settings whose pages
  // become smaller, with the sinks and the window of the scheduler's own. Empty: none are.
  std::vector<KVConfig> ladder = {};
  int64_t swap_bytes = 0;  // see EngineOptions
  // Called between the parts of a round; what it throws ends the round and comes out of it.
  std::function<void()> between = {};
};

// Rounds of: calls of prompts that fit the round's tokens, all in one forward call; a part of one
// longer call, by the rows of a layer; one decode step of all sequences that are past their prompt.
// What a sequence gets does not depend on the others.
//
// Prefixes: what a cache holds after a call that is not its prompt's last, or is pinned, is kept
// for prompts that begin with the same calls; where reuse is approximate, also what sequences hold
// that have ended or still run, for any prompt that shares a block with them. A job whose beginning
// is being computed for another waits for it; one with the same prompt takes its result.
//
// Memory: a job is admitted where what it needs for its prompt and a block more, beside what those
// that run will hold a block later, is free. Kept prefixes make room first. Where memory runs out
// in spite of that, the youngest job is paused: its cache is dropped, and made again by the same
// calls when another job has ended, or kept as it is in host memory beside the budget where there
// is room (swap_bytes), so that its result stays what it would have been. A job that runs alone and
// has no room fails with OutOfMemory.
//
// With a ladder, caches that decode are compressed again at its next setting before anybody waits
// or is paused for lack of memory (make_sparser). Prompts are computed, prefixes are kept and
// paused jobs begin again at the scheduler's own setting, so that a kept prefix never depends on
// traffic.
class Scheduler {
 public:
  struct Counts {
    int64_t finished = 0, cancelled = 0, failed = 0;
    int64_t prompt_tokens = 0;     // computed, those of resumed jobs again
    int64_t generated_tokens = 0;  // chosen
    int64_t reused_tokens = 0;     // of prompts, that a kept prefix held
    int64_t repruned = 0;          // times that a cache went down the ladder
  };

  Scheduler(Model::Impl& engine, const KVConfig& kv, SchedulerOptions options);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;

  // Throws OutOfMemory where the prompt could not be computed if the budget were all free: it names
  // the bytes needed. The job's calls are those that it will be computed in. Any thread.
  void check_memory(const Job& job) const;
  void add(std::shared_ptr<Job> job);
  bool idle() const { return waiting_.empty() && runs_alone(); }
  void round();
  void end_all(FinishReason reason);
  void fail_all(const std::exception_ptr& error);

  const Counts& counts() const { return counts_; }
  int64_t n_running() const;
  int64_t n_waiting() const;  // that have not begun
  int64_t n_paused() const;
  int64_t swapped_bytes() const;  // of caches that paused jobs keep

  const PrefixTree& prefixes() const { return prefixes_; }
  void unpin(std::span<const int32_t> tokens) { prefixes_.unpin(tokens); }
  void drop_prefixes() { prefixes_.clear(); }

 private:
  using JobPtr = std::shared_ptr<Job>;
  // What SchedulerOptions::between threw, on its way out past those who handle a job's own errors.
  struct Interrupt {
    std::exception_ptr error;
  };

  // scheduler.cc
  void pause_point();
  void sweep();
  bool sweep(Job& job);  // whether it has ended
  void decode_step();
  void decode(std::span<const JobPtr> jobs);
  void take_logits(Job& job, const TopLogits* top, std::span<const float> row);
  void emit(Job& job, std::string_view text);
  void retire(Job& job);
  void fail(Job& job, std::exception_ptr error);
  void end(Job& job, std::exception_ptr error);
  void for_each_job(const std::function<void(Job&)>& visit);  // then drops those that have ended
  void drop_ended();
  void count_workspace();

  // scheduler_admission.cc
  std::vector<JobPtr> admit();
  // Into the group, where a round's tokens allow it, or the place of the long one; false: not now.
  bool take_call(const JobPtr& job, int64_t& rows, std::vector<JobPtr>& group);
  void begin(Job& job);
  void note_begun(Job& job);
  bool will_share_result(const Job& other, const Job& job) const;
  std::vector<JobPtr> begin_same_prompts(const Job& job);
  PrefixTree::Common find_prefix(const Job& job);
  bool better_wait(const Job& job, int64_t usable, const std::vector<JobPtr>& group) const;
  int64_t will_leave(const Job& other, const Job& job) const;
  int64_t least_bytes(const Job& job) const;
  int64_t needed_bytes(const Job& job, const std::vector<JobPtr>& group);
  // sparser: caches may go down the ladder for it.
  bool fits(const Job& job, const std::vector<JobPtr>& group, bool sparser);
  int64_t free_bytes() const;  // for pages of the scheduler's own setting
  int64_t later_bytes(const Job& job) const;
  int64_t growth(const Job& job) const;  // until it is a block longer
  // Makes room by pausing the youngest; false where only one job is left.
  bool pause_youngest();
  void pause(JobPtr job);
  bool copying_costs_less(const Job& job);
  void resume(const JobPtr& job);  // that has kept its cache
  // Repeats a call that fails for want of memory, and then has changed nothing, as long as prefixes
  // can make room.
  template <typename Call>
  auto with_room_of_prefixes(const Call& call, bool pinned_too) {
    for (;;) {
      try {
        return call();
      } catch (const OutOfMemory&) {
        if (!prefixes_.drop_oldest(pinned_too)) throw;
      }
    }
  }
  // Likewise, or as long as caches that decode can: in their place others may be there afterwards,
  // and jobs of active_ paused or gone.
  template <typename Call>
  auto with_room(const Call& call) {
    for (;;) {
      try {
        return with_room_of_prefixes(call, /*pinned_too=*/true);
      } catch (const OutOfMemory&) {
        if (!make_sparser(missing_to_grow())) throw;
      }
    }
  }

  // scheduler_pressure.cc
  size_t rung_of(const Job& job) const;
  bool at_own_setting(const Job& job) const { return &job.cache->spec() == spec_.get(); }
  int64_t missing_to_grow() const;
  int64_t most_from_ladder() const;
  bool make_sparser(int64_t missing);
  void step_down(std::span<const JobPtr> jobs, size_t rung);

  // scheduler_prompts.cc
  void run_group(std::span<const JobPtr> group);
  void start_long(const JobPtr& job, bool alone);
  void advance_long(double budget);
  void finish_long();
  void finish_calls(Prefill& prefill, std::span<const JobPtr> jobs);
  bool kept_after(const Job& job, size_t call) const;
  void keep_call(const Job& job);
  void keep_sequence(Job& job);

  // Whether no job has a cache, but for those of the round's group.
  bool runs_alone() const { return active_.empty() && begun_.empty() && long_job_ == nullptr; }

  Model::Impl& engine_;
  const SchedulerOptions options_;
  const std::shared_ptr<const CacheSpec> spec_;
  const std::shared_ptr<BlockPool> pool_;
  struct Rung {
    std::shared_ptr<const CacheSpec> spec;
    std::shared_ptr<BlockPool> pool;
  };
  std::vector<Rung> rungs_;                     // the scheduler's own setting, then the ladder's
  std::optional<ForwardBuffers> step_buffers_;  // of decode steps and of prompts in one call
  std::optional<ForwardBuffers> long_buffers_;
  int64_t counted_workspace_ = 0;

  PrefixTree prefixes_;
  std::deque<JobPtr> waiting_;  // by priority, then arrival, as begun_
  std::vector<JobPtr> begun_;   // between two calls of their prompts
  std::vector<JobPtr> active_;  // past their prompt
  JobPtr long_job_;             // whose prompt's call takes several rounds
  std::unique_ptr<Prefill> long_prefill_;
  int64_t n_admitted_ = 0;  // whose prompts are computed in this round
  bool blocked_ = false;    // nothing is admitted until a job has ended
  std::vector<float> logits_;
  Counts counts_;
};

}  // namespace mustafar
