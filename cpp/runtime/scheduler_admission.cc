// Who may hold a cache, what it begins with, and who gives it up.
#include <algorithm>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "mustafar/error.h"
#include "runtime/scheduler.h"

namespace mustafar {
namespace {

// Tokens that a sequence is expected to grow by before others make room.
constexpr int64_t kAheadTokens = kBlockTokens;

int64_t later_tokens(const Job& job) {
  return std::min(static_cast<int64_t>(job.tokens.size()) + kAheadTokens, job.most_tokens);
}

}  // namespace

// A job that runs alone is admitted whatever it needs, and then takes just this.
int64_t Scheduler::least_bytes(const Job& job) const {
  if (job.loop->done()) return 0;  // no token is asked for: nothing is computed
  int32_t dense_capacity = 0;
  if (options_.prefix_cache == PrefixCache::kApproximate) {
    // All but the last token may be kept from others.
    return SequenceCache::call_bytes(*spec_, 0, job.n_prompt, dense_capacity) -
           spec_->fresh_bytes(job.n_prompt - 1);
  }
  // A beginning that is kept was computed by the same calls.
  int64_t least = 0, from = 0;
  for (const PromptCall& call : job.calls) {
    least = std::max(least, SequenceCache::call_bytes(*spec_, from, call.end, dense_capacity));
    from = call.end;
  }
  return least;
}

void Scheduler::check_memory(const Job& job) const {
  const int64_t limit = engine_.budget->limit();
  if (limit == 0) return;
  const int64_t least = least_bytes(job);
  if (least <= limit) return;
  throw OutOfMemory("a prompt of " + std::to_string(job.n_prompt) + " tokens needs " +
                    std::to_string(least) + " bytes of KV cache, more than kv_budget = " +
                    std::to_string(limit) + ": raise kv_budget, raise sparsity or shorten it");
}

// What is kept of a job's prompt: as much as its cache may begin with.
PrefixTree::Common Scheduler::find_prefix(const Job& job) {
  if (options_.prefix_cache == PrefixCache::kExact) {
    const SequenceCache* const same = prefixes_.find(job.prompt(), job.calls, job.long_rope);
    if (same == nullptr) return {};
    return {.cache = same, .n_tokens = same->length(), .usable = same->length()};
  }
  if (options_.prefix_cache == PrefixCache::kOff) return {};
  // The last token is computed, for its logits.
  const auto wanted = job.prompt().first(job.n_prompt - 1);
  PrefixTree::Common best = prefixes_.find_common(wanted, job.long_rope);
  for (const auto* jobs : {&active_, &begun_}) {
    for (const JobPtr& other : *jobs) {
      if (!other->cache || other->cache->long_rope() != job.long_rope || !at_own_setting(*other)) {
        continue;
      }
      const std::span<const int32_t> held(other->tokens.data(), other->cache->length());
      const int64_t n = common_length(wanted, held);
      const int64_t usable = usable_tokens(*other->cache, n);
      if (usable > best.usable) best = {.cache = &*other->cache, .n_tokens = n, .usable = usable};
    }
  }
  // Less than a block is no gain.
  return spec_->compressed(best.n_tokens) > 0 ? best : PrefixTree::Common{};
}

// Tokens of a job's prompt that it can begin with once `other`, whose prompt is being computed, has
// gone further; 0 where that leaves nothing for it.
int64_t Scheduler::will_leave(const Job& other, const Job& job) const {
  if (other.long_rope != job.long_rope) return 0;
  const auto prompt = job.prompt().first(job.n_prompt - 1);
  const int64_t common = common_length(prompt, other.prompt());
  if (options_.prefix_cache == PrefixCache::kApproximate) {
    const int64_t stored = spec_->compressed(common);
    // What its cache has dropped by then can't be begun with.
    const bool held = spec_->dropped_blocks(other.n_prompt) <= spec_->unseen_blocks(stored);
    return stored > 0 && held ? stored + spec_->config.sink_tokens : 0;
  }
  int64_t longest = 0;
  for (size_t i = 0; i + 1 < job.calls.size() && i < other.calls.size(); i++) {
    const int64_t end = job.calls[i].end;
    if (other.calls[i].end != end || end > common) break;
    if (end > other.cache->length() && kept_after(other, i)) longest = end;
  }
  return longest;
}

// Whether a job can begin with the cache and the logits that `other` has after the same prompt.
bool Scheduler::will_share_result(const Job& other, const Job& job) const {
  return options_.prefix_cache != PrefixCache::kOff && job.has_prompt_of(other) &&
         (engine_.backend->host_memory() || job.loop->top_needed() == other.loop->top_needed());
}

// Whether more of a job's prompt will be there to begin with than the `usable` tokens of now.
bool Scheduler::better_wait(const Job& job, int64_t usable,
                            const std::vector<JobPtr>& group) const {
  if (options_.prefix_cache == PrefixCache::kOff) return false;
  const auto helps = [&](const JobPtr& other) {
    if (other->ended) return false;
    if (will_share_result(*other, job)) return true;
    if (options_.prefix_cache == PrefixCache::kExact && job.calls.size() < 2) return false;
    const int64_t gain = will_leave(*other, job) - usable;
    if (gain <= 0 || options_.prefix_cache == PrefixCache::kExact) return gain > 0;
    // There the whole prompt must be through: that may be more work than it saves.
    return other->n_prompt - other->cache->length() <= 2 * gain;
  };
  return std::any_of(group.begin(), group.end(), helps) ||
         std::any_of(begun_.begin(), begun_.end(), helps) ||
         (long_job_ != nullptr && helps(long_job_));
}

// Bytes that a job's cache holds when it is a block longer; of a job without one, when it begins.
int64_t Scheduler::later_bytes(const Job& job) const {
  const CacheSpec& spec = job.cache  ? job.cache->spec()
                          : job.kept ? *rungs_[job.kept->rung()].spec
                                     : *spec_;
  return SequenceCache::held_bytes(spec, later_tokens(job));
}

int64_t Scheduler::growth(const Job& job) const {
  if (!job.cache) return 0;  // it has ended just now
  return std::max<int64_t>(0, later_bytes(job) - job.cache->memory().allocated);
}

// Beside what is held: by a job that has no cache yet, those of its group, and those that run.
int64_t Scheduler::needed_bytes(const Job& job, const std::vector<JobPtr>& group) {
  // Of the largest of the calls that are left.
  const auto fresh = [&](const Job& each, int64_t length) {
    int64_t most_rows = 0;
    for (size_t i = each.calls_done(length); i < each.calls.size(); i++) {
      most_rows = std::max(most_rows, each.calls[i].end - length);
      length = each.calls[i].end;
    }
    return spec_->fresh_bytes(most_rows);
  };
  const int64_t dense_bytes = spec_->dense_bytes(spec_->most_dense_tokens);
  PrefixTree::Common known;
  if (job.kept != nullptr) {
    known.usable = job.kept->length();
  } else {
    known = find_prefix(job);
  }
  const int64_t shared_pages =
      std::max<int64_t>(0, spec_->compressed(known.n_tokens) / kBlockTokens -
                               spec_->dropped_blocks(later_tokens(job)));
  // A second dense buffer exists while a block leaves the first.
  int64_t needed = later_bytes(job) - shared_pages * spec_->layout.page_bytes +
                   fresh(job, known.usable) + dense_bytes;
  for (const auto* jobs : {&group, &std::as_const(begun_)}) {
    for (const JobPtr& each : *jobs) {
      if (each->cache) needed += growth(*each) + fresh(*each, each->cache->length());
    }
  }
  for (const JobPtr& each : active_) needed += growth(*each);
  if (long_job_ != nullptr && long_prefill_ != nullptr) {
    // What its call takes is held already.
    const int64_t length = long_job_->cache->length();
    const int64_t end = length + long_job_->next_rows(length);
    needed += 2 * dense_bytes;
    if (end < long_job_->n_prompt) {
      needed +=
          later_bytes(*long_job_) - SequenceCache::held_bytes(*spec_, end) + fresh(*long_job_, end);
    }
  }
  return needed;
}

int64_t Scheduler::free_bytes() const {
  return std::min(engine_.budget->available(), engine_.backend->available_bytes()) +
         pool_->free_pages() * spec_->layout.page_bytes;
}

bool Scheduler::fits(const Job& job, const std::vector<JobPtr>& group, bool sparser) {
  for (;;) {
    const int64_t missing = needed_bytes(job, group) - free_bytes();
    if (missing <= 0) return true;
    // Prefixes and then caches that decode make room where they have enough of it together: nobody
    // loses bits for a job that has to wait all the same. To a job that is alone more will not
    // come.
    const int64_t most = prefixes_.bytes() + (sparser ? most_from_ladder() : 0);
    if (missing > most || !(prefixes_.drop_oldest() || (sparser && make_sparser(missing)))) {
      return runs_alone() && group.empty();
    }
  }
}

// Gives a job a cache, with as much of its prompt as is kept.
void Scheduler::begin(Job& job) {
  try {
    with_room([&] {
      const PrefixTree::Common known = find_prefix(job);
      if (known.cache == nullptr) {
        job.cache.emplace(engine_.new_cache(spec_, job.most_tokens));
      } else {
        job.cache.emplace(fork_beginning(*known.cache, known.n_tokens));
      }
    });
  } catch (const OutOfMemory&) {  // what a running sequence holds can't be copied
    job.cache.emplace(engine_.new_cache(spec_, job.most_tokens));
  }
  note_begun(job);
}

void Scheduler::note_begun(Job& job) {
  counts_.reused_tokens += job.cache->length();
  if (!job.started) {
    job.started = Job::Clock::now();
    job.reused_tokens = job.cache->length();
  }
  job.paused = false;
}

void Scheduler::resume(const JobPtr& job) {
  const std::unique_ptr<PausedCache> kept = std::move(job->kept);
  try {
    with_room([&] { job->cache.emplace(kept->restored(engine_, rungs_[kept->rung()].spec)); });
    job->paused = false;
  } catch (const OutOfMemory&) {  // pages come in larger pieces than was thought
    begin(*job);
  }
}

// Those that wait with the prompt that a job's cache holds now: they are past it, too.
std::vector<std::shared_ptr<Job>> Scheduler::begin_same_prompts(const Job& job) {
  std::vector<JobPtr> begun;
  for (size_t i = 0; i < waiting_.size() && !blocked_ && n_running() < options_.max_batch;) {
    const JobPtr other = waiting_[i];
    if (other->ended || other->loop->done() || other->kept != nullptr ||
        !will_share_result(job, *other) ||
        !fits(*other, {}, /*sparser=*/false)) {  // the job itself would not keep its setting
      i++;
      continue;
    }
    try {
      other->cache.emplace(job.cache->fork());
    } catch (const OutOfMemory&) {
      break;  // it will be computed for them
    }
    note_begun(*other);
    waiting_.erase(waiting_.begin() + static_cast<int64_t>(i));
    active_.push_back(other);
    begun.push_back(other);
  }
  return begun;
}

bool Scheduler::take_call(const JobPtr& job, int64_t& rows, std::vector<JobPtr>& group) {
  const int64_t n = job->next_rows(job->cache->length());
  if (n > options_.prefill_tokens) {
    if (long_job_ != nullptr) return false;
    start_long(job, group.empty());
    return true;
  }
  if (rows + n > options_.prefill_tokens) return false;
  rows += n;
  group.push_back(job);
  return true;
}

// Those whose next calls fit a round together, and perhaps a longer one.
std::vector<std::shared_ptr<Job>> Scheduler::admit() {
  std::vector<JobPtr> group;
  if (runs_alone()) blocked_ = false;
  int64_t rows = 0;
  for (const JobPtr& job : std::exchange(begun_, {})) {
    if (!take_call(job, rows, group)) begun_.push_back(job);
  }
  int64_t n_better_wait = 0;
  for (size_t i = 0; i < waiting_.size() && !blocked_;) {
    const JobPtr job = waiting_[i];
    const auto drop = [&] { std::erase(waiting_, job); };  // what makes room may pause others
    if (job->loop->done()) {                               // nothing to generate
      retire(*job);
      drop();
      continue;
    }
    if (n_running() + static_cast<int64_t>(group.size()) >= options_.max_batch) break;
    if (job->kept != nullptr) {
      if (!fits(*job, group, /*sparser=*/true)) {
        blocked_ = true;
        break;
      }
      drop();
      resume(job);
      if (job->cache->length() >= job->n_prompt) {
        active_.push_back(job);
      } else if (!take_call(job, rows, group)) {
        begun_.push_back(job);
      }
      continue;
    }
    const int64_t usable = find_prefix(*job).usable;
    if (better_wait(*job, usable, group)) {
      if (++n_better_wait >= options_.max_batch) break;
      i++;
      continue;
    }
    const int64_t n = job->next_rows(usable);
    const bool is_long = n > options_.prefill_tokens;
    if (is_long && long_job_ != nullptr) {  // shorter ones behind it need not wait as well
      i++;
      continue;
    }
    if (!is_long && rows + n > options_.prefill_tokens) break;
    if (!fits(*job, group, /*sparser=*/true)) {
      blocked_ = true;
      break;
    }
    drop();
    begin(*job);
    // Less may be left to begin with than there was.
    if (!take_call(job, rows, group)) begun_.push_back(job);
  }
  return group;
}

bool Scheduler::pause_youngest() {
  if (n_running() < 2) return false;
  JobPtr youngest;
  const auto consider = [&](const JobPtr& job) {
    if (job->ended) return;
    if (youngest == nullptr || before(*youngest, *job)) youngest = job;
  };
  for (const JobPtr& job : active_) consider(job);
  for (const JobPtr& job : begun_) consider(job);
  if (long_job_ != nullptr) consider(long_job_);
  if (youngest == long_job_) {
    long_prefill_.reset();
    long_job_.reset();
  }
  std::erase(active_, youngest);
  std::erase(begun_, youngest);
  pause(std::move(youngest));
  return true;
}

// Whether a job's cache is copied out and back in less time than its tokens are computed: a byte
// is taken to cost what a processor multiplies meanwhile, and a token what its matrices do. Tokens
// that a kept prefix holds cost nothing.
bool Scheduler::copying_costs_less(const Job& job) {
  constexpr double kProductsPerByte = 16;  // about: 10 GB/s beside 160 billion products
  const ModelConfig& c = engine_.config;
  const auto n_tokens = static_cast<double>(job.cache->length() - find_prefix(job).usable);
  return 2 * kProductsPerByte * static_cast<double>(PausedCache::bytes_of(*job.cache)) <
         n_tokens * layer_products(c) * c.n_layers;
}

void Scheduler::pause(JobPtr job) {
  if (job->cache && options_.swap_bytes > 0 &&
      PausedCache::bytes_of(*job->cache) <= options_.swap_bytes - swapped_bytes() &&
      copying_costs_less(*job)) {
    try {
      job->kept = std::make_unique<PausedCache>(*engine_.backend, *job->cache, rung_of(*job));
    } catch (const std::bad_alloc&) {  // then it is computed again
    }
  }
  job->cache.reset();
  job->paused = true;
  blocked_ = true;
  add(std::move(job));
}

}  // namespace mustafar
