// Requests that share a model: they join and leave a running batch at any time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mustafar/kv_config.h"
#include "mustafar/model.h"
#include "mustafar/sampling.h"

namespace mustafar {

// Which beginnings of prompts an engine computes once. A prompt is computed in one call; where a
// request names prefixes, or begins with pinned ones, each is a call of its own: it is attended to
// dense by its own tokens, and as the cache keeps it by what follows.
enum class PrefixCache : uint8_t {
  kOff,    // none
  kExact,  // those after which a call ends: no bit of a result depends on what came before
  // Of any request that has run or runs, what it shares with the prompt, down to whole blocks: what
  // follows attends to it as the cache keeps it, so that results depend on what came before.
  kApproximate,
};

// What gives way where kv_budget is used up: prefixes, and then
enum class OnPressure : uint8_t {
  kPause,  // the youngest request: its cache is dropped, and made again later by the same calls
  // First the settings of the caches that decode: they are compressed again, at the next smaller
  // preset of "lossless", "balanced" and "small", for those that wait too. So more run at once, and
  // what a request gets depends on what else runs: GenerateStats::repruned says whether it did.
  kSparser,
};

struct EngineOptions {
  int32_t max_batch = 64;      // requests that hold a cache and decode together
  int32_t max_waiting = 1024;  // requests that may wait to begin; one more is refused
  // Tokens of prompts that are computed between two decode steps, about: what the streams that run
  // wait for at most, and what a long prompt advances by meanwhile.
  int32_t prefill_tokens = 512;
  PrefixCache prefix_cache = PrefixCache::kExact;
  // Bytes of caches kept for prompts that begin alike, at most; they count in kv_budget and make
  // room for requests. None: up to kv_budget, or 1 GiB where there is none.
  std::optional<int64_t> prefix_bytes = {};
  OnPressure on_pressure = OnPressure::kPause;
  // Host memory, beside kv_budget, where paused requests may keep their caches as they are, where
  // copying costs less than computing them again; what has no room there is computed again. Either
  // way nothing of a result changes.
  int64_t swap_bytes = 0;
};

// As Python and the server spell them; parse throws std::invalid_argument.
const char* name_of(PrefixCache mode);
PrefixCache parse_prefix_cache(const std::string& name);
const char* name_of(OnPressure mode);
OnPressure parse_on_pressure(const std::string& name);

struct RequestOptions {
  int32_t priority = 0;  // higher ones begin first, equal ones in the order they came
  std::optional<double> timeout_seconds = {};  // from submit to the end, waiting included
  bool parse_special = false;  // special tokens spelled in a text become those tokens
  bool own_text = false;       // the text made does not continue the prompt's, as a chat's reply
  // Tokens, each more than 0 and no more than the prompt's, after which a call of the prompt ends:
  // prefixes that other prompts have in common with it. The result is the one of a session with
  // the same calls of prefill, whether they are computed or kept.
  std::vector<int64_t> prefixes = {};
};

struct EngineStats {
  int64_t running = 0;    // requests that hold a cache
  int64_t waiting = 0;    // that have not begun
  int64_t paused = 0;     // that have begun, and gave their cache up to older ones
  int64_t repruned = 0;   // times that a cache was compressed again to make room (OnPressure)
  int64_t kv_bytes = 0;   // of all caches of the model, sessions' too
  int64_t finished = 0;   // since the engine was made, likewise below
  int64_t cancelled = 0;  // timeouts too
  int64_t failed = 0;
  int64_t generated_tokens = 0;
  int64_t prompt_tokens = 0;  // computed; those of a resumed request count again
  int64_t reused_tokens = 0;  // of prompts, kept from others and not computed
  int64_t prefixes = 0;       // states of caches that are kept now
  int64_t prefix_bytes = 0;   // what they hold, a part of kv_bytes
  int64_t swap_bytes = 0;     // of caches that paused requests keep beside kv_budget now
};

// A token that a request made, and where its text ends.
struct MadeToken {
  int32_t token_id = 0;
  size_t text_end = 0;                  // bytes of text that were certain with this token
  std::optional<TokenLogprob> logprob;  // where log-probabilities are asked for
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
  // The tokens made so far from an index on; does not wait. Of a stop text that the output ends
  // with they are a part, unlike the result's.
  std::vector<MadeToken> tokens_from(size_t index) const;
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
// gets what it would get alone, whatever else runs or ran before (but see PrefixCache and
// OnPressure): to the bit on the CPU, and on a GPU where it computes in f32; in f16 and bf16 up to
// the rounding of cuBLASLt, whose sums depend on how many rows it multiplies. A forked child has no
// such thread: there, requests and engine throw StateError.
class Engine {
 public:
  // Throws std::invalid_argument for options out of range, or as Session for the configuration.
  // With OnPressure::kSparser also where no preset is smaller than the configuration, and
  // DeviceError on a device that has no kernels for it; a basis is calibrated for preset "small" as
  // Profile::resolve("auto") does, unless the configuration's profile codes rows. Without a
  // tokenizer to calibrate with, that preset is left out.
  explicit Engine(const Model& model, const KVConfig& kv = {}, const EngineOptions& options = {});
  ~Engine();  // as close()
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  // Throws QueueFull, StateError once closed, and for what is wrong with the request itself:
  // std::invalid_argument, ContextOverflow, OutOfMemory for a prompt that kv_budget could not hold
  // while it is computed, even alone: the message says how many bytes that takes.
  Request submit(const Prompt& prompt, const SamplingParams& params = {},
                 const RequestOptions& options = {});
  // Makes these tokens a prefix of every request that begins with them and more; returns how many
  // they are. They are computed with the first such request, and go last where others need room.
  // Requests that were submitted before stay as they are. Throws std::invalid_argument,
  // ContextOverflow, TokenizerError, StateError.
  int64_t pin(const Prompt& prefix, bool parse_special = false);
  // Takes that back; false where they are not pinned.
  bool unpin(const Prompt& prefix, bool parse_special = false);
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
