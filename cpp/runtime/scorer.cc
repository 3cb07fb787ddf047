#include "runtime/scorer.h"

#include <algorithm>
#include <new>
#include <string>
#include <utility>

#include "mustafar/error.h"

namespace mustafar {
namespace {

// Rows that a call should have for matrix products to run at full speed.
constexpr int64_t kCallRows = 512;
// Bytes of logits at a time, so that a large vocabulary has few rows of them.
constexpr int64_t kLogitBytes = int64_t{64} << 20;

}  // namespace

LogProbTable::LogProbTable(std::span<const std::vector<int32_t>> sequences, int64_t vocab)
    : vocab_(vocab) {
  int64_t rows = 0;
  for (const auto& sequence : sequences) {
    first_.push_back(rows);
    rows += static_cast<int64_t>(sequence.size()) - 1;
  }
  try {
    values_ = std::make_unique_for_overwrite<float[]>(rows * vocab);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory("can't allocate " + std::to_string(bytes_for(rows, vocab)) +
                      " bytes for the log-probabilities of " + std::to_string(rows) +
                      " tokens: score fewer or shorter texts at a time");
  }
}

Scorer::Scorer(Model::Impl& engine, std::shared_ptr<const CacheSpec> spec)
    : engine_(engine), spec_(std::move(spec)), buffers_(*engine.backend) {}

// Query i sees compressed(i) tokens compressed, which steps at sinks + window + 64 k: calls that
// end there see just that, all their own rows dense.
int64_t Scorer::segment_end(int64_t first, int64_t tokens) const {
  const int64_t boundary =
      spec_->config.sink_tokens + spec_->config.window + spec_->compressed(first) + kBlockTokens;
  return std::min(tokens - 1, boundary);
}

void Scorer::admit(std::span<const std::vector<int32_t>> sequences, size_t& waiting,
                   std::vector<Active>& active) {
  const auto length = [&](size_t i) { return static_cast<int64_t>(sequences[i].size()); };
  int64_t rows = 0, reserved = 0;
  for (const Active& a : active) {
    rows += segment_end(a.next, length(a.index)) - a.next;
    reserved += std::max<int64_t>(0, a.reserved_bytes - a.cache.memory().allocated);
  }
  int64_t free_bytes = -1;  // asked for when needed
  while (waiting < sequences.size() && rows < kCallRows) {
    const int64_t n = length(waiting);
    const int64_t first = segment_end(0, n);
    const int64_t needed = SequenceCache::bytes_for(*spec_, first, n);
    if (!active.empty()) {
      if (free_bytes < 0) {
        free_bytes = std::min(engine_.budget->available(), engine_.backend->available_bytes());
      }
      if (reserved + needed > free_bytes) return;
    }
    active.push_back({waiting++, engine_.new_cache(spec_, n), 0, needed});
    reserved += needed;
    rows += first;
  }
}

void Scorer::visit_rows(Prefill& prefill, std::span<const Row> rows, const Visit& visit) {
  const int64_t vocab = engine_.config.vocab_size, n = static_cast<int64_t>(rows.size());
  const int64_t step = std::max<int64_t>(1, std::min(kCallRows, kLogitBytes / (vocab * 4)));
  for (int64_t first = 0; first < n; first += step) {
    const int64_t count = std::min(step, n - first);
    visit(rows.subspan(first, count), prefill.device_logits(first, count));
  }
}

void Scorer::run(std::span<const std::vector<int32_t>> sequences, const Visit& visit) {
  int64_t total = 0, done = 0;
  for (const auto& sequence : sequences) total += static_cast<int64_t>(sequence.size()) - 1;
  std::vector<Active> active;
  for (size_t waiting = 0; waiting < sequences.size() || !active.empty();) {
    admit(sequences, waiting, active);
    std::vector<PrefillPart> parts;
    std::vector<Row> rows;
    std::vector<int64_t> ends;
    for (Active& a : active) {
      const std::vector<int32_t>& ids = sequences[a.index];
      const int64_t end = segment_end(a.next, static_cast<int64_t>(ids.size()));
      parts.push_back({&a.cache, {ids.begin() + a.next, ids.begin() + end}});
      for (int64_t position = a.next; position < end; position++) {
        rows.push_back({a.index, position});
      }
      ends.push_back(end);
    }
    Prefill prefill(*engine_.llama, std::move(parts), buffers_);
    const auto tell = [&](int64_t part, int64_t all) {
      if (between) between(done + static_cast<int64_t>(rows.size()) * part / all, total);
    };
    while (prefill.step(tell)) {
    }
    visit_rows(prefill, rows, visit);
    prefill.finish();
    done += static_cast<int64_t>(rows.size());
    for (size_t i = 0; i < active.size(); i++) active[i].next = ends[i];
    std::erase_if(active, [&](const Active& a) {
      return a.next + 1 == static_cast<int64_t>(sequences[a.index].size());
    });
  }
  if (between) between(total, total);
}

std::vector<TokenScores> Scorer::score(std::span<const std::vector<int32_t>> sequences,
                                       LogProbTable* keep, const LogProbTable* reference) {
  std::vector<TokenScores> scores(sequences.size());
  std::vector<RowScore> wanted;
  run(sequences, [&](std::span<const Row> rows, const float* logits) {
    wanted.assign(rows.size(), {});
    for (size_t i = 0; i < rows.size(); i++) {
      const auto [sequence, position] = rows[i];
      wanted[i].target = sequences[sequence][position + 1];
      if (keep != nullptr) wanted[i].log_probs = keep->row(sequence, position);
      if (reference != nullptr) wanted[i].reference = reference->row(sequence, position);
    }
    engine_.backend->score_rows(logits, engine_.config.vocab_size, wanted, buffers_.workspace());
    for (size_t i = 0; i < rows.size(); i++) {
      TokenScores& out = scores[rows[i].sequence];
      out.log_probs.push_back(wanted[i].log_prob);
      out.top.push_back(wanted[i].top);
      if (reference != nullptr) out.divergence.push_back(wanted[i].divergence);
    }
  });
  return scores;
}

}  // namespace mustafar
