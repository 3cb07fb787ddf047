#include "mustafar/engine.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "core/fork.h"
#include "core/held.h"
#include "mustafar/error.h"
#include "runtime/pressure_ladder.h"
#include "runtime/scheduler.h"

namespace mustafar {
namespace {

using Clock = Job::Clock;

// A time that the clock can tell, from now.
Clock::time_point later(double seconds) {
  constexpr double kLongest = 1e9;  // seconds
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(
                            std::chrono::duration<double>(std::min(seconds, kLongest)));
}

}  // namespace

const char* name_of(PrefixCache mode) {
  switch (mode) {
    case PrefixCache::kOff:
      return "off";
    case PrefixCache::kExact:
      return "exact";
    case PrefixCache::kApproximate:
      return "approximate";
  }
  return "";
}

PrefixCache parse_prefix_cache(const std::string& name) {
  for (const PrefixCache mode :
       {PrefixCache::kOff, PrefixCache::kExact, PrefixCache::kApproximate}) {
    if (name == name_of(mode)) return mode;
  }
  throw std::invalid_argument("prefix_cache is \"" + name +
                              "\", must be \"exact\", \"approximate\" or \"off\"");
}

const char* name_of(OnPressure mode) { return mode == OnPressure::kPause ? "pause" : "sparser"; }

OnPressure parse_on_pressure(const std::string& name) {
  for (const OnPressure mode : {OnPressure::kPause, OnPressure::kSparser}) {
    if (name == name_of(mode)) return mode;
  }
  throw std::invalid_argument("on_pressure is \"" + name + "\", must be \"pause\" or \"sparser\"");
}

// What a handle and the engine's thread share.
struct Request::State {
  const pid_t process = getpid();
  int64_t n_prompt = 0;
  std::shared_ptr<std::atomic<bool>> cancelled;  // the job's

  mutable std::mutex mutex;
  mutable std::condition_variable changed;
  std::string text;
  std::vector<MadeToken> tokens;
  bool done = false;
  std::exception_ptr error;
  GenerateResult result;
  std::function<void()> on_change;

  // The lock, where there can be anybody who gives it up.
  std::unique_lock<std::mutex> lock() const {
    if (process != getpid()) {
      throw StateError("the request's engine runs in the process that this one was forked from");
    }
    return std::unique_lock(mutex);
  }

  template <typename Ready>
  bool wait(std::unique_lock<std::mutex>& lock, std::optional<double> seconds, Ready ready) const {
    if (!seconds) {
      changed.wait(lock, ready);
      return true;
    }
    return changed.wait_until(lock, later(*seconds), ready);
  }

  // The change's last part: the callback runs without the lock.
  void tell(std::unique_lock<std::mutex> lock) {
    const std::function<void()> callback = on_change;
    lock.unlock();
    changed.notify_all();
    if (callback) callback();
  }

  // made: the result so far.
  void add_text(std::string_view piece, const GenerateResult& made) {
    std::unique_lock held(mutex);
    text += piece;
    for (size_t i = tokens.size(); i < made.token_ids.size(); i++) {
      tokens.push_back({.token_id = made.token_ids[i], .text_end = text.size(), .logprob = {}});
      if (i < made.logprobs.size()) tokens.back().logprob = made.logprobs[i];
    }
    if (!piece.empty()) tell(std::move(held));
  }

  void end(std::exception_ptr failed, GenerateResult&& made) {
    std::unique_lock held(mutex);
    error = std::move(failed);
    result = std::move(made);
    done = true;
    tell(std::move(held));
  }
};

void Request::cancel() {
  const State& state = held(state_, "request");
  state.lock();  // refuses a forked child
  *state.cancelled = true;
}

bool Request::done() const {
  const State& state = held(state_, "request");
  const auto lock = state.lock();
  return state.done;
}

int64_t Request::prompt_tokens() const { return held(state_, "request").n_prompt; }

std::string Request::text_from(size_t offset, std::optional<double> seconds) const {
  const State& state = held(state_, "request");
  auto lock = state.lock();
  state.wait(lock, seconds, [&] { return state.done || state.text.size() > offset; });
  return state.text.substr(std::min(offset, state.text.size()));
}

std::vector<MadeToken> Request::tokens_from(size_t index) const {
  const State& state = held(state_, "request");
  const auto lock = state.lock();
  const std::vector<MadeToken>& all = state.tokens;
  return {all.begin() + static_cast<int64_t>(std::min(index, all.size())), all.end()};
}

bool Request::wait(std::optional<double> seconds) const {
  const State& state = held(state_, "request");
  auto lock = state.lock();
  return state.wait(lock, seconds, [&] { return state.done; });
}

GenerateResult Request::result() const {
  wait();
  const State& state = *state_;
  const auto lock = state.lock();
  if (state.error != nullptr) std::rethrow_exception(state.error);
  return state.result;
}

void Request::set_on_change(std::function<void()> on_change) {
  State& state = held(state_, "request");
  auto lock = state.lock();
  state.on_change = std::move(on_change);
  if (state.done || !state.text.empty()) state.tell(std::move(lock));
}

struct Engine::Impl {
  const Model model;
  const std::shared_ptr<Model::Impl> engine;
  const KVConfig kv;
  const EngineOptions options;
  const pid_t process = getpid();
  Scheduler scheduler;  // the thread's, but for check_memory()

  mutable std::mutex mutex;
  std::condition_variable work;
  std::vector<std::shared_ptr<Job>> arrived;  // not yet in the scheduler
  std::vector<std::vector<int32_t>> pinned;
  std::vector<std::vector<int32_t>> unpinned;  // not yet told to the scheduler
  uint64_t n_submitted = 0;
  bool closing = false;
  EngineStats stats;  // as of the last part of a round

  std::mutex closing_mutex;  // who joins the thread
  bool orphaned = false;     // the handle was dropped by a callback: the thread's end is this one's
  std::thread thread;

  Impl(const Model& model, const KVConfig& kv, const EngineOptions& options)
      : model(model),
        engine(model.impl()),
        kv(kv),
        options(options),
        scheduler(
            *engine, kv,
            {.max_batch = options.max_batch,
             .prefill_tokens = options.prefill_tokens,
             .prefix_cache = options.prefix_cache,
             .prefix_bytes = options.prefix_bytes,
             .ladder = options.on_pressure == OnPressure::kSparser ? pressure_ladder(model, kv)
                                                                   : std::vector<KVConfig>(),
             .swap_bytes = options.swap_bytes,
             .between = [this] {
               std::lock_guard lock(mutex);
               update_stats();
             }}) {
    if (options.max_waiting < 1) {
      throw std::invalid_argument("max_waiting is " + std::to_string(options.max_waiting) +
                                  ", must be at least 1");
    }
    thread = std::thread([this] {
      run();
      if (orphaned) delete this;
    });
  }

  void check_process() const {
    if (process != getpid()) {
      throw StateError("the engine runs in the process that this one was forked from");
    }
  }

  bool on_own_thread() const { return thread.get_id() == std::this_thread::get_id(); }

  // The thread. Rounds while there is work; what arrives joins at the next.
  void run() noexcept {
    for (;;) {
      {
        std::unique_lock lock(mutex);
        update_stats();  // before it may sleep
        work.wait(lock, [&] {
          return closing || !arrived.empty() || !unpinned.empty() || !scheduler.idle();
        });
        for (const std::vector<int32_t>& ids : unpinned) scheduler.unpin(ids);
        unpinned.clear();
        for (std::shared_ptr<Job>& job : arrived) scheduler.add(std::move(job));
        arrived.clear();
        update_stats();
        if (closing) break;
      }
      try {
        scheduler.round();
      } catch (...) {
        scheduler.fail_all(std::current_exception());
      }
    }
    scheduler.end_all(FinishReason::kCancelled);
    scheduler.drop_prefixes();
    std::lock_guard lock(mutex);
    update_stats();
  }

  void update_stats() {
    const Scheduler::Counts& counts = scheduler.counts();
    stats.running = scheduler.n_running();
    stats.waiting = scheduler.n_waiting();
    stats.paused = scheduler.n_paused();
    stats.repruned = counts.repruned;
    stats.finished = counts.finished;
    stats.cancelled = counts.cancelled;
    stats.failed = counts.failed;
    stats.generated_tokens = counts.generated_tokens;
    stats.prompt_tokens = counts.prompt_tokens;
    stats.reused_tokens = counts.reused_tokens;
    stats.prefixes = scheduler.prefixes().size();
    stats.prefix_bytes = scheduler.prefixes().bytes();
    stats.swap_bytes = scheduler.swapped_bytes();
  }

  // Ids of a prefix, checked.
  std::vector<int32_t> prefix_ids(const Prompt& prefix, bool parse_special) const {
    SamplingParams params;
    params.max_new_tokens = 0;
    return make_job(*engine, prefix, params, parse_special, false, "the prefix")->tokens;
  }

  void close() {
    {
      std::lock_guard lock(mutex);
      closing = true;
    }
    work.notify_all();
    if (on_own_thread()) return;  // a callback's call: the round that it is in is the last
    std::lock_guard lock(closing_mutex);
    if (thread.joinable()) thread.join();
  }
};

Engine::Engine(const Model& model, const KVConfig& kv, const EngineOptions& options)
    : impl_(std::make_unique<Impl>(model, kv, options)) {}

Engine::~Engine() {
  if (impl_ == nullptr) return;
  if (impl_->process != getpid()) {
    // Its thread, and who held its locks, are elsewhere: nothing of it can be ended here.
    static_cast<void>(impl_.release());
    return;
  }
  impl_->close();
  if (impl_->on_own_thread()) {
    impl_->thread.detach();
    impl_.release()->orphaned = true;
  }
}

Engine::Engine(Engine&&) noexcept = default;

Engine& Engine::operator=(Engine&& other) noexcept {
  Engine old(std::move(*this));
  impl_ = std::move(other.impl_);
  return *this;
}

Request Engine::submit(const Prompt& prompt, const SamplingParams& params,
                       const RequestOptions& options) {
  Impl& impl = held(impl_, "engine");
  impl.check_process();
  if (options.timeout_seconds && !(*options.timeout_seconds > 0)) {
    throw std::invalid_argument("timeout is " + std::to_string(*options.timeout_seconds) +
                                " seconds, must be more than 0");
  }
  const std::shared_ptr<Job> job =
      make_job(*impl.engine, prompt, params, options.parse_special, options.own_text, "the prompt");
  for (const int64_t n : options.prefixes) {
    if (n < 1 || n > job->n_prompt) {
      throw std::invalid_argument("a prefix has " + std::to_string(n) +
                                  " tokens, must have at least 1 and at most the prompt's " +
                                  std::to_string(job->n_prompt));
    }
    job->end_call_at(n, /*pinned=*/false);
  }
  job->priority = options.priority;
  if (options.timeout_seconds) job->deadline = later(*options.timeout_seconds);
  const std::shared_ptr<Request::State> state(new Request::State, DeleteInOwnProcess());
  state->n_prompt = job->n_prompt;
  state->cancelled = job->cancelled;
  job->on_text = [state, loop = job->loop.get()](std::string_view text) {
    state->add_text(text, loop->result);
  };
  // Whoever sees the end finds it counted.
  job->on_end = [state, &impl, loop = job->loop.get()](std::exception_ptr error) {
    {
      std::lock_guard lock(impl.mutex);
      impl.update_stats();
    }
    state->end(std::move(error), std::move(loop->result));
  };
  {
    std::lock_guard lock(impl.mutex);
    if (impl.closing) throw StateError("the engine is closed");
    for (const std::vector<int32_t>& ids : impl.pinned) {
      const auto n = static_cast<int64_t>(ids.size());
      if (common_length(ids, job->prompt()) == n) job->end_call_at(n, /*pinned=*/true);
    }
    impl.scheduler.check_memory(*job);
    const int64_t waiting = impl.stats.waiting + static_cast<int64_t>(impl.arrived.size());
    if (waiting >= impl.options.max_waiting) {
      throw QueueFull(std::to_string(waiting) +
                      " requests wait already, as many as max_waiting = " +
                      std::to_string(impl.options.max_waiting) + " allows: try again later");
    }
    job->order = impl.n_submitted++;
    impl.arrived.push_back(job);
  }
  impl.work.notify_one();
  return Request(state);
}

int64_t Engine::pin(const Prompt& prefix, bool parse_special) {
  Impl& impl = held(impl_, "engine");
  impl.check_process();
  std::vector<int32_t> ids = impl.prefix_ids(prefix, parse_special);
  const auto n = static_cast<int64_t>(ids.size());
  std::lock_guard lock(impl.mutex);
  if (impl.closing) throw StateError("the engine is closed");
  if (std::find(impl.pinned.begin(), impl.pinned.end(), ids) == impl.pinned.end()) {
    impl.pinned.push_back(std::move(ids));
  }
  return n;
}

bool Engine::unpin(const Prompt& prefix, bool parse_special) {
  Impl& impl = held(impl_, "engine");
  impl.check_process();
  std::vector<int32_t> ids = impl.prefix_ids(prefix, parse_special);
  {
    std::lock_guard lock(impl.mutex);
    if (std::erase(impl.pinned, ids) == 0) return false;
    impl.unpinned.push_back(std::move(ids));
  }
  impl.work.notify_one();
  return true;
}

EngineStats Engine::stats() const {
  const Impl& impl = held(impl_, "engine");
  impl.check_process();
  std::lock_guard lock(impl.mutex);
  EngineStats stats = impl.stats;
  stats.waiting += static_cast<int64_t>(impl.arrived.size());
  stats.kv_bytes = impl.engine->budget->used();
  return stats;
}

void Engine::close() {
  Impl& impl = held(impl_, "engine");
  if (impl.process == getpid()) impl.close();
}

const Model& Engine::model() const { return held(impl_, "engine").model; }
const KVConfig& Engine::kv_config() const { return held(impl_, "engine").kv; }

}  // namespace mustafar
