#include "runtime/scheduler.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "mustafar/error.h"
#include "runtime/next_logits.h"

namespace mustafar {
namespace {

// What prefixes may take where neither they nor the cache as a whole have a limit.
constexpr int64_t kUsualPrefixBytes = int64_t{1} << 30;
// The least part of a round's tokens that a long prompt gets beside short ones.
constexpr double kLongShare = 0.25;

double seconds_between(Job::Clock::time_point from, Job::Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

int64_t prefix_limit(const SchedulerOptions& options, const KVBudget& budget) {
  if (options.prefix_cache == PrefixCache::kOff) return 0;
  if (options.prefix_bytes) return *options.prefix_bytes;
  return budget.limit() > 0 ? budget.limit() : kUsualPrefixBytes;
}

}  // namespace

Scheduler::Scheduler(Model::Impl& engine, const KVConfig& kv, SchedulerOptions options)
    : engine_(engine),
      options_(std::move(options)),
      spec_(engine.cache_spec(kv)),
      pool_(engine.pool(spec_->layout.page_bytes)),
      step_buffers_(*engine.backend),
      long_buffers_(*engine.backend),
      prefixes_(prefix_limit(options_, *engine.budget)) {
  if (options_.max_batch < 1) {
    throw std::invalid_argument("max_batch is " + std::to_string(options_.max_batch) +
                                ", must be at least 1");
  }
  if (options_.prefill_tokens < 1) {
    throw std::invalid_argument("prefill_tokens is " + std::to_string(options_.prefill_tokens) +
                                ", must be at least 1");
  }
  if (options_.prefix_bytes && *options_.prefix_bytes < 0) {
    throw std::invalid_argument("prefix_bytes is " + std::to_string(*options_.prefix_bytes) +
                                ", must be at least 0");
  }
  if (options_.swap_bytes < 0) {
    throw std::invalid_argument("swap_bytes is " + std::to_string(options_.swap_bytes) +
                                ", must be at least 0");
  }
  rungs_.push_back({spec_, pool_});
  for (const KVConfig& setting : options_.ladder) {
    std::shared_ptr<const CacheSpec> spec = engine.cache_spec(setting);
    if (setting.window != kv.window || setting.sink_tokens != kv.sink_tokens ||
        spec->query_bytes > 0 ||
        !(spec->layout.page_bytes < rungs_.back().spec->layout.page_bytes)) {
      throw std::invalid_argument(
          "every setting of a ladder must have smaller pages than the one before, the same window "
          "and sinks, and no policy that asks for queries");
    }
    std::shared_ptr<BlockPool> pool = engine.pool(spec->layout.page_bytes);
    rungs_.push_back({std::move(spec), std::move(pool)});
  }
}

Scheduler::~Scheduler() {
  long_prefill_.reset();
  step_buffers_.reset();
  long_buffers_.reset();
  count_workspace();
}

void Scheduler::count_workspace() {
  int64_t now = 0;
  for (const auto* buffers : {&step_buffers_, &long_buffers_}) {
    if (*buffers) now += (*buffers)->bytes();
  }
  engine_.workspace_bytes += now - counted_workspace_;
  counted_workspace_ = now;
}

void Scheduler::add(std::shared_ptr<Job> job) {
  const auto at = std::upper_bound(waiting_.begin(), waiting_.end(), job,
                                   [](const JobPtr& a, const JobPtr& b) { return before(*a, *b); });
  waiting_.insert(at, std::move(job));
}

// Right at any time on the scheduler's thread, in callbacks of jobs too: those that have ended may
// still be in the lists, and a long call's job is in two for a moment.
int64_t Scheduler::n_running() const {
  int64_t n = n_admitted_;
  bool long_is_in_list = false;
  for (const auto* jobs : {&active_, &begun_}) {
    for (const JobPtr& job : *jobs) {
      if (!job->ended) n++;
      long_is_in_list = long_is_in_list || job == long_job_;
    }
  }
  return n + (long_job_ != nullptr && !long_is_in_list && !long_job_->ended ? 1 : 0);
}

int64_t Scheduler::n_paused() const {
  return std::count_if(waiting_.begin(), waiting_.end(),
                       [](const JobPtr& job) { return job->paused && !job->ended; });
}

int64_t Scheduler::swapped_bytes() const {
  int64_t bytes = 0;
  for (const JobPtr& job : waiting_) {
    if (job->kept != nullptr) bytes += job->kept->bytes();
  }
  return bytes;
}

int64_t Scheduler::n_waiting() const {
  return std::count_if(waiting_.begin(), waiting_.end(),
                       [](const JobPtr& job) { return !job->paused && !job->ended; });
}

void Scheduler::round() {
  try {
    pause_point();
    sweep();
    const std::vector<JobPtr> group = admit();
    double rows = 0;
    for (const JobPtr& job : group) {
      rows += static_cast<double>(job->next_rows(job->cache->length()));
    }
    n_admitted_ = static_cast<int64_t>(group.size());
    if (!group.empty()) {
      pause_point();
      run_group(group);
    }
    if (long_job_ != nullptr) {
      advance_long(std::max(options_.prefill_tokens - rows, options_.prefill_tokens * kLongShare) *
                   engine_.config.n_layers);
    }
    drop_ended();
    decode_step();
    drop_ended();
    count_workspace();
  } catch (const Interrupt& interrupt) {
    std::rethrow_exception(interrupt.error);
  }
}

void Scheduler::pause_point() {
  if (!options_.between) return;
  try {
    options_.between();
  } catch (...) {
    throw Interrupt{std::current_exception()};
  }
}

bool Scheduler::sweep(Job& job) {
  if (job.ended) return true;
  std::optional<FinishReason> reason;
  if (job.deadline && Job::Clock::now() >= *job.deadline) reason = FinishReason::kTimeout;
  if (*job.cancelled) reason = FinishReason::kCancelled;
  if (!reason) return false;
  emit(job, job.loop->finish(*reason));
  retire(job);
  return true;
}

void Scheduler::for_each_job(const std::function<void(Job&)>& visit) {
  for (const JobPtr& job : active_) visit(*job);
  for (const JobPtr& job : begun_) visit(*job);
  if (long_job_ != nullptr) visit(*long_job_);
  for (const JobPtr& job : waiting_) visit(*job);
  drop_ended();
}

void Scheduler::sweep() {
  for_each_job([this](Job& job) { sweep(job); });
}

void Scheduler::end_all(FinishReason reason) {
  for_each_job([&](Job& job) {
    emit(job, job.loop->finish(reason));
    retire(job);
  });
}

void Scheduler::fail_all(const std::exception_ptr& error) {
  drop_ended();
  for_each_job([&](Job& job) { fail(job, error); });
}

void Scheduler::drop_ended() {
  if (long_job_ != nullptr && long_job_->ended) long_job_.reset();
  const auto ended = [](const JobPtr& job) { return job->ended; };
  std::erase_if(active_, ended);
  std::erase_if(begun_, ended);
  std::erase_if(waiting_, ended);
}

// Chooses the next token of a job whose cache holds all others. row: all logits, where top is not
// regular.
void Scheduler::take_logits(Job& job, const TopLogits* top, std::span<const float> row) {
  try {
    TokenLoop& loop = *job.loop;
    const int64_t context = engine_.config.max_position_embeddings;
    std::string text;
    if (static_cast<int64_t>(job.tokens.size()) < context) {
      const int64_t room = context - static_cast<int64_t>(job.tokens.size());
      const int32_t token = top->regular ? loop.choose(*top) : loop.choose(row, job.tokens, room);
      job.tokens.push_back(token);
      counts_.generated_tokens++;
      text = loop.accept(token);
    }
    if (!loop.done() && static_cast<int64_t>(job.tokens.size()) >= context) {
      text += loop.finish(FinishReason::kContext);
    }
    emit(job, text);
    if (loop.done()) retire(job);
  } catch (...) {
    fail(job, std::current_exception());
  }
}

void Scheduler::decode_step() {
  while (!active_.empty()) {
    try {
      return with_room([this] {
        if (!active_.empty()) decode(active_);
      });
    } catch (const OutOfMemory&) {
      if (!pause_youngest()) return fail(*active_[0], std::current_exception());
    } catch (...) {
      break;
    }
  }
  // One of them is at fault: each by itself.
  const std::vector<JobPtr> jobs = active_;
  for (const JobPtr& job : jobs) {
    if (!job->cache || job->ended) continue;  // paused meanwhile
    try {
      with_room([&] {
        if (job->cache) decode({&job, 1});
      });
    } catch (const OutOfMemory&) {
      if (!pause_youngest()) fail(*job, std::current_exception());
    } catch (...) {
      fail(*job, std::current_exception());
    }
  }
}

void Scheduler::decode(std::span<const JobPtr> jobs) {
  const size_t n = jobs.size();
  const auto vocab = static_cast<size_t>(engine_.config.vocab_size);
  std::vector<SequenceCache*> caches;
  std::vector<int32_t> ids;
  int32_t needed = 1;  // of the largest logits by any; 0: all
  for (const JobPtr& job : jobs) {
    caches.push_back(&*job->cache);
    ids.push_back(job->tokens[job->cache->length()]);
    const int32_t next = job->loop->top_needed();
    needed = needed == 0 || next == 0 ? 0 : std::max(needed, next);
  }
  std::vector<TopLogits> top(n);
  bool whole = !NextLogits::top_suffices(*engine_.backend, needed);
  if (whole) {
    logits_.resize(n * vocab);
    engine_.llama->decode(caches, ids, logits_.data(), *step_buffers_);
  } else {
    engine_.llama->decode_top(caches, ids, needed, top, *step_buffers_);
    whole = std::any_of(top.begin(), top.end(), [](const TopLogits& t) { return !t.regular; });
    if (whole) {  // the sampler says what is wrong with them
      logits_.resize(n * vocab);
      engine_.backend->download(logits_.data(), step_buffers_->logits(n * vocab),
                                static_cast<int64_t>(n * vocab) * 4);
    }
  }
  for (size_t i = 0; i < n; i++) {
    Job& job = *jobs[i];
    if (job.cache->length() < static_cast<int64_t>(job.tokens.size())) continue;  // resumed
    take_logits(job, &top[i], {whole ? logits_.data() + i * vocab : nullptr, whole ? vocab : 0});
  }
}

void Scheduler::emit(Job& job, std::string_view text) {
  if (job.on_text) job.on_text(text);
}

void Scheduler::retire(Job& job) {
  GenerateResult& result = job.loop->result;
  result.stats.prompt_tokens = job.n_prompt;
  result.stats.cached_tokens = job.reused_tokens;
  result.stats.generated_tokens = job.loop->made_tokens();
  result.stats.repruned = job.repruned;
  if (job.first_token) {
    result.stats.prefill_seconds = seconds_between(*job.started, *job.first_token);
    result.stats.decode_seconds = seconds_between(*job.first_token, Job::Clock::now());
  }
  const bool stopped = result.finish_reason == FinishReason::kCancelled ||
                       result.finish_reason == FinishReason::kTimeout;
  (stopped ? counts_.cancelled : counts_.finished)++;
  end(job, nullptr);
}

void Scheduler::fail(Job& job, std::exception_ptr error) {
  counts_.failed++;
  end(job, std::move(error));
}

// What it held is free, or kept for others, before anybody is told.
void Scheduler::end(Job& job, std::exception_ptr error) {
  if (&job == long_job_.get()) long_prefill_.reset();
  if (error == nullptr) keep_sequence(job);
  job.cache.reset();
  job.kept.reset();
  job.ended = true;
  blocked_ = false;
  job.on_text = nullptr;
  std::exchange(job.on_end, nullptr)(std::move(error));
}

}  // namespace mustafar
