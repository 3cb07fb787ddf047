#include "runtime/scheduler.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "mustafar/error.h"
#include "runtime/next_logits.h"
#include "runtime/prompt_ids.h"

namespace mustafar {
namespace {

// Tokens that a sequence is expected to grow by before others make room.
constexpr int64_t kAheadTokens = kBlockTokens;
// The least part of a round's tokens that a long prompt gets beside short ones.
constexpr double kLongShare = 0.25;

double seconds_between(Job::Clock::time_point from, Job::Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

// The one admitted first.
bool before(const Job& a, const Job& b) {
  return a.priority != b.priority ? a.priority > b.priority : a.order < b.order;
}

// Multiply-adds of a prompt's row in one layer's attention to one token, as a part of those in the
// layer's matrices.
double attention_share(const ModelConfig& c) {
  const double width = static_cast<double>(c.n_heads) * c.head_dim;
  const double kv_width = static_cast<double>(c.n_kv_heads) * c.head_dim;
  const double matrices = c.hidden_size * (2 * width + 2 * kv_width + 3.0 * c.intermediate_size);
  return 2 * width / matrices;
}

}  // namespace

// What SchedulerOptions::between threw, on its way out past those who handle a job's own errors.
struct Scheduler::Interrupt {
  std::exception_ptr error;
};

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
                          " tokens, more than the model's context of " + std::to_string(context) +
                          engine.config.why_context_ends());
  }
  check_token_ids(job->tokens, engine.config.vocab_size, name + ": ");
  job->loop = std::make_unique<TokenLoop>(params, engine.config, tokenizer);
  if (!own_text) job->loop->start_after(job->tokens);
  job->most_tokens = std::min<int64_t>(job->n_prompt + params.max_new_tokens, context);
  return job;
}

Scheduler::Scheduler(Model::Impl& engine, const KVConfig& kv, SchedulerOptions options)
    : engine_(engine),
      options_(std::move(options)),
      spec_(engine.cache_spec(kv)),
      pool_(engine.pool(spec_->layout.page_bytes)),
      step_buffers_(*engine.backend),
      long_buffers_(*engine.backend) {
  if (options_.max_batch < 1) {
    throw std::invalid_argument("max_batch is " + std::to_string(options_.max_batch) +
                                ", must be at least 1");
  }
  if (options_.prefill_tokens < 1) {
    throw std::invalid_argument("prefill_tokens is " + std::to_string(options_.prefill_tokens) +
                                ", must be at least 1");
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

int64_t Scheduler::n_running() const {
  return n_admitted_ + static_cast<int64_t>(active_.size()) + (long_job_ != nullptr ? 1 : 0);
}

int64_t Scheduler::n_paused() const {
  return std::count_if(waiting_.begin(), waiting_.end(),
                       [](const auto& job) { return job->paused; });
}

int64_t Scheduler::n_waiting() const { return static_cast<int64_t>(waiting_.size()) - n_paused(); }

void Scheduler::round() {
  try {
    pause_point();
    sweep();
    const std::vector<JobPtr> group = admit();
    double rows = 0;
    for (const JobPtr& job : group) rows += static_cast<double>(job->n_prompt);
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
  std::erase_if(waiting_, ended);
}

void Scheduler::check_memory(const Job& job) const {
  const int64_t limit = engine_.budget->limit();
  const int64_t least = SequenceCache::held_bytes(*spec_, job.n_prompt);
  if (limit == 0 || least <= limit) return;
  throw OutOfMemory("a prompt of " + std::to_string(job.n_prompt) + " tokens needs " +
                    std::to_string(least) + " bytes of KV cache, more than kv_budget = " +
                    std::to_string(limit) + ": raise kv_budget, raise sparsity or shorten it");
}

// group: jobs admitted in this round, without caches yet.
bool Scheduler::fits(const Job& job, const std::vector<JobPtr>& group) const {
  if (runs_alone() && group.empty()) return true;  // more room than now there will not be
  const auto later = [&](const Job& each) {
    const int64_t n = static_cast<int64_t>(each.tokens.size());
    return SequenceCache::held_bytes(*spec_, std::min(n + kAheadTokens, each.most_tokens));
  };
  const auto with_prompt = [&](const Job& each) {
    return later(each) + spec_->fresh_bytes(each.n_prompt);
  };
  int64_t free_bytes = std::min(engine_.budget->available(), engine_.backend->available_bytes());
  free_bytes += pool_->free_pages() * spec_->layout.page_bytes;
  // A second dense buffer exists while a block leaves the first.
  int64_t needed = with_prompt(job) + spec_->dense_bytes(spec_->most_dense_tokens);
  for (const JobPtr& each : group) needed += with_prompt(*each);
  for (const JobPtr& each : active_) {
    needed += std::max<int64_t>(0, later(*each) - each->cache->memory().allocated);
  }
  if (long_job_ != nullptr) {  // its pages are held already
    needed += 2 * spec_->dense_bytes(spec_->most_dense_tokens);
  }
  return needed <= free_bytes;
}

// Those whose prompts fit a round together, and perhaps a longer one.
std::vector<std::shared_ptr<Job>> Scheduler::admit() {
  std::vector<JobPtr> group;
  if (runs_alone()) blocked_ = false;
  int64_t rows = 0;
  for (size_t i = 0; i < waiting_.size() && !blocked_;) {
    const JobPtr job = waiting_[i];
    if (job->loop->done()) {  // nothing to generate
      retire(*job);
      waiting_.erase(waiting_.begin() + static_cast<int64_t>(i));
      continue;
    }
    const bool is_long = job->n_prompt > options_.prefill_tokens;
    if (is_long && long_job_ != nullptr) {  // shorter ones behind it need not wait as well
      i++;
      continue;
    }
    if (n_running() + static_cast<int64_t>(group.size()) >= options_.max_batch) break;
    if (!is_long && rows + job->n_prompt > options_.prefill_tokens) break;
    if (!fits(*job, group)) {
      blocked_ = true;
      break;
    }
    waiting_.erase(waiting_.begin() + static_cast<int64_t>(i));
    if (!job->started) job->started = Job::Clock::now();
    job->paused = false;
    if (is_long) {
      start_long(job);
    } else {
      rows += job->n_prompt;
      group.push_back(job);
    }
  }
  return group;
}

// One forward call for all prompts of the group; where it fails, for each half.
void Scheduler::run_group(std::span<const JobPtr> group) {
  try {
    std::vector<PrefillPart> parts;
    for (const JobPtr& job : group) {
      job->cache.emplace(engine_.new_cache(spec_, job->most_tokens));
      parts.push_back({&*job->cache, {job->tokens.begin(), job->tokens.begin() + job->n_prompt}});
    }
    Prefill prefill(*engine_.llama, std::move(parts), *step_buffers_);
    while (prefill.step_rows()) pause_point();
    first_tokens(prefill, group);
    n_admitted_ -= static_cast<int64_t>(group.size());
    return;
  } catch (const Interrupt&) {
    throw;
  } catch (const OutOfMemory&) {
    for (const JobPtr& job : group) job->cache.reset();
    if (group.size() == 1) {
      n_admitted_--;
      if (runs_alone()) {
        fail(*group[0], std::current_exception());
      } else {
        pause(group[0]);
      }
      return;
    }
  } catch (...) {
    for (const JobPtr& job : group) job->cache.reset();
    if (group.size() == 1) {
      n_admitted_--;
      return fail(*group[0], std::current_exception());
    }
  }
  run_group(group.first(group.size() / 2));
  run_group(group.subspan(group.size() / 2));
}

void Scheduler::start_long(JobPtr job) {
  job->cache.emplace(engine_.new_cache(spec_, job->most_tokens));
  try {
    long_prefill_ = std::make_unique<Prefill>(
        *engine_.llama, *job->cache,
        std::vector<int32_t>(job->tokens.begin(), job->tokens.begin() + job->n_prompt),
        *long_buffers_);
    long_job_ = std::move(job);
  } catch (const OutOfMemory&) {
    job->cache.reset();
    if (runs_alone()) {
      fail(*job, std::current_exception());
    } else {
      pause(std::move(job));
    }
  } catch (...) {
    fail(*job, std::current_exception());
  }
}

// budget: rows x layers, a row's attention counted as what it costs beside the matrices.
void Scheduler::advance_long(double budget) {
  const double share = attention_share(engine_.config);
  try {
    for (double cost = 0; cost < budget;) {
      const auto rows = static_cast<double>(long_prefill_->next_rows());
      cost += rows * (1 + share * (static_cast<double>(long_prefill_->next_row()) + rows / 2));
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
    if (active_.empty()) return fail(*job, std::current_exception());
    pause(job);
  } catch (...) {
    fail(*long_job_, std::current_exception());
  }
}

void Scheduler::finish_long() {
  const JobPtr jobs[] = {long_job_};
  first_tokens(*long_prefill_, jobs);
  long_prefill_.reset();
  long_job_.reset();
}

// Takes a prefill that has run into the caches, and makes every job's next token.
void Scheduler::first_tokens(Prefill& prefill, std::span<const JobPtr> jobs) {
  const size_t n = jobs.size();
  const int64_t vocab = engine_.config.vocab_size;
  logits_.resize(n * vocab);
  std::vector<TopLogits> top(n);
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
    active_.push_back(jobs[i]);
    counts_.prompt_tokens += job.n_prompt;
    if (!job.first_token) job.first_token = Job::Clock::now();
    if (job.cache->length() < static_cast<int64_t>(job.tokens.size())) continue;  // resumed
    take_logits(job, &top[i],
                {logits_.data() + static_cast<int64_t>(i) * vocab, static_cast<size_t>(vocab)});
  }
}

// Chooses the next token of a job whose cache holds all others. row: all logits, where top is not
// regular.
void Scheduler::take_logits(Job& job, const TopLogits* top, std::span<const float> row) {
  try {
    TokenLoop& loop = *job.loop;
    const int64_t context = engine_.config.max_position_embeddings;
    std::string text;
    if (static_cast<int64_t>(job.tokens.size()) < context) {
      const int32_t token = top->regular ? loop.choose(*top) : loop.choose(row, job.tokens);
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
      return decode(active_);
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
      decode({&job, 1});
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

bool Scheduler::pause_youngest() {
  if (n_running() < 2) return false;
  const auto youngest =
      std::max_element(active_.begin(), active_.end(),
                       [](const JobPtr& a, const JobPtr& b) { return before(*a, *b); });
  if (long_job_ != nullptr && before(**youngest, *long_job_)) {
    long_prefill_.reset();
    pause(std::exchange(long_job_, nullptr));
    return true;
  }
  const JobPtr job = *youngest;
  active_.erase(youngest);
  pause(job);
  return true;
}

void Scheduler::pause(JobPtr job) {
  job->cache.reset();
  job->paused = true;
  blocked_ = true;
  add(std::move(job));
}

void Scheduler::emit(Job& job, std::string_view text) {
  if (!text.empty() && job.on_text) job.on_text(text);
}

void Scheduler::retire(Job& job) {
  GenerateResult& result = job.loop->result;
  result.stats.prompt_tokens = job.n_prompt;
  result.stats.generated_tokens = job.loop->made_tokens();
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

// What it held is free before anybody is told.
void Scheduler::end(Job& job, std::exception_ptr error) {
  if (&job == long_job_.get()) long_prefill_.reset();
  job.cache.reset();
  job.ended = true;
  blocked_ = false;
  job.on_text = nullptr;
  std::exchange(job.on_end, nullptr)(std::move(error));
}

}  // namespace mustafar
