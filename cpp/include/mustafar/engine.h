// Requests that share a model: they join and leave a running batch at any time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "mustafar/kv_config.h"
#include "mustafar/model.h"
#include "mustafar/sampling.h"

namespace mustafar {

struct EngineOptions {
  int32_t max_batch = 64;      // requests that hold a cache and decode together
  int32_t max_waiting = 1024;  // requests that may wait to begin; one more is refused
  // Tokens of prompts that are computed between two decode steps, about: what the streams that run
  // wait for at most, and what a long prompt advances by meanwhile.
  int32_t prefill_tokens = 512;
};

struct RequestOptions {
  int32_t priority = 0;  // higher ones begin first, equal ones in the order they came
  std::optional<double> timeout_seconds = {};  // from submit to the end, waiting included
  bool parse_special = false;  // special tokens spelled in a text become those tokens
  bool own_text = false;       // the text made does not continue the prompt's, as a chat's reply
};

struct EngineStats {
  int64_t running = 0;    // requests that hold a cache
  int64_t waiting = 0;    // that have not begun
  int64_t paused = 0;     // that have begun, and gave their cache up to older ones
  int64_t kv_bytes = 0;   // of all caches of the model, sessions' too
  int64_t finished = 0;   // since the engine was made, likewise below
  int64_t cancelled = 0;  // timeouts too
  int64_t failed = 0;
  int64_t generated_tokens = 0;
  int64_t prompt_tokens = 0;  // computed; those of a resumed request count again
};

// A handle of one request; copies are of the same one. Any thread may use it, also after the
// engine is gone.
class Request {
 public:
  // Asks it to end: soon it is done, with finish_reason kCancelled and the text made so far.
  void cancel();
  bool done() const;
  int64_t prompt_tokens() const;

  // The text made so far from a byte offset on, which must be an end of text that was handed out.
  // Waits up to `seconds` (none: without limit) until there is some, or no more will come (then
  // empty). Characters come whole.
  std::string text_from(size_t offset, std::optional<double> seconds = std::nullopt) const;
  // Waits for the end; false where the time is over before.
  bool wait(std::optional<double> seconds = std::nullopt) const;
  // Waits for the end; throws what the request failed with: what its logits processor threw,
  // OutOfMemory where it does not fit kv_budget even alone, StateError where a value is not finite.
  GenerateResult result() const;

  // Called, on the engine's thread and soon, when there is new text and at the end; and now, where
  // that has been already. Replaces an earlier one. Must not throw.
  void set_on_change(std::function<void()> on_change);

 private:
  friend class Engine;
  struct State;
  explicit Request(std::shared_ptr<State> state) : state_(std::move(state)) {}
  std::shared_ptr<State> state_;
};

// Runs requests on a thread of its own, beside any number of sessions of the model. Every request
// gets what it would get alone, whatever else runs. A forked child has no such thread: there,
// requests and engine throw StateError.
class Engine {
 public:
  // Throws std::invalid_argument for options out of range, or as Session for the configuration.
  explicit Engine(const Model& model, const KVConfig& kv = {}, const EngineOptions& options = {});
  ~Engine();  // as close()
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  // Throws QueueFull, StateError once closed, and for what is wrong with the request itself:
  // std::invalid_argument, ContextOverflow, OutOfMemory for a prompt that no room can be made for.
  Request submit(const Prompt& prompt, const SamplingParams& params = {},
                 const RequestOptions& options = {});
  EngineStats stats() const;
  // Ends all requests, as if each had been cancelled, and the thread.
  void close();

  const Model& model() const;
  const KVConfig& kv_config() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mustafar
