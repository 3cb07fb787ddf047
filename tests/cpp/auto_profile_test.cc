// profile="auto": made once, kept in the cache folder, made anew where what is kept can't be used.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "kv/sequence_cache.h"
#include "mustafar/calibration.h"
#include "mustafar/error.h"
#include "mustafar/kv_config.h"
#include "mustafar/profile.h"
#include "runtime/calibration_text.h"
#include "runtime/model_impl.h"
#include "support/tiny_model.h"

namespace mustafar {
namespace {

namespace fs = std::filesystem;

// What a caller heard.
struct Heard {
  std::vector<std::string> notes, warnings;
  int64_t last_done = 0, last_total = 0;

  ProfileHooks hooks() {
    ProfileHooks hooks;
    hooks.note = [this](const std::string& line) { notes.push_back(line); };
    hooks.warning = [this](const std::string& line) { warnings.push_back(line); };
    hooks.progress = [this](int64_t done, int64_t total) {
      last_done = done;
      last_total = total;
    };
    return hooks;
  }
};

class AutoProfileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* before = std::getenv("XDG_CACHE_HOME");
    if (before != nullptr) before_ = before;
    set_cache(cache_.path());
    testing::write_tiny_model(model_.path());
  }
  void TearDown() override {
    if (before_) {
      ::setenv("XDG_CACHE_HOME", before_->c_str(), 1);
    } else {
      ::unsetenv("XDG_CACHE_HOME");
    }
  }

  static void set_cache(const fs::path& folder) { ::setenv("XDG_CACHE_HOME", folder.c_str(), 1); }
  Model load() const {
    ModelOptions options;
    options.device = "cpu";
    options.threads = 2;
    return Model::load(model_.path(), options);
  }
  fs::path kept(const Model& model) const {
    return cache_.path() / "mustafar" / "profiles" /
           (model.fingerprint() + "-balanced-2.safetensors");
  }
  // Files below the cache folder.
  int files() const {
    int n = 0;
    for (const auto& entry : fs::recursive_directory_iterator(cache_.path())) {
      n += entry.is_regular_file();
    }
    return n;
  }

  testing::TemporaryFolder cache_, model_;

 private:
  std::optional<std::string> before_;
};

TEST_F(AutoProfileTest, GainsCostsWhereABudgetAsks) {
  const Model model = load();
  Heard first, second, third;
  const auto made = Profile::resolve("auto", model);
  EXPECT_FALSE(made->has_costs());
  const auto richer = Profile::resolve("auto", model, first.hooks(), true);
  ASSERT_TRUE(richer->has_costs());
  EXPECT_EQ(richer->transform_hash(), made->hash());
  EXPECT_NE(richer->hash(), made->hash());
  EXPECT_EQ(static_cast<int32_t>(richer->k_cost.size()), model.config().n_layers);
  ASSERT_EQ(first.notes.size(), 1u);
  EXPECT_EQ(first.notes[0].find("measuring"), 0u) << first.notes[0];
  EXPECT_EQ(first.last_done, first.last_total);
  EXPECT_EQ(files(), 1);
  EXPECT_EQ(Profile::load(kept(model))->hash(), richer->hash());
  EXPECT_EQ(Profile::resolve("auto", model, second.hooks()), richer);
  EXPECT_EQ(Profile::resolve("auto", load(), third.hooks(), true)->hash(), richer->hash());
  EXPECT_TRUE(second.notes.empty());
  EXPECT_TRUE(third.notes.empty());
}

TEST_F(AutoProfileTest, IsMadeOnceAndKept) {
  const Model model = load();
  Heard first, second, third;
  const auto made = Profile::resolve("auto", model, first.hooks());
  ASSERT_NE(made, nullptr);
  EXPECT_EQ(made->kind, "balanced");
  EXPECT_FALSE(made->k_weight.empty());
  made->check(model.config(), model.fingerprint());
  ASSERT_EQ(first.notes.size(), 1u);
  EXPECT_NE(first.notes[0].find(kept(model).string()), std::string::npos) << first.notes[0];
  EXPECT_TRUE(first.warnings.empty());
  EXPECT_GT(first.last_total, 1000);
  EXPECT_LE(first.last_total, 8192);
  EXPECT_EQ(first.last_done, first.last_total);
  EXPECT_EQ(files(), 1);
  EXPECT_EQ(Profile::load(kept(model))->hash(), made->hash());

  EXPECT_EQ(Profile::resolve("auto", model, second.hooks()), made);  // the model holds it
  EXPECT_EQ(Profile::resolve("auto", load(), third.hooks())->hash(), made->hash());
  EXPECT_TRUE(second.notes.empty());
  EXPECT_TRUE(third.notes.empty());
}

// A preset, or pruned rows in the basis that `auto` has.
KVConfig with_tables(const std::string& name, const Model& model) {
  KVConfig config = KVConfig::preset(name == "pruned" ? "mustafar" : name, model);
  if (name == "pruned") config.profile = Profile::resolve("auto", model);
  return config;
}

TEST_F(AutoProfileTest, TablesOutliveTheSessionsThatUsedThem) {
  const Model model = load();
  for (const char* name : {"pruned", "small", "balanced"}) {
    SCOPED_TRACE(name);
    const auto profile = with_tables(name, model).profile;
    std::weak_ptr<const KVTransform> transform;
    std::weak_ptr<const CodeTables> codes;
    {
      const auto spec = model.impl()->cache_spec(with_tables(name, model));
      transform = spec->transform;
      codes = spec->codes;
    }
    const KVConfig again = with_tables(name, model);
    EXPECT_EQ(again.profile, profile);
    const auto spec = model.impl()->cache_spec(again);
    ASSERT_NE(spec->transform, nullptr);
    EXPECT_EQ(spec->transform, transform.lock());
    EXPECT_EQ(spec->codes != nullptr, again.coded());
    EXPECT_EQ(spec->codes, codes.lock());
  }
}

TEST_F(AutoProfileTest, TablesGoWhenOthersAreAskedFor) {
  const Model model = load();
  const std::weak_ptr<const KVTransform> old =
      model.impl()->cache_spec(KVConfig::preset("balanced", model))->transform;
  EXPECT_FALSE(old.expired());
  model.impl()->cache_spec(with_tables("pruned", model));
  EXPECT_TRUE(old.expired());
}

TEST_F(AutoProfileTest, WhatCannotBeUsedIsMadeAnew) {
  const Model model = load();
  const auto made = Profile::resolve("auto", model);
  Profile stale = *made;
  stale.text_hash = "0123456789abcdef";
  Profile foreign = *made;
  foreign.model_fingerprint = "0123456789abcdef";
  const auto spoil = [&](const Profile* with) {
    fs::remove(kept(model));
    if (with != nullptr) {
      with->save(kept(model));
    } else {
      std::ofstream(kept(model)) << "no safetensors file";
    }
  };
  const Profile* const kinds[] = {&stale, &foreign, nullptr};
  for (const Profile* with : kinds) {
    spoil(with);
    Heard heard;
    EXPECT_EQ(Profile::resolve("auto", load(), heard.hooks())->hash(), made->hash());
    ASSERT_EQ(heard.notes.size(), 1u);
    EXPECT_NE(heard.notes[0].find("("), std::string::npos) << heard.notes[0];  // says why
    EXPECT_TRUE(heard.warnings.empty());
    EXPECT_EQ(Profile::load(kept(model))->hash(), made->hash());
    EXPECT_EQ(files(), 1);
  }
}

TEST_F(AutoProfileTest, AFolderThatCannotBeWrittenIsSaid) {
  const fs::path file = cache_.write("a file", "x");
  set_cache(file / "below");
  const Model model = load();
  Heard heard, again;
  const auto made = Profile::resolve("auto", model, heard.hooks());
  EXPECT_EQ(heard.notes.size(), 1u);
  ASSERT_EQ(heard.warnings.size(), 1u);
  EXPECT_NE(heard.warnings[0].find("could not be kept"), std::string::npos);
  EXPECT_NE(heard.warnings[0].find(file.string()), std::string::npos) << heard.warnings[0];
  EXPECT_EQ(Profile::resolve("auto", model, again.hooks()), made);
  EXPECT_TRUE(again.notes.empty());
}

TEST_F(AutoProfileTest, StoppedItLeavesNothing) {
  const Model model = load();
  ProfileHooks hooks;
  hooks.progress = [](int64_t done, int64_t) {
    if (done > 0) throw Cancelled("enough");
  };
  EXPECT_THROW(Profile::resolve("auto", model, hooks), Cancelled);
  EXPECT_EQ(files(), 0);
  EXPECT_NE(Profile::resolve("auto", model), nullptr);
  EXPECT_EQ(files(), 1);
}

TEST_F(AutoProfileTest, ThreadsShareOne) {
  const Model model = load();
  Heard heard[2];
  std::shared_ptr<const Profile> made[2];
  std::thread other([&] { made[1] = Profile::resolve("auto", model, heard[1].hooks()); });
  made[0] = Profile::resolve("auto", model, heard[0].hooks());
  other.join();
  EXPECT_EQ(made[0], made[1]);
  EXPECT_EQ(heard[0].notes.size() + heard[1].notes.size(), 1u);
}

TEST_F(AutoProfileTest, NeedsATokenizer) {
  fs::remove(model_.path() / "tokenizer.json");
  EXPECT_THROW(Profile::resolve("auto", load()), TokenizerError);
  EXPECT_EQ(files(), 0);
}

TEST_F(AutoProfileTest, RelativeCacheFoldersDoNotCount) {
  ::setenv("XDG_CACHE_HOME", "relative", 1);
  const std::string home = std::getenv("HOME") != nullptr ? std::getenv("HOME") : "";
  ::setenv("HOME", cache_.path().c_str(), 1);
  const Model model = load();
  Heard heard;
  Profile::resolve("auto", model, heard.hooks());
  ::setenv("HOME", home.c_str(), 1);
  EXPECT_TRUE(heard.warnings.empty());
  EXPECT_TRUE(fs::exists(cache_.path() / ".cache" / "mustafar" / "profiles"));
  EXPECT_FALSE(fs::exists("relative"));
}

TEST(CalibrationTextTest, IsThere) {
  ASSERT_EQ(calibration_texts().size(), 6u);
  EXPECT_TRUE(calibration_texts()[0].starts_with("Call me Ishmael."));
  for (const std::string_view text : calibration_texts()) {
    EXPECT_GT(text.size(), 3000u);
    EXPECT_EQ(text.back(), '\n');
  }
}

}  // namespace
}  // namespace mustafar
