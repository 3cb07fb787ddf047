#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

#include "mustafar/error.h"
#include "mustafar/hub.h"
#include "support/model_folder.h"

namespace mustafar {
namespace {

namespace fs = std::filesystem;

class HubCacheTest : public ::testing::Test {
 protected:
  HubCacheTest() {
    for (const char* name : kVariables) {
      const char* value = std::getenv(name);
      saved_.push_back(value != nullptr ? std::optional<std::string>(value) : std::nullopt);
      unsetenv(name);
    }
  }
  ~HubCacheTest() override {
    for (size_t i = 0; i < saved_.size(); i++) {
      if (saved_[i]) {
        setenv(kVariables[i], saved_[i]->c_str(), 1);
      } else {
        unsetenv(kVariables[i]);
      }
    }
  }

  // A snapshot of a repository in the cache that is rooted at `hub` of the test's folder.
  fs::path add(const std::string& hub, const std::string& repository, const std::string& commit) {
    const fs::path snapshot = folder_.path() / hub / repository / "snapshots" / commit;
    fs::create_directories(snapshot);
    return snapshot;
  }
  void set_main(const std::string& hub, const std::string& repository, const std::string& commit) {
    const std::string refs = hub + "/" + repository + "/refs";
    fs::create_directories(folder_.path() / refs);
    folder_.write(refs + "/main", commit);
  }
  void set(const char* variable, const std::string& place) {
    setenv(variable, (folder_.path() / place).c_str(), 1);
  }

  static constexpr const char* kVariables[] = {"HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"};
  std::vector<std::optional<std::string>> saved_;
  testing::TemporaryFolder folder_;
};

TEST_F(HubCacheTest, EveryPlaceThatTheHubsToolsKnow) {
  const fs::path home = add("u/.cache/huggingface/hub", "models--a--m", "1");
  set("HOME", "u");
  EXPECT_EQ(find_model_folder("a/m"), home);
  const fs::path xdg = add("x/huggingface/hub", "models--a--m", "2");
  set("XDG_CACHE_HOME", "x");
  EXPECT_EQ(find_model_folder("a/m"), xdg);
  const fs::path hf = add("hf/hub", "models--a--m", "3");
  set("HF_HOME", "hf");
  EXPECT_EQ(find_model_folder("a/m"), hf);
  const fs::path cache = add("cache", "models--a--m", "4");
  set("HF_HUB_CACHE", "cache");
  EXPECT_EQ(find_model_folder("a/m"), cache);
}

TEST_F(HubCacheTest, TheMainBranchOfSeveralSnapshots) {
  set("HF_HUB_CACHE", "cache");
  add("cache", "models--a--m.B-2", "01");
  const fs::path second = add("cache", "models--a--m.B-2", "02");
  EXPECT_THROW(find_model_folder("a/m.B-2"), ModelError);
  set_main("cache", "models--a--m.B-2", "02\n");
  EXPECT_EQ(find_model_folder("a/m.B-2"), second);
  set_main("cache", "models--a--m.B-2", "../../elsewhere");
  EXPECT_THROW(find_model_folder("a/m.B-2"), ModelError);
}

TEST_F(HubCacheTest, WhatIsThereIsTakenAsItIs) {
  EXPECT_EQ(find_model_folder(folder_.path()), folder_.path());
  std::ofstream(folder_.path() / "model.gguf") << "GGUF";
  EXPECT_THROW(find_model_folder(folder_.path() / "model.gguf"), ModelError);  // a file
  for (const char* name : {"model", "/a/b", "a/b/c", "./b", "../b", "a/", "/b", "a b/c", "a/.."}) {
    EXPECT_THROW(find_model_folder(name), Missing<ModelError>) << name;  // and none is an id
  }
}

TEST_F(HubCacheTest, SaysWhereItLooked) {
  set("HF_HUB_CACHE", "cache");
  try {
    find_model_folder("meta/llama");
    FAIL() << "expected a ModelError";
  } catch (const ModelError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find((folder_.path() / "cache/models--meta--llama").string()),
              std::string::npos);
    EXPECT_NE(message.find("hf download meta/llama"), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace mustafar
