// What a Session holds, for the library's own use.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "core/fork.h"
#include "kv/sequence_cache.h"
#include "model/llama.h"
#include "mustafar/session.h"
#include "runtime/model_impl.h"
#include "runtime/next_logits.h"
#include "runtime/ownership.h"
#include "runtime/scorer.h"

namespace mustafar {

struct Session::Impl {
  Model model;
  std::shared_ptr<Model::Impl> engine;
  KVConfig kv;
  std::shared_ptr<const CacheSpec> spec;
  int64_t max_tokens = 0;
  std::optional<SequenceCache> cache;  // none: closed
  std::unique_ptr<ForwardBuffers> buffers;
  int64_t counted_workspace = 0;  // of buffers, as reported to the engine
  std::vector<int32_t> tokens;
  MemoryUsage usage;  // of the cache, as it was when the tokens last changed
  // Held where tokens and usage change, and by those on other threads who look at them meanwhile.
  mutable ForkSafeMutex tokens_mutex;
  NextLogits next;  // a row that it says is on the device is in `buffers`

  Ownership ownership;
  std::function<void()> interrupt_check;
  std::function<void(int64_t, int64_t)> prefill_progress;  // of generations

  Impl(const Model& model, const KVConfig& kv, std::optional<int32_t> max_tokens);
  ~Impl();
  Impl(const Impl&) = delete;
  // One that is not destroyed where it is lost (Ownership).
  static std::shared_ptr<Impl> make(const Model& model, const KVConfig& kv,
                                    std::optional<int32_t> max_tokens);

  // A call: the session is in use while it lives. Throws StateError where the session is in use,
  // belongs to a generation that is not `owner`, or is closed.
  class Use {
   public:
    explicit Use(Impl& impl, const void* owner = nullptr) : impl_(impl) {
      Ownership::require(impl.ownership.enter(owner));
    }
    // For a call that has been entered.
    Use(Impl& impl, std::adopt_lock_t) : impl_(impl) {}
    ~Use() {
      impl_.publish_usage();
      impl_.ownership.leave();
    }
    Use(const Use&) = delete;

   private:
    Impl& impl_;
  };

  // Throws Cancelled where cancel() was called, or what the interrupt check throws.
  void check_interrupt();
  void check_tokens(std::span<const int32_t> token_ids) const;  // throws std::invalid_argument
  void check_room(int64_t n) const;                             // throws ContextOverflow
  // Changes of the tokens; the one that allocates comes before the others, which do not throw.
  void reserve_tokens(size_t n);  // for n more
  void append_tokens(std::span<const int32_t> token_ids);
  void cut_tokens(int64_t length);
  std::vector<int32_t> copy_tokens() const;  // from any thread
  void publish_usage();
  // The public calls of these names, inside a call that has begun.
  std::span<const float> prefill(std::span<const int32_t> token_ids,
                                 const std::function<void(int64_t, int64_t)>& progress);
  std::span<const float> decode(int32_t token_id);
  std::span<const float> logits();
  void save(const std::filesystem::path& file);
  // Takes the tokens and the cache of another session of the same model and configuration.
  void take_contents(Impl&& other);
  // Appends in one forward call; the caller has checked tokens and room. top_needed: how many of
  // the largest logits the next token needs; 0: all.
  void append(std::span<const int32_t> token_ids,
              const std::function<void(int64_t, int64_t)>& progress = {}, int32_t top_needed = 0);
  void append_decode(int32_t token_id, int32_t top_needed = 0);
  // After a call whose row of logits stays in `buffers` (top_alone), or was written to next.room().
  void set_next(bool top_alone, TopLogits top);
  int64_t vocab_size() const { return engine->config.vocab_size; }
  // Brings all logits after the last token to the host; computes them again where none are known.
  void ensure_logits();
  void rewind(int64_t position);
  // A scorer under this session's configuration. Checks the tokens first.
  Scorer scorer(std::span<const int32_t> token_ids);
  std::shared_ptr<Impl> fork() const;
  void count_workspace();
  void reset();
};

}  // namespace mustafar
