// The tree of kept prefixes against a list that is searched from end to end.
#include "runtime/prefix_tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <list>
#include <random>
#include <vector>

#include "support/random_model.h"

namespace mustafar {
namespace {

using Ids = std::vector<int32_t>;

constexpr int64_t kNoLimit = int64_t{1} << 40;

class PrefixTreeTest : public ::testing::Test {
 protected:
  PrefixTreeTest()
      : model_(
            testing::random_model(testing::small_config({.n_layers = 1}), "cpu", 1, DType::kF32)),
        engine_(*model_.impl()),
        buffers_(*engine_.backend) {
    KVConfig kv;
    kv.window = 5;
    spec_ = engine_.cache_spec(kv);
  }

  SequenceCache cache_of(const Ids& ids) {
    SequenceCache cache = engine_.new_cache(spec_, 600);
    append(cache, ids);
    return cache;
  }
  void append(SequenceCache& cache, const Ids& ids) {
    Prefill prefill(*engine_.llama, cache, ids, buffers_);
    while (prefill.step_rows()) {
    }
    prefill.finish();
  }

  const Model model_;
  Model::Impl& engine_;
  ForwardBuffers buffers_;
  std::shared_ptr<const CacheSpec> spec_;
};

std::vector<PromptCall> calls_of(const std::vector<int64_t>& ends) {
  std::vector<PromptCall> calls;
  for (const int64_t end : ends) calls.push_back({.end = end});
  return calls;
}

// Long edges that part in many places: from a few texts, cut anywhere.
struct Texts {
  std::mt19937 random{5};
  Ids draw() {
    Ids ids;
    for (const uint32_t n_texts = 1 + random() % 3; ids.size() < 230;) {
      const Ids part = testing::ids_of(70, random() % n_texts);
      ids.insert(ids.end(), part.begin(), part.end());
    }
    ids.resize(1 + random() % 230);
    return ids;
  }
};

TEST_F(PrefixTreeTest, FindsAndDropsWhatASearchOfAllDoes) {
  struct Known {
    Ids ids;
    std::vector<int64_t> ends;
    bool pinned;
  };
  PrefixTree tree(kNoLimit);
  std::list<Known> known;  // the least recently used first
  Texts texts;
  std::mt19937& random = texts.random;
  int n_found = 0, n_dropped = 0;
  for (int i = 0; i < 1500; i++) {
    const Ids ids = texts.draw();
    const auto n = static_cast<int64_t>(ids.size());
    std::vector<int64_t> ends = {n};
    if (random() % 2 == 0 && n > 1) ends.insert(ends.begin(), 1 + random() % (n - 1));
    switch (random() % 4) {
      case 0: {
        const auto same = std::find_if(known.begin(), known.end(), [&](const Known& each) {
          return each.ids == ids && each.ends == ends;
        });
        const bool pinned = random() % 5 == 0;
        if (same != known.end()) {
          same->pinned = same->pinned || pinned;
          known.splice(known.end(), known, same);
        } else {
          known.push_back({ids, ends, pinned});
        }
        tree.keep(ids, calls_of(ends), cache_of(ids), pinned);
        break;
      }
      case 1: {  // by the same calls: a prompt that begins with one that is known
        if (known.empty()) break;
        const Known& one = *std::next(known.begin(), random() % known.size());
        Ids prompt = one.ids;
        std::vector<int64_t> prompt_ends = one.ends;
        prompt.insert(prompt.end(), ids.begin(), ids.end());
        if (random() % 3 == 0) prompt_ends.insert(prompt_ends.begin(), 1);
        prompt_ends.erase(std::unique(prompt_ends.begin(), prompt_ends.end()), prompt_ends.end());
        prompt_ends.push_back(static_cast<int64_t>(prompt.size()));
        auto best = known.end();
        for (auto each = known.begin(); each != known.end(); ++each) {
          const bool fits = each->ends.size() < prompt_ends.size() &&
                            std::equal(each->ends.begin(), each->ends.end(), prompt_ends.begin()) &&
                            std::equal(each->ids.begin(), each->ids.end(), prompt.begin());
          if (fits && (best == known.end() || each->ids.size() > best->ids.size())) best = each;
        }
        const SequenceCache* found = tree.find(prompt, calls_of(prompt_ends), false);
        EXPECT_EQ(tree.find(prompt, calls_of(prompt_ends), true), nullptr);
        ASSERT_EQ(found != nullptr, best != known.end());
        if (found == nullptr) break;
        n_found++;
        EXPECT_EQ(found->length(), static_cast<int64_t>(best->ids.size()));
        known.splice(known.end(), known, best);
        break;
      }
      case 2: {  // however it was made: which of several equals is found, and used, is open
        int64_t longest = 0;
        for (const Known& each : known) longest = std::max(longest, common_length(each.ids, ids));
        const PrefixTree::Common common = tree.find_common(ids, false);
        ASSERT_EQ(common.cache != nullptr, longest > 0);
        if (longest == 0) break;
        EXPECT_EQ(usable_tokens(*common.cache, common.n_tokens), common.usable);
        EXPECT_LE(common.n_tokens, longest);
        EXPECT_GE(common.usable, spec_->compressed(longest));
        EXPECT_EQ(fork_beginning(*common.cache, common.n_tokens).length(), common.usable);
        tree.clear();
        known.clear();
        break;
      }
      default: {
        const bool pinned_too = random() % 2 == 0;
        auto oldest = std::find_if(known.begin(), known.end(),
                                   [](const Known& each) { return !each.pinned; });
        if (oldest == known.end() && pinned_too) oldest = known.begin();
        ASSERT_EQ(tree.drop_oldest(pinned_too), oldest != known.end());
        if (oldest == known.end()) break;
        n_dropped++;
        known.erase(oldest);
      }
    }
    ASSERT_EQ(tree.size(), static_cast<int64_t>(known.size()));
  }
  EXPECT_GT(n_found, 50);
  EXPECT_GT(n_dropped, 50);
  tree.clear();
  EXPECT_EQ(tree.bytes(), 0);
  EXPECT_EQ(engine_.budget->used(), 0);
}

TEST_F(PrefixTreeTest, PagesCountOnce) {
  PrefixTree tree(kNoLimit);
  SequenceCache cache = cache_of(testing::ids_of(200));
  const int64_t page = spec_->layout.page_bytes;
  tree.keep(testing::ids_of(200), {}, cache.fork(), false);
  EXPECT_EQ(tree.bytes(), 2 * page + cache.own_bytes());
  Ids ids = testing::ids_of(200);
  const Ids more = testing::ids_of(64, 2);
  append(cache, more);
  ids.insert(ids.end(), more.begin(), more.end());
  tree.keep(ids, {}, cache.fork(), false);
  EXPECT_EQ(tree.bytes(), 3 * page + 2 * cache.own_bytes());
  tree.drop_beginnings(ids, false);
  EXPECT_EQ(tree.size(), 1);
  EXPECT_EQ(tree.bytes(), 3 * page + cache.own_bytes());
}

TEST_F(PrefixTreeTest, TheLimitHoldsAndPinnedStatesGoLast) {
  const int64_t one = spec_->layout.page_bytes + cache_of(testing::ids_of(100)).own_bytes();
  PrefixTree tree(2 * one);
  const auto keep = [&](uint32_t seed, bool pinned) {
    const Ids ids = testing::ids_of(100, seed);
    tree.keep(ids, calls_of({100}), cache_of(ids), pinned);
    EXPECT_LE(tree.bytes(), 2 * one);
  };
  const auto has = [&](uint32_t seed) {
    return tree.find(testing::ids_of(101, seed), calls_of({100, 101}), false) != nullptr;
  };
  keep(1, true);
  keep(2, false);
  keep(3, false);
  EXPECT_TRUE(has(1) && has(3));
  EXPECT_FALSE(has(2));
  keep(4, true);
  EXPECT_TRUE(has(1) && has(4));
  keep(5, false);  // no pinned one makes room for another kind
  EXPECT_TRUE(has(1) && has(4));
  EXPECT_FALSE(has(5));
  tree.unpin(testing::ids_of(100, 1));
  keep(6, false);
  EXPECT_TRUE(has(4) && has(6));
  EXPECT_FALSE(has(1));
}

}  // namespace
}  // namespace mustafar
