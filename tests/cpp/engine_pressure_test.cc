// Caches that are compressed again where memory is short: bit for bit what plain code makes of the
// same rows, and nothing of one request in another.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "format/coded.h"
#include "format/pack.h"
#include "format/prune.h"
#include "mustafar/calibration.h"
#include "mustafar/engine.h"
#include "mustafar/error.h"
#include "mustafar/profile.h"
#include "mustafar/session.h"
#include "runtime/pressure_ladder.h"
#include "runtime/scheduler.h"
#include "support/random_model.h"
#include "support/sampling.h"

namespace mustafar {
namespace {

using testing::greedy;
using testing::ids_of;

using SpecPtr = std::shared_ptr<const CacheSpec>;

constexpr DType kTail = DType::kBF16;

Model small_model(int64_t kv_budget = 0) {
  return testing::random_model(testing::small_config({.head_dim = 32}), "cpu", 2, kTail, kv_budget);
}

std::shared_ptr<const Profile> calibrated() {
  static const auto profile = [] {
    const Prompt text = ids_of(500, 9);
    return std::make_shared<const Profile>(calibrate(small_model(), {&text, 1}));
  }();
  return profile;
}

// Settings of a small window, so that most tokens are in pages.
KVConfig setting(ValueType type, std::shared_ptr<const Profile> profile = nullptr,
                 double sparsity = 0) {
  KVConfig kv;
  kv.value_dtype = type;
  kv.profile = std::move(profile);
  kv.sparsity = sparsity;
  kv.window = 5;
  kv.sink_tokens = 3;
  return kv;
}

std::shared_ptr<const Profile> hadamard() {
  static const auto profile = Profile::hadamard(small_model().config());
  return profile;
}

// The setting of most tests: as stored in 16 bits, with a basis that codes rows.
KVConfig wide() { return setting(ValueType::kAuto, calibrated()); }

SequenceCache filled(Model::Impl& impl, const SpecPtr& spec, const std::vector<int32_t>& ids,
                     ForwardBuffers& buffers) {
  SequenceCache cache = impl.new_cache(spec, 600);
  Prefill prefill(*impl.llama, cache, ids, buffers);
  while (prefill.step_rows()) {
  }
  prefill.finish();
  return cache;
}

// ---- the change itself ----

// 64 rows of a slot, [64][head_dim].
std::vector<float> rows_of_slot(const CacheSpec& spec, const uint8_t* page, int32_t layer,
                                int32_t head, bool is_key) {
  const SlotLayout& layout = slot_of(spec.layout, layer, is_key);
  const uint8_t* slot = page + (is_key ? k_slot_offset(spec.layout, layer, head)
                                       : v_slot_offset(spec.layout, layer, head));
  std::vector<float> rows(size_t{kBlockTokens} * layout.head_dim);
  if (layout.dtype == DType::kCoded) {
    unpack_coded_slot(layout, code_table(*spec.codes, spec.layout, layer, head, is_key), slot,
                      rows.data());
  } else {
    unpack_slot(layout, slot, rows.data());
  }
  return rows;
}

// A row from the coordinates of one spec to those of another, by the profiles' own matrices:
// through the model's. Rows that are dealt to groups are in stored order.
std::vector<double> moved(const CacheSpec& from, const CacheSpec& to, const float* row,
                          int32_t matrix, bool is_key) {
  const int32_t d = from.head_dim;
  const auto groups = [&](const CacheSpec& spec) {
    return n_groups(is_key ? spec.layout.k : spec.layout.v);
  };
  const auto product = [&](const std::vector<double>& x, const std::vector<float>& m) {
    std::vector<double> out(d, 0.0);
    for (int32_t i = 0; i < d; i++) {
      for (int32_t j = 0; j < d; j++) out[j] += x[i] * m[(size_t(matrix) * d + i) * d + j];
    }
    return out;
  };
  std::vector<double> x(d);
  for (int32_t i = 0; i < d; i++) x[i] = row[stored_index(i, groups(from), d)];
  if (const auto& profile = from.config.profile; profile != to.config.profile) {
    if (profile) x = product(x, is_key ? profile->k_backward : profile->v_backward);
    if (const auto& other = to.config.profile) {
      x = product(x, is_key ? other->k_forward : other->v_forward);
    }
  }
  std::vector<double> out(d);
  for (int32_t i = 0; i < d; i++) out[stored_index(i, groups(to), d)] = x[i];
  return out;
}

// What plain code makes of rows in the coordinates of a spec. rows: [64][head_dim].
std::vector<uint8_t> packed(const CacheSpec& spec, const std::vector<float>& rows, int32_t layer,
                            int32_t head, bool is_key) {
  const SlotLayout& layout = slot_of(spec.layout, layer, is_key);
  std::vector<uint8_t> slot(layout.slot_bytes);
  if (layout.dtype == DType::kCoded) {
    const CodeTable table = code_table(*spec.codes, spec.layout, layer, head, is_key);
    EXPECT_LT(pack_coded_block(layout, table, rows.data(), slot.data()), 0);
    return slot;
  }
  std::vector<uint32_t> masks(size_t{kBlockTokens} * layout.mask_words);
  if (!layout.dense) {
    const float* weight = is_key ? spec.transform->k_weight : spec.transform->v_weight;
    if (weight != nullptr) weight += head_index(layer, spec.n_kv_heads, head) * layout.head_dim;
    for (int32_t t = 0; t < kBlockTokens; t++) {
      select_row(layout, rows.data() + t * layout.head_dim, weight,
                 masks.data() + t * layout.mask_words);
    }
  }
  EXPECT_LT(pack_block(layout, rows.data(), layout.dense ? nullptr : masks.data(), slot.data()), 0);
  return slot;
}

struct Change {
  const char* name;
  KVConfig from, to;
  bool same_basis;
};

std::vector<Change> changes() {
  using enum ValueType;
  const KVConfig dense = setting(kAuto), int8 = setting(kInt8), int4 = setting(kInt4, hadamard()),
                 coded = setting(kCoded, calibrated());
  const KVConfig pruned = setting(kInt8, nullptr, 0.5);
  const KVConfig in_a_basis = setting(kInt8, calibrated(), 0.5);
  return {
      {"dense_to_int8", dense, int8, true},
      {"int8_to_int4", int8, int4, false},
      {"int4_to_coded", int4, coded, false},
      {"dense_to_coded", setting(kAuto, calibrated()), coded, true},
      {"pruned_to_int4", pruned, int4, false},
      {"pruned_in_a_basis_to_coded", in_a_basis, coded, false},
      {"int8_to_pruned", int8, in_a_basis, false},
  };
}

class RecodeTest : public ::testing::TestWithParam<Change> {};

INSTANTIATE_TEST_SUITE_P(Settings, RecodeTest, ::testing::ValuesIn(changes()),
                         [](const auto& info) { return std::string(info.param.name); });

// The rows that a page held, in the other basis and rounded to the tail's type, compressed by the
// plain packers: the new page, byte for byte where the basis stays. Where it changes, sums may be
// ordered otherwise: then what both hold is the same but for a step of the code here and there.
TEST_P(RecodeTest, PagesAreWhatPlainCodeMakesOfTheSameRows) {
  const Change& change = GetParam();
  const Model model = small_model();
  Model::Impl& impl = *model.impl();
  const SpecPtr from = impl.cache_spec(change.from), to = impl.cache_spec(change.to);
  ForwardBuffers buffers(*impl.backend);
  SequenceCache cache = filled(impl, from, ids_of(300), buffers);
  const SequenceCache before = cache.fork();
  SequenceCache* const caches[] = {&cache};
  SequenceCache::recode(caches, impl.pool(to->layout.page_bytes), to);
  ASSERT_EQ(cache.pages().size(), before.pages().size());
  ASSERT_EQ(cache.pages().size(), 4u);
  EXPECT_EQ(cache.length(), 300);
  EXPECT_EQ(&cache.spec(), to.get());
  const int32_t d = from->head_dim;
  int64_t n_values = 0, n_differ = 0;
  for (size_t page = 0; page < cache.pages().size(); page++) {
    for (int32_t i = 0; i < from->n_layers * from->n_kv_heads * 2; i++) {
      const int32_t layer = i / 2 / from->n_kv_heads, head = i / 2 % from->n_kv_heads;
      const bool is_key = i % 2 == 0;
      const auto old_rows = rows_of_slot(*from, before.pages()[page].data(), layer, head, is_key);
      std::vector<float> rows(old_rows.size());
      for (int32_t t = 0; t < kBlockTokens; t++) {
        const auto row = moved(*from, *to, old_rows.data() + t * d, i / 2, is_key);
        for (int32_t j = 0; j < d; j++) {
          uint16_t stored[1];
          store_float(stored, kTail, 0, static_cast<float>(row[j]));
          rows[t * d + j] = load_float(stored, kTail, 0);
        }
      }
      const std::vector<uint8_t> expected = packed(*to, rows, layer, head, is_key);
      const uint8_t* slot =
          cache.pages()[page].data() + (is_key ? k_slot_offset(to->layout, layer, head)
                                               : v_slot_offset(to->layout, layer, head));
      if (change.same_basis) {
        ASSERT_TRUE(std::equal(expected.begin(), expected.end(), slot)) << "page " << page;
        continue;
      }
      std::vector<uint8_t> as_page(to->layout.page_bytes);
      std::copy(expected.begin(), expected.end(),
                as_page.begin() + (slot - cache.pages()[page].data()));
      const auto wanted = rows_of_slot(*to, as_page.data(), layer, head, is_key);
      const auto made = rows_of_slot(*to, cache.pages()[page].data(), layer, head, is_key);
      for (size_t j = 0; j < made.size(); j++) {
        if (std::fabs(rows[j]) < 1e-5f) continue;  // pruned: coded to either side of nothing
        n_values++;
        n_differ += std::fabs(made[j] - wanted[j]) > 1e-2f * std::fabs(wanted[j]) ? 1 : 0;
      }
    }
  }
  EXPECT_EQ(n_values > 0, !change.same_basis);
  EXPECT_LE(n_differ, n_values / 200) << "of " << n_values;
  // Dense rows, likewise.
  const std::vector<uint8_t> old_dense = before.download_dense(), dense = cache.download_dense();
  ASSERT_EQ(old_dense.size(), dense.size());
  if (change.same_basis) {
    EXPECT_EQ(old_dense, dense);
  }
  const int64_t n_dense = before.length() - before.compressed();
  ASSERT_GT(n_dense, 0);
  double error = 0, energy = 0;
  for (int32_t i = 0; i < from->n_layers * 2 * from->n_kv_heads; i++) {
    const bool is_key = i / from->n_kv_heads % 2 == 0;
    const int32_t matrix = i / from->n_kv_heads / 2 * from->n_kv_heads + i % from->n_kv_heads;
    for (int64_t t = 0; t < n_dense; t++) {
      const int64_t at = (int64_t{i} * from->most_dense_tokens + t) * d;
      std::vector<float> row(d);
      for (int32_t j = 0; j < d; j++) row[j] = load_float(old_dense.data(), kTail, at + j);
      const auto wanted = moved(*from, *to, row.data(), matrix, is_key);
      for (int32_t j = 0; j < d; j++) {
        const double made = load_float(dense.data(), kTail, at + j);
        error += (made - wanted[j]) * (made - wanted[j]);
        energy += wanted[j] * wanted[j];
      }
    }
  }
  EXPECT_LE(error, 1e-5 * energy) << "more than a rounding";
}

TEST(RecodeTest, SharedPagesStaySharedAndWhatOthersHoldIsTheirs) {
  const Model model = small_model();
  Model::Impl& impl = *model.impl();
  const SpecPtr from = impl.cache_spec(setting(ValueType::kAuto));
  const SpecPtr to = impl.cache_spec(setting(ValueType::kInt8));
  ForwardBuffers buffers(*impl.backend);
  {
    SequenceCache one = filled(impl, from, ids_of(300), buffers);
    SequenceCache two = one.fork();
    const SequenceCache other = one.fork();
    const std::vector<uint8_t> page(other.pages()[0].data(),
                                    other.pages()[0].data() + from->layout.page_bytes);
    SequenceCache* const caches[] = {&one, &two};
    const auto pool = impl.pool(to->layout.page_bytes);
    EXPECT_LT(SequenceCache::recode_gain(caches, *pool), 0) << "the third keeps the old pages";
    SequenceCache::recode(caches, pool, to);
    std::set<const uint8_t*> distinct;
    for (size_t i = 0; i < one.pages().size(); i++) {
      EXPECT_EQ(one.pages()[i].data(), two.pages()[i].data());
      EXPECT_NE(one.pages()[i].data(), other.pages()[i].data());
      distinct.insert(one.pages()[i].data());
    }
    EXPECT_EQ(distinct.size(), one.pages().size());
    EXPECT_TRUE(std::equal(page.begin(), page.end(), other.pages()[0].data()));
    EXPECT_EQ(&other.spec(), from.get());
  }
  EXPECT_EQ(impl.budget->used(), 0);
}

TEST(RecodeTest, AFullBudgetIsEnoughUnlessOthersHoldTheOldPages) {
  for (const bool shared : {false, true}) {
    const Model model = small_model(1 << 20);
    Model::Impl& impl = *model.impl();
    const SpecPtr from = impl.cache_spec(setting(ValueType::kAuto));
    const SpecPtr to = impl.cache_spec(setting(ValueType::kInt8));
    ForwardBuffers buffers(*impl.backend);
    {
      SequenceCache cache = filled(impl, from, ids_of(560), buffers);
      std::optional<SequenceCache> fork;
      if (shared) fork = cache.fork();
      const KVMemory rest(*impl.backend, impl.budget, impl.budget->available());
      ASSERT_EQ(impl.budget->available(), 0);
      const int64_t before = impl.budget->used();
      SequenceCache* const caches[] = {&cache};
      const auto pool = impl.pool(to->layout.page_bytes);
      const int64_t gain = SequenceCache::recode_gain(caches, *pool);
      if (shared) {
        EXPECT_LT(gain, 0);
        EXPECT_THROW(SequenceCache::recode(caches, pool, to), OutOfMemory);
      } else {
        EXPECT_GT(gain, 0);
        SequenceCache::recode(caches, pool, to);
        EXPECT_GE(before - impl.budget->used(), gain) << "less was given back than promised";
      }
      EXPECT_LE(impl.budget->peak(), 1 << 20);
    }
    EXPECT_EQ(impl.budget->used(), 0);
  }
}

// ---- under a scheduler ----

// When a job's cache went a rung down: how many tokens it held.
using Events = std::vector<int64_t>;

struct Course {
  std::vector<std::shared_ptr<Job>> jobs;
  std::vector<Events> events;
  std::vector<bool> paused;  // ever
  int64_t most_running = 0;
  Scheduler::Counts counts;
};

std::shared_ptr<Job> job_of(Model::Impl& impl, const std::vector<int32_t>& ids, int32_t n,
                            uint64_t order) {
  auto job = make_job(impl, ids, greedy(n), false, false, "it");
  job->order = order;
  job->on_end = [](std::exception_ptr error) { EXPECT_EQ(error, nullptr); };
  return job;
}

// after: what else is looked at after every round.
Course run(Model::Impl& impl, Scheduler& scheduler, std::vector<std::shared_ptr<Job>> jobs,
           const std::function<void(const Course&)>& after = {}) {
  Course run;
  run.jobs = std::move(jobs);
  run.events.resize(run.jobs.size());
  run.paused.resize(run.jobs.size());
  for (const auto& job : run.jobs) scheduler.add(job);
  std::vector<int64_t> seen(run.jobs.size());
  while (!scheduler.idle()) {
    scheduler.round();
    run.most_running = std::max(run.most_running, scheduler.n_running());
    for (size_t i = 0; i < run.jobs.size(); i++) {
      const Job& job = *run.jobs[i];
      run.paused[i] = run.paused[i] || job.paused;
      // A round ends with a decode step, which appends a token and then makes another.
      for (; seen[i] < job.repruned; seen[i]++) {
        run.events[i].push_back(static_cast<int64_t>(job.tokens.size()) - 2);
      }
    }
    if (after) after(run);
  }
  run.counts = scheduler.counts();
  EXPECT_LE(impl.budget->peak(), impl.budget->limit());
  return run;
}

std::vector<int32_t> made_by(const Job& job) {
  return {job.tokens.begin() + job.n_prompt, job.tokens.end()};
}

// The likeliest tokens of a lone sequence whose cache goes down the ladder at these lengths.
std::vector<int32_t> alone(Model::Impl& impl, const std::vector<KVConfig>& settings,
                           const std::vector<int32_t>& ids, int64_t n, const Events& events) {
  std::vector<SpecPtr> specs;
  for (const KVConfig& kv : settings) specs.push_back(impl.cache_spec(kv));
  ForwardBuffers buffers(*impl.backend);
  std::vector<float> logits(impl.config.vocab_size);
  SequenceCache cache = impl.new_cache(specs[0], 600);
  {
    Prefill prefill(*impl.llama, cache, ids, buffers);
    while (prefill.step_rows()) {
    }
    prefill.last_logits(logits.data());
    prefill.finish();
  }
  std::vector<int32_t> made;
  size_t rung = 0;
  SequenceCache* const caches[] = {&cache};
  for (;;) {
    const auto top = std::max_element(logits.begin(), logits.end()) - logits.begin();
    made.push_back(static_cast<int32_t>(top));
    if (static_cast<int64_t>(made.size()) == n) return made;
    while (rung < events.size() && events[rung] == cache.length()) {
      rung++;
      SequenceCache::recode(caches, impl.pool(specs[rung]->layout.page_bytes), specs[rung]);
    }
    impl.llama->decode(caches, {&made.back(), 1}, logits.data(), buffers);
  }
}

int64_t held_bytes(const KVConfig& kv, int64_t n) {
  return SequenceCache::held_bytes(*small_model().impl()->cache_spec(kv), n);
}

struct Traffic {
  std::vector<std::vector<int32_t>> prompts;
  std::vector<int32_t> n_new;

  // shortest: of the prompts; longest: with what is made, the most tokens.
  explicit Traffic(int64_t shortest = 150, int64_t longest = 480) {
    for (int i = 0; i < 7; i++) {
      prompts.push_back(ids_of(shortest + 11 * i, i));
      n_new.push_back(static_cast<int32_t>(longest - shortest - 66 - 10 * (i % 3)));
    }
  }
  std::vector<std::shared_ptr<Job>> jobs(Model::Impl& impl) const {
    std::vector<std::shared_ptr<Job>> made;
    for (size_t i = 0; i < prompts.size(); i++) {
      made.push_back(job_of(impl, prompts[i], n_new[i], i));
    }
    return made;
  }
  int64_t prompt_tokens() const {
    int64_t n = 0;
    for (const auto& ids : prompts) n += static_cast<int64_t>(ids.size());
    return n;
  }
};

std::vector<KVConfig> ladder_of(const KVConfig& kv) { return pressure_ladder(small_model(), kv); }

std::vector<KVConfig> settings_of(const KVConfig& kv) {
  std::vector<KVConfig> settings = {kv};
  for (const KVConfig& rung : ladder_of(kv)) settings.push_back(rung);
  return settings;
}

// Room for some of seven at the widest setting: all run at once, nobody is paused, and each gets
// every token that a lone sequence gets whose cache is compressed again at the same lengths.
TEST(PressureTest, MoreRunAtOnceAndNothingIsMixed) {
  const Traffic traffic;
  const Model free = small_model();
  int64_t repruned = 0, untouched = 0, three_times = 0, n_more = 0;
  for (const double room : {5.5, 3.0}) {
    SCOPED_TRACE("room for " + std::to_string(room));
    const auto budget = static_cast<int64_t>(static_cast<double>(held_bytes(wide(), 480)) * room);
    int64_t most_that_pause = 0;
    {
      const Model model = small_model(budget);
      Scheduler scheduler(*model.impl(), wide(), {});
      const Course paused = run(*model.impl(), scheduler, traffic.jobs(*model.impl()));
      EXPECT_EQ(paused.counts.repruned, 0);
      EXPECT_GT(paused.counts.prompt_tokens + (7 - paused.most_running), traffic.prompt_tokens())
          << "there was room for all";
      most_that_pause = paused.most_running;
    }
    const Model model = small_model(budget);
    Model::Impl& impl = *model.impl();
    {
      Scheduler scheduler(impl, wide(), {.ladder = ladder_of(wide())});
      const Course sparser = run(impl, scheduler, traffic.jobs(impl));
      EXPECT_GE(sparser.most_running, most_that_pause);
      n_more += sparser.most_running - most_that_pause;
      EXPECT_EQ(sparser.counts.finished, 7);
      EXPECT_EQ(sparser.counts.failed, 0);
      EXPECT_EQ(sparser.counts.prompt_tokens, traffic.prompt_tokens()) << "somebody was paused";
      int64_t in_all = 0;
      for (size_t i = 0; i < sparser.jobs.size(); i++) {
        const Job& job = *sparser.jobs[i];
        SCOPED_TRACE("request " + std::to_string(i));
        EXPECT_FALSE(sparser.paused[i]);
        EXPECT_EQ(job.loop->result.stats.repruned, static_cast<int64_t>(sparser.events[i].size()));
        in_all += job.repruned;
        untouched += job.repruned == 0 ? 1 : 0;
        three_times += job.repruned == 3 ? 1 : 0;
        EXPECT_EQ(made_by(job), alone(*free.impl(), settings_of(wide()), traffic.prompts[i],
                                      traffic.n_new[i], sparser.events[i]));
      }
      EXPECT_EQ(in_all, sparser.counts.repruned);
      repruned += in_all;
    }
    EXPECT_EQ(impl.budget->used(), 0);
  }
  EXPECT_GT(n_more, 0);
  EXPECT_GT(repruned, 0);
  EXPECT_GT(untouched, 0) << "nobody is left to say that bits stay";
  EXPECT_GT(three_times, 0) << "nobody came to the last rung";
}

// The other way round, so that the comparison above can fail: a lone sequence whose cache is left
// alone makes other tokens than one that was compressed again.
TEST(PressureTest, CompressingAgainIsSeen) {
  const Model free = small_model();
  const auto settings = settings_of(wide());
  const std::vector<int32_t> ids = ids_of(200, 3);
  const auto as_is = alone(*free.impl(), settings, ids, 200, {});
  EXPECT_NE(alone(*free.impl(), settings, ids, 200, {200, 200, 200}), as_is);
}

// Little room: those that stand on the last rung are paused, as without a ladder, and not before.
TEST(PressureTest, TheYoungestIsPausedOnceAllAreOnTheLastRung) {
  const Traffic traffic(10, 590);
  const auto settings = settings_of(wide());
  // Less than the longest takes as it is, and than three take at their smallest while a block
  // leaves the window.
  const int64_t budget = held_bytes(settings.back(), 490) * 3;
  ASSERT_LT(budget, held_bytes(wide(), 590));
  const Model model = small_model(budget);
  Model::Impl& impl = *model.impl();
  {
    Scheduler scheduler(impl, wide(), {.ladder = ladder_of(wide())});
    int64_t n_paused = 0, n_looked = 0;
    const int64_t smallest = impl.cache_spec(settings.back())->layout.page_bytes;
    const Course made = run(impl, scheduler, traffic.jobs(impl), [&](const Course& so_far) {
      const int64_t now = scheduler.n_paused();
      if (now > n_paused) {
        for (const auto& job : so_far.jobs) {
          if (!job->cache || job->cache->compressed() == 0) continue;
          EXPECT_EQ(job->cache->spec().layout.page_bytes, smallest);
          n_looked++;
        }
      }
      n_paused = now;
    });
    EXPECT_GT(n_looked, 0) << "nobody was paused beside one that ran on";
    EXPECT_EQ(made.counts.finished, 7);
    EXPECT_GT(made.counts.prompt_tokens, traffic.prompt_tokens());
    // The first is never paused, and its end is nobody else's doing.
    const Model free = small_model();
    EXPECT_FALSE(made.paused[0]);
    EXPECT_EQ(made_by(*made.jobs[0]),
              alone(*free.impl(), settings, traffic.prompts[0], traffic.n_new[0], made.events[0]));
  }
  EXPECT_EQ(impl.budget->used(), 0);
}

TEST(PressureTest, CancelledInTheMiddleNothingIsLeft) {
  const Traffic traffic;
  const Model model = small_model(held_bytes(wide(), 480) * 3);
  Model::Impl& impl = *model.impl();
  const Model free = small_model();
  {
    Scheduler scheduler(impl, wide(), {.ladder = ladder_of(wide())});
    int64_t cancelled = 0;
    const Course made = run(impl, scheduler, traffic.jobs(impl), [&](const Course& so_far) {
      // Every other one, soon after its cache was compressed again.
      for (size_t i = 0; i < so_far.jobs.size(); i += 2) {
        const Job& job = *so_far.jobs[i];
        if (job.ended || job.repruned == 0 || *job.cancelled) continue;
        *job.cancelled = true;
        cancelled++;
      }
    });
    EXPECT_GT(cancelled, 0);
    EXPECT_EQ(made.counts.cancelled, cancelled);
    EXPECT_EQ(made.counts.finished + made.counts.cancelled, 7);
    for (size_t i = 0; i < made.jobs.size(); i++) {
      if (made.paused[i]) continue;
      const std::vector<int32_t> tokens = made_by(*made.jobs[i]);
      ASSERT_FALSE(tokens.empty());
      EXPECT_EQ(tokens, alone(*free.impl(), settings_of(wide()), traffic.prompts[i],
                              static_cast<int64_t>(tokens.size()), made.events[i]))
          << "request " << i;
    }
  }
  EXPECT_EQ(impl.budget->used(), 0);
}

// Choices of one prompt share its pages, which are compressed once for all of them.
TEST(PressureTest, OnePromptsChoicesGoOnSharingIt) {
  const std::vector<int32_t> ids = ids_of(330, 5);
  const Model model = small_model(held_bytes(wide(), 330) * 4);
  Model::Impl& impl = *model.impl();
  const Model free = small_model();
  {
    Scheduler scheduler(impl, wide(), {.ladder = ladder_of(wide())});
    std::vector<std::shared_ptr<Job>> jobs;
    for (int i = 0; i < 4; i++) jobs.push_back(job_of(impl, ids, 260, i));
    int64_t side_by_side = 0;
    const Course made = run(impl, scheduler, jobs, [&](const Course& so_far) {
      std::map<const CacheSpec*, std::set<const uint8_t*>> first;
      int64_t looked = 0;
      for (const auto& job : so_far.jobs) {
        if (!job->cache || job->repruned == 0 || job->cache->compressed() == 0) continue;
        first[&job->cache->spec()].insert(job->cache->pages()[0].data());
        looked++;
      }
      side_by_side += looked >= 2 ? 1 : 0;
      for (const auto& [spec, pages] : first) EXPECT_LE(pages.size(), 1u);
    });
    EXPECT_GT(side_by_side, 0) << "no two were compressed again";
    EXPECT_EQ(made.counts.prompt_tokens, 330);
    EXPECT_EQ(made.counts.finished, 4);
    for (size_t i = 0; i < made.jobs.size(); i++) {
      if (made.paused[i]) continue;
      EXPECT_EQ(made_by(*made.jobs[i]),
                alone(*free.impl(), settings_of(wide()), ids, 260, made.events[i]));
    }
  }
  EXPECT_EQ(impl.budget->used(), 0);
}

// What is kept for prompts to come never went down the ladder.
TEST(PressureTest, PrefixesKeepTheEnginesOwnSetting) {
  for (const PrefixCache mode : {PrefixCache::kExact, PrefixCache::kApproximate}) {
    SCOPED_TRACE(name_of(mode));
    const Model model = small_model(held_bytes(wide(), 480) * 3);
    Model::Impl& impl = *model.impl();
    const Model free = small_model();
    Scheduler scheduler(impl, wide(), {.prefix_cache = mode, .ladder = ladder_of(wide())});
    const Traffic traffic;
    std::vector<std::shared_ptr<Job>> jobs = traffic.jobs(impl);
    for (const auto& job : jobs) job->end_call_at(130, /*pinned=*/false);
    const Course made = run(impl, scheduler, jobs);
    EXPECT_GT(made.counts.repruned, 0);
    // Again, one at a time and with room: as a session of the own setting makes them.
    for (size_t i = 0; i < traffic.prompts.size(); i++) {
      auto job = job_of(impl, traffic.prompts[i], 30, 100 + i);
      job->end_call_at(130, /*pinned=*/false);
      scheduler.add(job);
      while (!scheduler.idle()) scheduler.round();
      EXPECT_EQ(job->repruned, 0);
      if (mode == PrefixCache::kApproximate) {
        // Kept is what ended as it began; the rest is computed.
        if (made.jobs[i]->repruned > 0) {
          EXPECT_LE(job->reused_tokens, 130) << "request " << i;
        }
        continue;
      }
      Session session(free, wide());
      std::vector<int32_t> rest(traffic.prompts[i].begin() + 130, traffic.prompts[i].end());
      session.prefill({traffic.prompts[i].data(), 130});
      EXPECT_EQ(made_by(*job), session.generate(rest, greedy(30)).token_ids) << "request " << i;
    }
  }
}

// Where any beginning may be used, that of one that runs is as long as it is as it was made.
TEST(PressureTest, NobodyBeginsWithWhatWasCompressedAgain) {
  const Model model = small_model(held_bytes(wide(), 500));
  Model::Impl& impl = *model.impl();
  const SpecPtr own = impl.cache_spec(wide());
  Scheduler scheduler(impl, wide(),
                      {.prefix_cache = PrefixCache::kApproximate, .ladder = ladder_of(wide())});
  const std::vector<int32_t> ids = ids_of(150, 1);
  const auto first = job_of(impl, ids, 430, 0);
  scheduler.add(first);
  while (first->repruned == 0 && !scheduler.idle()) scheduler.round();
  ASSERT_GT(first->repruned, 0);
  const auto second = job_of(impl, {ids.begin(), ids.begin() + 110}, 5, 1);
  scheduler.add(second);
  while (!second->cache && !second->ended) scheduler.round();
  ASSERT_FALSE(first->ended) << "there is nobody left to begin with";
  ASSERT_TRUE(second->cache);
  EXPECT_EQ(second->reused_tokens, 0);
  EXPECT_EQ(second->cache->spec().layout.page_bytes, own->layout.page_bytes);
  while (!scheduler.idle()) scheduler.round();
  EXPECT_EQ(scheduler.counts().finished, 2);
}

// With room beside the budget a paused cache comes back as it went, whatever its rung: nothing is
// computed again, and every token is that of a lone sequence.
TEST(PressureTest, PausedCachesAreKeptWhereThereIsRoom) {
  const Traffic traffic(10, 590);
  const Model free = small_model();
  for (const bool ladder : {false, true}) {
    SCOPED_TRACE(ladder ? "with a ladder" : "without");
    const auto settings = ladder ? settings_of(wide()) : std::vector<KVConfig>{wide()};
    const int64_t budget = held_bytes(settings.back(), 490) * 3;
    for (const int64_t swap_bytes : {int64_t{0}, int64_t{100}, int64_t{1} << 30}) {
      SCOPED_TRACE(std::to_string(swap_bytes) + " bytes");
      const Model model = small_model(budget);
      Model::Impl& impl = *model.impl();
      {
        Scheduler scheduler(impl, wide(),
                            {.ladder = ladder ? ladder_of(wide()) : std::vector<KVConfig>(),
                             .swap_bytes = swap_bytes});
        int64_t most_kept = 0, n_paused = 0;
        const Course made = run(impl, scheduler, traffic.jobs(impl), [&](const Course&) {
          most_kept = std::max(most_kept, scheduler.swapped_bytes());
          n_paused = std::max(n_paused, scheduler.n_paused());
        });
        EXPECT_GT(n_paused, 0);
        EXPECT_LE(most_kept, swap_bytes);
        EXPECT_EQ(made.counts.finished, 7);
        EXPECT_EQ(scheduler.swapped_bytes(), 0);
        if (swap_bytes < 1000) {
          EXPECT_EQ(most_kept, 0);
          EXPECT_GT(made.counts.prompt_tokens, traffic.prompt_tokens());
        } else {
          EXPECT_GT(most_kept, 0);
          EXPECT_EQ(made.counts.prompt_tokens, traffic.prompt_tokens()) << "computed again";
        }
        for (size_t i = 0; i < made.jobs.size(); i++) {
          if (ladder && swap_bytes < 1000 && made.paused[i]) continue;  // begun at another setting
          EXPECT_EQ(made_by(*made.jobs[i]), alone(*free.impl(), settings, traffic.prompts[i],
                                                  traffic.n_new[i], made.events[i]))
              << "request " << i;
        }
      }
      EXPECT_EQ(impl.budget->used(), 0);
    }
  }
}

// Where all layers have a window, caches that have dropped blocks are compressed again, paused and
// taken up again likewise.
TEST(PressureTest, WhatAWindowHasLeftBehindStaysThere) {
  const Traffic traffic(10, 590);
  int64_t most_kept = 0;
  int64_t late = 0;  // changes of caches that had dropped blocks
  for (const int32_t window : {200, 300}) {
    SCOPED_TRACE("window " + std::to_string(window));
    const auto windowed = [&](int64_t kv_budget) {
      ModelConfig config = testing::small_config({.head_dim = 32});
      config.sliding_window = window;
      return testing::random_model(config, "cpu", 2, kTail, kv_budget);
    };
    const Model free = windowed(0);
    const Prompt text = ids_of(500, 9);
    const KVConfig kv =
        setting(ValueType::kAuto, std::make_shared<const Profile>(calibrate(free, {&text, 1})));
    const std::vector<KVConfig> ladder = pressure_ladder(free, kv);
    std::vector<KVConfig> settings = {kv};
    settings.insert(settings.end(), ladder.begin(), ladder.end());
    const SpecPtr last = free.impl()->cache_spec(settings.back());
    const Model model = windowed(SequenceCache::held_bytes(*last, 490) * 3);
    Model::Impl& impl = *model.impl();
    Scheduler scheduler(impl, kv, {.ladder = ladder, .swap_bytes = 1 << 30});
    const Course made = run(impl, scheduler, traffic.jobs(impl), [&](const Course&) {
      most_kept = std::max(most_kept, scheduler.swapped_bytes());
    });
    EXPECT_EQ(made.counts.finished, 7);
    EXPECT_EQ(made.counts.prompt_tokens, traffic.prompt_tokens()) << "computed again";
    for (size_t i = 0; i < made.jobs.size(); i++) {
      for (const int64_t n : made.events[i]) late += last->dropped_blocks(n) > 0 ? 1 : 0;
      EXPECT_EQ(made_by(*made.jobs[i]),
                alone(*free.impl(), settings, traffic.prompts[i], traffic.n_new[i], made.events[i]))
          << "request " << i;
    }
  }
  EXPECT_GT(most_kept, 0);
  EXPECT_GT(late, 0);
}

TEST(PressureTest, CancelledWhilePausedNothingIsKept) {
  const Traffic traffic(10, 590);
  const Model model = small_model(held_bytes(wide(), 490) * 3);
  Model::Impl& impl = *model.impl();
  {
    Scheduler scheduler(impl, wide(), {.swap_bytes = 1 << 30});
    int64_t cancelled = 0;
    const Course made = run(impl, scheduler, traffic.jobs(impl), [&](const Course& so_far) {
      for (const auto& job : so_far.jobs) {
        if (job->kept == nullptr || *job->cancelled) continue;
        EXPECT_GT(scheduler.swapped_bytes(), 0);
        *job->cancelled = true;
        cancelled++;
      }
    });
    EXPECT_GT(cancelled, 0);
    EXPECT_EQ(made.counts.cancelled, cancelled);
    EXPECT_EQ(scheduler.swapped_bytes(), 0);
  }
  EXPECT_EQ(impl.budget->used(), 0);
}

TEST(PressureTest, TheLadderHasSmallerPresetsThatTheModelCanHave) {
  const Model model = small_model();  // without a tokenizer: nothing to calibrate with
  const auto types = [&](const KVConfig& kv) {
    std::vector<ValueType> made;
    for (const KVConfig& rung : pressure_ladder(model, kv)) {
      EXPECT_EQ(rung.window, kv.window);
      EXPECT_EQ(rung.sink_tokens, kv.sink_tokens);
      made.push_back(rung.value_dtype);
    }
    return made;
  };
  using enum ValueType;
  EXPECT_EQ(types(setting(kAuto)), (std::vector{kInt8, kInt4}));
  EXPECT_EQ(types({}), (std::vector{kInt4}));
  EXPECT_EQ(types(wide()), (std::vector{kInt8, kInt4, kCoded}));
  EXPECT_EQ(types(setting(kInt8, calibrated(), 0.5)), (std::vector{kInt4, kCoded}));
  EXPECT_EQ(types(setting(kInt4, calibrated())), (std::vector{kCoded}));
  EXPECT_EQ(pressure_ladder(model, wide()).back().profile, calibrated());
  const EngineOptions options{.on_pressure = OnPressure::kSparser};
  EXPECT_THROW(Engine(model, setting(kInt4, hadamard()), options), std::invalid_argument);
  EXPECT_THROW(Engine(model, setting(kCoded, calibrated()), options), std::invalid_argument);
  EXPECT_THROW(parse_on_pressure("fail"), std::invalid_argument);
  EXPECT_THROW(Engine(model, {}, {.swap_bytes = -1}), std::invalid_argument);
  for (const OnPressure mode : {OnPressure::kPause, OnPressure::kSparser}) {
    EXPECT_EQ(parse_on_pressure(name_of(mode)), mode);
  }
}

TEST(PressureTest, AnEngineSaysWhatItDid) {
  const Traffic traffic;
  const int64_t budget = held_bytes(wide(), 480) * 3;
  const Model model = small_model(budget);
  Engine engine(model, wide(), {.on_pressure = OnPressure::kSparser});
  std::vector<Request> requests;
  for (size_t i = 0; i < traffic.prompts.size(); i++) {
    requests.push_back(engine.submit(traffic.prompts[i], greedy(traffic.n_new[i])));
  }
  int64_t repruned = 0;
  const Model free = small_model();
  for (size_t i = 0; i < requests.size(); i++) {
    const GenerateResult result = requests[i].result();
    EXPECT_EQ(static_cast<int32_t>(result.token_ids.size()), traffic.n_new[i]);
    repruned += result.stats.repruned;
    if (result.stats.repruned > 0) continue;
    Session session(free, wide());
    EXPECT_EQ(result.token_ids,
              session.generate(traffic.prompts[i], greedy(traffic.n_new[i])).token_ids);
  }
  engine.close();
  EXPECT_GT(repruned, 0);
  EXPECT_EQ(engine.stats().repruned, repruned);
  EXPECT_EQ(engine.stats().failed, 0);
  EXPECT_LE(model.memory().kv_peak_bytes, budget);
  EXPECT_EQ(model.memory().kv_bytes, 0);
}

}  // namespace
}  // namespace mustafar
