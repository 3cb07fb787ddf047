// The calls that prompts are computed in, and what is kept of them.
#include <algorithm>
#include <utility>

#include "mustafar/error.h"
#include "runtime/next_logits.h"
#include "runtime/scheduler.h"

namespace mustafar {
namespace {

// Multiply-adds of a prompt's row in one layer's attention to one token, as a part of those in the
// layer's matrices.
double attention_share(const ModelConfig& c) {
  return 2.0 * c.n_heads * c.head_dim / layer_products(c);
}

// The tokens of a job's next call.
std::vector<int32_t> next_call(const Job& job) {
  const int64_t length = job.cache->length();
  const auto first = job.tokens.begin() + length;
  return {first, first + job.next_rows(length)};
}

}  // namespace

// One forward call for the next calls of all in the group; where it fails, for each half.
void Scheduler::run_group(std::span<const JobPtr> group) {
  bool again = false;
  try {
    std::optional<Prefill> prefill;
    with_room([&] {
      std::vector<PrefillPart> parts;
      for (const JobPtr& job : group) parts.push_back({&*job->cache, next_call(*job)});
      prefill.emplace(*engine_.llama, std::move(parts), *step_buffers_);
    });
    while (prefill->step_rows()) pause_point();
    finish_calls(*prefill, group);
    return;
  } catch (const Interrupt&) {
    throw;
  } catch (const OutOfMemory&) {
    again = prefixes_.size() > 0;
    prefixes_.clear();
    if (group.size() == 1 && !again) {
      n_admitted_--;
      if (runs_alone()) {
        fail(*group[0], std::current_exception());
      } else {
        pause(group[0]);
      }
      return;
    }
  } catch (...) {
    if (group.size() == 1) {
      n_admitted_--;
      return fail(*group[0], std::current_exception());
    }
  }
  if (again) return run_group(group);
  run_group(group.first(group.size() / 2));
  run_group(group.subspan(group.size() / 2));
}

// alone: no job of this round's group has a cache.
void Scheduler::start_long(const JobPtr& job, bool alone) {
  try {
    long_prefill_ = with_room([&] {
      return std::make_unique<Prefill>(*engine_.llama, *job->cache, next_call(*job),
                                       *long_buffers_);
    });
    long_job_ = job;
  } catch (const OutOfMemory&) {
    if (alone && runs_alone()) {
      fail(*job, std::current_exception());
    } else {
      pause(job);
    }
  } catch (...) {
    fail(*job, std::current_exception());
  }
}

// budget: rows x layers, a row's attention counted as what it costs beside the matrices.
void Scheduler::advance_long(double budget) {
  const double share = attention_share(engine_.config);
  const auto before_call = static_cast<double>(long_job_->cache->length());
  try {
    for (double cost = 0; cost < budget;) {
      const auto rows = static_cast<double>(long_prefill_->next_rows());
      const double sees = before_call + static_cast<double>(long_prefill_->next_row()) + rows / 2;
      cost += rows * (1 + share * sees);
      const bool more = long_prefill_->step_rows();
      pause_point();
      if (sweep(*long_job_)) return;
      if (!more) return finish_long();
    }
  } catch (const Interrupt&) {
    throw;
  } catch (const OutOfMemory&) {
    const JobPtr job = std::exchange(long_job_, nullptr);
    long_prefill_.reset();
    const bool more_room = prefixes_.size() > 0;
    prefixes_.clear();
    if (runs_alone() && !more_room) return fail(*job, std::current_exception());
    pause(job);
  } catch (...) {
    fail(*long_job_, std::current_exception());
  }
}

void Scheduler::finish_long() {
  const JobPtr jobs[] = {long_job_};
  // Nobody is to count a call that is over.
  const std::unique_ptr<Prefill> prefill = std::move(long_prefill_);
  finish_calls(*prefill, jobs);
  long_job_.reset();
}

// Takes a prefill that has run into the caches, and makes the next token of every job that is past
// its prompt.
void Scheduler::finish_calls(Prefill& prefill, std::span<const JobPtr> jobs) {
  const size_t n = jobs.size();
  const int64_t vocab = engine_.config.vocab_size;
  logits_.resize(n * vocab);
  std::vector<TopLogits> top(n);
  std::vector<int64_t> rows;
  for (const JobPtr& job : jobs) rows.push_back(job->next_rows(job->cache->length()));
  if (engine_.backend->host_memory()) {
    prefill.last_logits(logits_.data());
  } else {
    for (size_t i = 0; i < n; i++) {
      const int32_t needed = jobs[i]->loop->top_needed();
      if (NextLogits::top_suffices(*engine_.backend, needed)) {
        top[i] = prefill.top_logits(prefill.last_row(i), needed);
      }
      if (!top[i].regular) {
        prefill.logits(prefill.last_row(i), 1, logits_.data() + static_cast<int64_t>(i) * vocab);
      }
    }
  }
  prefill.finish();
  for (size_t i = 0; i < n; i++) {
    Job& job = *jobs[i];
    const bool past_prompt = job.cache->length() == job.n_prompt;
    if (past_prompt) {
      active_.push_back(jobs[i]);
      if (rungs_.size() > 1) blocked_ = false;  // another one that may make room
    } else {
      begun_.insert(
          std::upper_bound(begun_.begin(), begun_.end(), jobs[i],
                           [](const JobPtr& a, const JobPtr& b) { return before(*a, *b); }),
          jobs[i]);
    }
    if (jobs[i] != long_job_) n_admitted_--;
    counts_.prompt_tokens += rows[i];
    keep_call(job);
    if (!past_prompt) continue;
    std::vector<JobPtr> same = begin_same_prompts(job);
    same.insert(same.begin(), jobs[i]);
    for (const JobPtr& each : same) {
      if (!each->first_token) each->first_token = Job::Clock::now();
      if (each->cache->length() < static_cast<int64_t>(each->tokens.size())) continue;  // resumed
      take_logits(*each, &top[i],
                  {logits_.data() + static_cast<int64_t>(i) * vocab, static_cast<size_t>(vocab)});
    }
  }
}

// Whether what a job's cache holds after one of its calls is kept.
bool Scheduler::kept_after(const Job& job, size_t call) const {
  return options_.prefix_cache != PrefixCache::kOff &&
         (call + 1 < job.calls.size() || job.calls[call].pinned);
}

// Keeps a copy of what a job's cache holds after a call, if there is room.
void Scheduler::keep_call(const Job& job) {
  const size_t done = job.calls_done(job.cache->length());
  if (!kept_after(job, done - 1)) return;
  const bool pinned = job.calls[done - 1].pinned;
  try {
    SequenceCache copy =
        with_room_of_prefixes([&] { return job.cache->fork(); }, /*pinned_too=*/pinned);
    prefixes_.keep(job.prompt().first(job.cache->length()), std::span(job.calls).first(done),
                   std::move(copy), pinned);
  } catch (const OutOfMemory&) {  // then it isn't there for others
  }
}

// Keeps the cache itself of a job that has ended well, where any beginning may be used.
void Scheduler::keep_sequence(Job& job) {
  if (options_.prefix_cache != PrefixCache::kApproximate || !job.cache) return;
  if (!at_own_setting(job)) return;
  if (job.cache->compressed() == 0) return;
  const auto held = std::span(job.tokens).first(job.cache->length());
  const bool long_rope = job.cache->long_rope();
  const bool has_all = job.cache->dropped_blocks() == 0;  // it can be cut back to any beginning
  prefixes_.keep(held, {}, std::move(*job.cache), /*pinned=*/false);
  if (has_all) prefixes_.drop_beginnings(held, long_rope);
}

}  // namespace mustafar
