// Continuous batching: sequences join and leave between decode steps; a prompt's prefill advances
// one layer per round, so that those already decoding go on meanwhile.
#include <algorithm>
#include <deque>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "mustafar/error.h"
#include "mustafar/model.h"
#include "runtime/model_impl.h"
#include "runtime/next_logits.h"
#include "runtime/prompt_ids.h"
#include "runtime/token_loop.h"

namespace mustafar {
namespace {

struct Sequence {
  size_t index = 0;             // of its prompt
  std::vector<int32_t> tokens;  // prompt, then what was made
  std::unique_ptr<TokenLoop> loop;
  int64_t most_tokens = 0;     // it can come to
  int64_t reserved_bytes = 0;  // of cache, at its longest
  std::optional<SequenceCache> cache;
  std::unique_ptr<Prefill> prefill;
  NextLogits next;  // the largest logits where those are enough, else all

  int32_t choose() {
    return next.whole() ? loop->choose(next.values(), tokens) : loop->choose(next.top());
  }
};

class Scheduler {
 public:
  // params: one for each prompt, or one for all.
  Scheduler(Model::Impl& engine, std::span<const Prompt> prompts,
            std::span<const SamplingParams> params, const KVConfig& kv, const BatchOptions& options)
      : engine_(engine),
        options_(options),
        spec_(engine.cache_spec(kv)),
        decode_buffers_(*engine.backend),
        prefill_buffers_(*engine.backend),
        results_(prompts.size()),
        free_bytes_(std::min(engine.budget->available(), engine.backend->available_bytes())) {
    for (size_t i = 0; i < prompts.size(); i++)
      waiting_.push_back(make_sequence(prompts[i], params[params.size() == 1 ? 0 : i], i));
  }

  std::vector<GenerateResult> run() {
    while (!waiting_.empty() || prefilling_ || !active_.empty()) {
      if (options_.interrupt_check) options_.interrupt_check();
      if (!prefilling_) admit();
      if (prefilling_) advance_prefill();
      decode_step();
    }
    return std::move(results_);
  }

 private:
  std::unique_ptr<Sequence> make_sequence(const Prompt& prompt, const SamplingParams& params,
                                          size_t index) {
    const Tokenizer* tokenizer = engine_.tokenizer ? &*engine_.tokenizer : nullptr;
    auto sequence = std::make_unique<Sequence>();
    sequence->index = index;
    sequence->tokens = prompt_ids(prompt, tokenizer, 0, options_.parse_special);
    const std::string name = "prompt " + std::to_string(index);
    const int64_t n = static_cast<int64_t>(sequence->tokens.size());
    const int64_t context = engine_.config.max_position_embeddings;
    if (n == 0) throw std::invalid_argument(name + " is empty");
    if (n > context) {
      throw ContextOverflow(name + " has " + std::to_string(n) +
                            " tokens, more than the model's context of " + std::to_string(context) +
                            engine_.config.why_context_ends());
    }
    check_token_ids(sequence->tokens, engine_.config.vocab_size, name + ": ");
    sequence->loop = std::make_unique<TokenLoop>(params, engine_.config, tokenizer);
    sequence->loop->start_after(sequence->tokens);
    sequence->most_tokens = std::min<int64_t>(n + params.max_new_tokens, context);
    sequence->reserved_bytes = SequenceCache::bytes_for(*spec_, n, sequence->most_tokens);
    return sequence;
  }

  // Starts the next prompt where the memory it may come to need is free.
  void admit() {
    if (waiting_.empty() || static_cast<int32_t>(active_.size()) >= options_.max_batch) return;
    Sequence& next = *waiting_.front();
    if (next.loop->done()) {  // nothing to generate
      retire(*waiting_.front());
      waiting_.pop_front();
      return;
    }
    if (reserved_bytes_ + next.reserved_bytes > free_bytes_) {
      if (!active_.empty()) return;
      throw OutOfMemory("prompt " + std::to_string(next.index) + " needs up to " +
                        std::to_string(next.reserved_bytes) + " bytes of KV cache, " +
                        std::to_string(free_bytes_) +
                        " are free: raise kv_budget, raise sparsity or lower max_new_tokens");
    }
    reserved_bytes_ += next.reserved_bytes;
    next.cache.emplace(engine_.new_cache(spec_, next.most_tokens));
    next.prefill =
        std::make_unique<Prefill>(*engine_.llama, *next.cache, next.tokens, prefill_buffers_);
    prefilling_ = std::move(waiting_.front());
    waiting_.pop_front();
  }

  void advance_prefill() {
    const auto between = [&](int64_t, int64_t) {
      if (options_.interrupt_check) options_.interrupt_check();
    };
    if (prefilling_->prefill->step(between)) return;
    const int64_t last = static_cast<int64_t>(prefilling_->tokens.size()) - 1;
    const int32_t needed = prefilling_->loop->top_needed();
    TopLogits top;
    if (NextLogits::top_suffices(*engine_.backend, needed)) {
      top = prefilling_->prefill->top_logits(last, needed);
    }
    NextLogits& next = prefilling_->next;
    if (top.regular) {
      next.set_top(std::move(top), nullptr);
    } else {
      prefilling_->prefill->logits(last, 1, next.room(engine_.config.vocab_size));
      next.set_from_room();
    }
    prefilling_->prefill->finish();
    prefilling_->prefill.reset();
    active_.push_back(std::move(prefilling_));
  }

  void decode_step() {
    for (auto& sequence : active_) {
      const bool full =
          static_cast<int64_t>(sequence->tokens.size()) >= engine_.config.max_position_embeddings;
      if (full) sequence->loop->finish(FinishReason::kContext);
    }
    retire_done();
    if (active_.empty()) return;

    const size_t n = active_.size(), vocab = engine_.config.vocab_size;
    std::vector<SequenceCache*> caches;
    std::vector<int32_t> ids;
    int32_t needed = 1;  // of the largest logits by any; 0: all
    for (auto& sequence : active_) {
      caches.push_back(&*sequence->cache);
      ids.push_back(sequence->choose());
      const int32_t next = sequence->loop->top_needed(/*ahead=*/1);
      needed = needed == 0 || next == 0 ? 0 : std::max(needed, next);
    }
    std::vector<TopLogits> top(n);
    bool whole = !NextLogits::top_suffices(*engine_.backend, needed);
    if (whole) {
      logits_.resize(n * vocab);
      engine_.llama->decode(caches, ids, logits_.data(), decode_buffers_);
    } else {
      engine_.llama->decode_top(caches, ids, needed, top, decode_buffers_);
      whole = std::any_of(top.begin(), top.end(), [](const TopLogits& t) { return !t.regular; });
      if (whole) {  // the sampler says what is wrong with them
        logits_.resize(n * vocab);
        engine_.backend->download(logits_.data(), decode_buffers_.logits(n * vocab),
                                  static_cast<int64_t>(n * vocab) * 4);
      }
    }
    for (size_t i = 0; i < n; i++) {
      Sequence& sequence = *active_[i];
      sequence.tokens.push_back(ids[i]);
      if (top[i].regular) {
        sequence.next.set_top(std::move(top[i]), nullptr);
      } else {
        sequence.next.set({logits_.data() + i * vocab, vocab});
      }
      sequence.loop->accept(ids[i]);
    }
    retire_done();
  }

  void retire_done() {
    for (auto& sequence : active_) {
      if (sequence->loop->done()) {
        retire(*sequence);
        reserved_bytes_ -= sequence->reserved_bytes;
        sequence.reset();
      }
    }
    std::erase(active_, nullptr);
  }

  void retire(Sequence& sequence) {
    GenerateResult& result = sequence.loop->result;
    const int64_t made = sequence.loop->made_tokens();
    result.stats.generated_tokens = made;
    result.stats.prompt_tokens = static_cast<int64_t>(sequence.tokens.size()) - made;
    results_[sequence.index] = std::move(result);
  }

  Model::Impl& engine_;
  const BatchOptions& options_;
  std::shared_ptr<const CacheSpec> spec_;
  ForwardBuffers decode_buffers_, prefill_buffers_;
  std::vector<GenerateResult> results_;
  const int64_t free_bytes_;
  int64_t reserved_bytes_ = 0;
  std::deque<std::unique_ptr<Sequence>> waiting_;
  std::unique_ptr<Sequence> prefilling_;
  std::vector<std::unique_ptr<Sequence>> active_;
  std::vector<float> logits_;
};

// engine: keeps the model while the call runs.
std::vector<GenerateResult> run_batch(const std::shared_ptr<Model::Impl>& engine,
                                      std::span<const Prompt> prompts,
                                      std::span<const SamplingParams> params, const KVConfig& kv,
                                      const BatchOptions& options) {
  if (options.max_batch < 1) {
    throw std::invalid_argument("max_batch is " + std::to_string(options.max_batch) +
                                ", must be at least 1");
  }
  return Scheduler(*engine, prompts, params, kv, options).run();
}

}  // namespace

std::vector<GenerateResult> Model::generate(std::span<const Prompt> prompts,
                                            const SamplingParams& params, const KVConfig& kv,
                                            const BatchOptions& options) const {
  const SamplingParams all[] = {params};
  return run_batch(impl(), prompts, all, kv, options);
}

std::vector<GenerateResult> Model::generate(std::span<const Prompt> prompts,
                                            std::span<const SamplingParams> params,
                                            const KVConfig& kv, const BatchOptions& options) const {
  if (params.size() != prompts.size()) {
    throw std::invalid_argument("params has " + std::to_string(params.size()) + " elements for " +
                                std::to_string(prompts.size()) + " prompts");
  }
  return run_batch(impl(), prompts, params, kv, options);
}

}  // namespace mustafar
