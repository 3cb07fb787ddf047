// Caches that are compressed again, smaller, so that more of them fit (OnPressure::kSparser).
#include <algorithm>
#include <cstdint>
#include <exception>
#include <iterator>
#include <map>
#include <utility>

#include "mustafar/error.h"
#include "runtime/scheduler.h"

namespace mustafar {

size_t Scheduler::rung_of(const Job& job) const {
  const auto at = std::find_if(rungs_.begin(), rungs_.end(), [&](const Rung& rung) {
    return rung.spec.get() == &job.cache->spec();
  });
  return static_cast<size_t>(at - rungs_.begin());
}

// What is short for all that decode to become a block longer, at least a byte: who makes room for
// one step makes it for some, rather than at every step anew.
int64_t Scheduler::missing_to_grow() const {
  int64_t needed = spec_->dense_bytes(spec_->most_dense_tokens);
  for (const JobPtr& job : active_) needed += growth(*job);
  return std::max<int64_t>(1, needed - free_bytes());
}

// Bytes that there would be if all that decode stood on the last rung and pages were let go one by
// one; an estimate, and rather too much.
int64_t Scheduler::most_from_ladder() const {
  if (rungs_.size() == 1) return 0;
  const int64_t last = rungs_.back().spec->layout.page_bytes;
  std::map<const uint8_t*, int64_t> saved;  // by page: several may share one
  for (const JobPtr& job : active_) {
    if (!job->cache) continue;
    for (const PageRef& page : job->cache->pages()) {
      saved[page.data()] = job->cache->spec().layout.page_bytes - last;
    }
  }
  int64_t bytes = 0;
  for (const auto& [page, more] : saved) bytes += more;
  return bytes;
}

// Takes caches that decode a rung down, so that about `missing` bytes become free; false where that
// frees nothing.
//
// Whom: those on the highest rung first, so that nobody is taken down twice before all were once;
// of these the youngest of the lowest priority first, as one of them would have been paused; and as
// many as it takes. How many that is only the pages' slabs tell: one goes back to the budget when
// nothing of it is used any more, and sequences that decode side by side have pages in the same
// slabs. So sets that grow by the next job are tried until one frees enough, or else the best of
// them is taken: choices of one prompt, whose shared pages are free when all have left, go
// together. Jobs whose prompt is being computed stay as they are: their call reads the pages, and
// what it leaves may be kept for others.
bool Scheduler::make_sparser(int64_t missing) {
  for (size_t rung = 0; rung + 1 < rungs_.size(); rung++) {
    std::vector<JobPtr> jobs;
    for (const JobPtr& job : active_) {
      if (job->cache && job->cache->compressed() > 0 && rung_of(*job) == rung) jobs.push_back(job);
    }
    std::sort(jobs.begin(), jobs.end(),
              [](const JobPtr& a, const JobPtr& b) { return before(*b, *a); });
    std::vector<SequenceCache*> caches;
    size_t n = 0;  // of them that free the most
    int64_t gain = 0;
    for (const JobPtr& job : jobs) {
      caches.push_back(&*job->cache);
      const int64_t of_all = SequenceCache::recode_gain(caches, *rungs_[rung + 1].pool);
      if (of_all <= gain) continue;
      gain = of_all;
      n = caches.size();
      if (gain >= missing) break;
    }
    if (n == 0) continue;
    step_down(std::span(jobs).first(n), rung + 1);
    return true;
  }
  return false;
}

void Scheduler::step_down(std::span<const JobPtr> jobs, size_t rung) {
  std::vector<SequenceCache*> caches;
  for (const JobPtr& job : jobs) caches.push_back(&*job->cache);
  const auto leave = [&](const JobPtr& job) { std::erase(active_, job); };
  try {
    SequenceCache::recode(caches, rungs_[rung].pool, rungs_[rung].spec);
    for (const JobPtr& job : jobs) job->repruned++;
    counts_.repruned += static_cast<int64_t>(jobs.size());
  } catch (const OutOfMemory&) {
    // Somebody else, a session say, took the room that the old pages left: they are computed again.
    for (const JobPtr& job : jobs) {
      leave(job);
      job->cache.reset();  // nothing of it can be kept
      pause(job);
    }
  } catch (...) {
    for (const JobPtr& job : jobs) {
      leave(job);
      fail(*job, std::current_exception());
    }
  }
}

}  // namespace mustafar
