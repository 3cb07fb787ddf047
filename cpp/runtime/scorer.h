// Scoring of texts: what a cache setting makes of every next token. Many sequences pass through the
// model side by side, so that matrix products see hundreds of rows although a cache changes every
// 64 tokens.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "kv/sequence_cache.h"
#include "model/llama.h"
#include "runtime/model_impl.h"

namespace mustafar {

// What a sequence's tokens get, [tokens - 1] each. Natural logarithms.
struct TokenScores {
  std::vector<float> log_probs;    // of token i + 1 given those up to i
  std::vector<int32_t> top;        // the most probable token there
  std::vector<double> divergence;  // KL(reference || this); empty without a reference
};

// Log-probabilities of every position but the last of some sequences, over the whole vocabulary:
// f32, as Scorer::score() fills them in and reads them as a reference.
class LogProbTable {
 public:
  // Takes the memory; throws OutOfMemory.
  LogProbTable(std::span<const std::vector<int32_t>> sequences, int64_t vocab);
  float* row(size_t sequence, int64_t position) {
    return values_.get() + (first_[sequence] + position) * vocab_;
  }
  const float* row(size_t sequence, int64_t position) const {
    return values_.get() + (first_[sequence] + position) * vocab_;
  }
  static int64_t bytes_for(int64_t positions, int64_t vocab) { return 4 * positions * vocab; }

 private:
  std::vector<int64_t> first_;  // [sequences] row of position 0
  int64_t vocab_;
  std::unique_ptr<float[]> values_;
};

// Query i of a sequence sees just what decode would: the compressed(i) tokens that have left the
// window by then in compressed form, everything else dense. What a sequence gets does not depend on
// the sequences beside it.
class Scorer {
 public:
  Scorer(Model::Impl& engine, std::shared_ptr<const CacheSpec> spec);

  struct Row {
    size_t sequence = 0;
    int64_t position = 0;
  };
  // Hands the logits [rows.size()][vocab] of every position but the last of every sequence to
  // visit, a sequence's positions in order. logits: on the device, until visit returns. Sequences
  // have at least two tokens of the vocabulary. Throws OutOfMemory and what visit and between
  // throw.
  using Visit = std::function<void(std::span<const Row> rows, const float* logits)>;
  void run(std::span<const std::vector<int32_t>> sequences, const Visit& visit);

  // keep: where all log-probabilities go, or null; reference: those of another setting, or null.
  std::vector<TokenScores> score(std::span<const std::vector<int32_t>> sequences,
                                 LogProbTable* keep = nullptr,
                                 const LogProbTable* reference = nullptr);

  // Called now and then with positions done and in all; what it throws ends the work.
  std::function<void(int64_t done, int64_t total)> between;

  int64_t workspace_bytes() const { return buffers_.bytes(); }

 private:
  struct Active {
    size_t index = 0;  // of its sequence
    SequenceCache cache;
    int64_t next = 0;  // position
    int64_t reserved_bytes = 0;
  };

  // The end of the call that begins at position `first`: with it every query sees what it should.
  int64_t segment_end(int64_t first, int64_t tokens) const;
  // Lets sequences from `waiting` on in while calls are small and memory is there.
  void admit(std::span<const std::vector<int32_t>> sequences, size_t& waiting,
             std::vector<Active>& active);
  void visit_rows(Prefill& prefill, std::span<const Row> rows, const Visit& visit);

  Model::Impl& engine_;
  std::shared_ptr<const CacheSpec> spec_;
  ForwardBuffers buffers_;
};

}  // namespace mustafar
