#include "io/checkpoint.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "mustafar/error.h"
#include "support/model_folder.h"
#include "support/source_dir.h"

namespace mustafar {
namespace {

using nlohmann::json;
using testing::safetensors_bytes;
using testing::TemporaryFolder;
using testing::TestTensor;
using testing::tiny_config;
using testing::tiny_tensors;
using testing::zero_tensor;

constexpr const char* kIndexName = "model.safetensors.index.json";

class CheckpointTest : public ::testing::Test {
 protected:
  CheckpointTest() { folder_.write("config.json", tiny_config().dump()); }

  void write_single(const std::vector<TestTensor>& tensors, size_t padding = 0) {
    folder_.write("model.safetensors", safetensors_bytes(tensors, padding));
  }
  // Two shards, the first with `first` tensors; returns the index, which is written too.
  json write_shards(size_t first = 5) {
    const std::vector<TestTensor> tensors = tiny_tensors();
    const auto middle = tensors.begin() + static_cast<std::ptrdiff_t>(first);
    folder_.write("one.safetensors", safetensors_bytes({tensors.begin(), middle}));
    folder_.write("two.safetensors", safetensors_bytes({middle, tensors.end()}));
    json index = {{"metadata", {{"total_size", 0}}}, {"weight_map", json::object()}};
    for (size_t i = 0; i < tensors.size(); i++) {
      index["weight_map"][tensors[i].name] = i < first ? "one.safetensors" : "two.safetensors";
    }
    write_index(index);
    return index;
  }
  void write_index(const json& index) { folder_.write(kIndexName, index.dump()); }
  Checkpoint open() { return Checkpoint::open(folder_.path()); }

  TemporaryFolder folder_;
};

std::vector<TestTensor> without(const std::string& name) {
  std::vector<TestTensor> tensors = tiny_tensors();
  std::erase_if(tensors, [&](const TestTensor& tensor) { return tensor.name == name; });
  return tensors;
}

std::vector<TestTensor> with(TestTensor changed) {
  std::vector<TestTensor> tensors = without(changed.name);
  tensors.push_back(std::move(changed));
  return tensors;
}

TEST_F(CheckpointTest, OpensASingleFile) {
  std::vector<TestTensor> tensors = tiny_tensors();
  const float values[] = {1.5f, -2.0f};
  std::memcpy(tensors[2].bytes.data(), values, sizeof(values));
  write_single(tensors);
  const Checkpoint checkpoint = open();
  EXPECT_FALSE(checkpoint.config().tie_word_embeddings);
  const TensorView& norm = checkpoint.require("model.norm.weight", {8});
  EXPECT_EQ(norm.name, "model.norm.weight");
  EXPECT_EQ(norm.dtype, DType::kF32);
  EXPECT_EQ(norm.shape, std::vector<int64_t>{8});
  EXPECT_EQ(norm.bytes, 32);
  EXPECT_EQ(norm.file->filename(), "model.safetensors");
  EXPECT_EQ(static_cast<const float*>(norm.data)[0], 1.5f);
  EXPECT_EQ(static_cast<const float*>(norm.data)[1], -2.0f);
  EXPECT_EQ(checkpoint.find("none"), nullptr);

  int64_t n = 0, bytes = 0;
  checkpoint.for_each([&](const TensorView& view) {
    n++;
    bytes += view.bytes;
  });
  EXPECT_EQ(n, static_cast<int64_t>(tensors.size()));
  EXPECT_EQ(bytes, checkpoint.total_bytes());
}

TEST_F(CheckpointTest, RequireNamesExpectedAndActual) {
  write_single(tiny_tensors());
  const Checkpoint checkpoint = open();
  EXPECT_MODEL_ERROR(checkpoint.require("model.norm.weight", {9}),
                     "tensor \"model.norm.weight\": expected shape [9], found [8]");
  EXPECT_MODEL_ERROR(checkpoint.require("model.norm.bias", {8}),
                     "tensor \"model.norm.bias\" is missing; expected shape [8]");
}

TEST_F(CheckpointTest, OpensShards) {
  write_shards();
  const Checkpoint checkpoint = open();
  EXPECT_EQ(checkpoint.require("model.norm.weight", {8}).file->filename(), "one.safetensors");
  EXPECT_EQ(checkpoint.require("model.layers.1.mlp.up_proj.weight", {12, 8}).file->filename(),
            "two.safetensors");
}

TEST_F(CheckpointTest, ShardsMayBeLinksIntoABlobStore) {
  write_shards();
  TemporaryFolder blobs;
  std::filesystem::rename(folder_.path() / "two.safetensors", blobs.path() / "0123");
  std::filesystem::create_symlink(blobs.path() / "0123", folder_.path() / "two.safetensors");
  EXPECT_NE(open().find("model.layers.1.mlp.up_proj.weight"), nullptr);
}

TEST_F(CheckpointTest, CopiesUnalignedTensors) {
  for (size_t padding = 0; padding < 8; padding++) {
    std::vector<TestTensor> tensors = tiny_tensors();
    for (TestTensor& tensor : tensors) {
      for (size_t i = 0; i < tensor.bytes.size(); i++) {
        tensor.bytes[i] = static_cast<char>(tensor.name.size() + i);
      }
    }
    write_single(tensors, padding);
    const Checkpoint checkpoint = open();
    for (const TestTensor& tensor : tensors) {
      const TensorView* view = checkpoint.find(tensor.name);
      ASSERT_NE(view, nullptr);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(view->data) % 4, 0u);
      EXPECT_EQ(std::memcmp(view->data, tensor.bytes.data(), tensor.bytes.size()), 0);
    }
  }
}

TEST_F(CheckpointTest, MixedTypesAreKeptAsStored) {
  write_single(with(zero_tensor("model.layers.0.mlp.up_proj.weight", {12, 8}, "BF16")));
  EXPECT_EQ(open().require("model.layers.0.mlp.up_proj.weight", {12, 8}).dtype, DType::kBF16);
  write_single(with(zero_tensor("model.layers.0.mlp.up_proj.weight", {12, 8}, "F16")));
  EXPECT_EQ(open().require("model.layers.0.mlp.up_proj.weight", {12, 8}).dtype, DType::kF16);
}

TEST_F(CheckpointTest, NanAndInfinityAreLoadedAsTheyAre) {
  std::vector<TestTensor> tensors = tiny_tensors();
  const float values[] = {std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity()};
  std::memcpy(tensors[2].bytes.data(), values, sizeof(values));
  write_single(tensors);
  const Checkpoint checkpoint = open();
  const auto* data = static_cast<const float*>(checkpoint.require("model.norm.weight", {8}).data);
  EXPECT_TRUE(std::isnan(data[0]));
  EXPECT_TRUE(std::isinf(data[1]));
}

// The three spellings of tied embeddings, and what the flag has to say against the tensors:
// nothing.
TEST_F(CheckpointTest, TiedEmbeddings) {
  for (bool flag : {false, true}) {
    json config = tiny_config();
    config["tie_word_embeddings"] = flag;
    folder_.write("config.json", config.dump());
    write_single(without("lm_head.weight"));
    Checkpoint checkpoint = open();
    EXPECT_TRUE(checkpoint.config().tie_word_embeddings);
    EXPECT_EQ(checkpoint.lm_head().name, "model.embed_tokens.weight");
    EXPECT_EQ(&checkpoint.lm_head(), &checkpoint.embedding());

    write_single(without("model.embed_tokens.weight"));
    checkpoint = open();
    EXPECT_TRUE(checkpoint.config().tie_word_embeddings);
    EXPECT_EQ(checkpoint.embedding().name, "lm_head.weight");
    EXPECT_EQ(&checkpoint.lm_head(), &checkpoint.embedding());

    write_single(tiny_tensors());
    checkpoint = open();
    EXPECT_FALSE(checkpoint.config().tie_word_embeddings);
    EXPECT_EQ(checkpoint.embedding().name, "model.embed_tokens.weight");
    EXPECT_EQ(checkpoint.lm_head().name, "lm_head.weight");
  }
  std::vector<TestTensor> neither = without("lm_head.weight");
  std::erase_if(neither,
                [](const auto& tensor) { return tensor.name == "model.embed_tokens.weight"; });
  write_single(neither);
  EXPECT_MODEL_ERROR(open(), "\"model.embed_tokens.weight\" is missing; expected shape [10, 8]");
}

TEST_F(CheckpointTest, BiasesAreRequiredWhereTheConfigHasThem) {
  write_single(tiny_tensors());
  json config = tiny_config();
  config["attention_bias"] = true;
  folder_.write("config.json", config.dump());
  EXPECT_MODEL_ERROR(open(),
                     "\"model.layers.0.self_attn.q_proj.bias\" is missing; expected shape [8]");
  config["attention_bias"] = false;
  config["mlp_bias"] = true;
  folder_.write("config.json", config.dump());
  EXPECT_MODEL_ERROR(open(),
                     "\"model.layers.0.mlp.gate_proj.bias\" is missing; expected shape [12]");
}

TEST_F(CheckpointTest, EveryTensorIsRequired) {
  for (const TestTensor& tensor : tiny_tensors()) {
    if (tensor.name == "lm_head.weight" || tensor.name == "model.embed_tokens.weight") continue;
    write_single(without(tensor.name));
    EXPECT_MODEL_ERROR(open(), "tensor \"" + tensor.name + "\" is missing");
  }
}

TEST_F(CheckpointTest, ShapesAndTypesAreChecked) {
  write_single(with(zero_tensor("model.embed_tokens.weight", {11, 8})));
  EXPECT_MODEL_ERROR(open(),
                     "\"model.embed_tokens.weight\": expected shape [10, 8], found [11, 8]");
  write_single(with(zero_tensor("model.layers.0.self_attn.k_proj.weight", {8, 4})));
  EXPECT_MODEL_ERROR(open(), "k_proj.weight\": expected shape [4, 8], found [8, 4]");
  write_single(with(zero_tensor("model.norm.weight", {8, 1})));
  EXPECT_MODEL_ERROR(open(), "\"model.norm.weight\": expected shape [8], found [8, 1]");
  write_single(with({"model.norm.weight", "F64", {8}, std::string(64, '\0')}));
  EXPECT_MODEL_ERROR(open(), "expected dtype F32, F16 or BF16, found F64");
  write_single(with({"model.norm.weight", "F8_E4M3", {8}, std::string(8, '\0')}));
  EXPECT_MODEL_ERROR(open(), "expected dtype F32, F16 or BF16, found F8_E4M3");
}

TEST_F(CheckpointTest, UnknownTensorsAreRefusedAndKnownTablesIgnored) {
  write_single(with({"model.layers.0.self_attn.rotary_emb.inv_freq", "F64", {1}, "12345678"}));
  EXPECT_EQ(open().find("model.layers.0.self_attn.rotary_emb.inv_freq"), nullptr);
  for (const char* name :
       {"model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_proj.bias"}) {
    write_single(with(zero_tensor(name, {8})));
    EXPECT_MODEL_ERROR(open(), std::string(name) + "\" is not part of the model");
  }
}

TEST_F(CheckpointTest, HugeConfigsFailAtTheFirstTensor) {
  write_single(tiny_tensors());
  json config = tiny_config();
  config["num_hidden_layers"] = 2147483647;
  folder_.write("config.json", config.dump());
  EXPECT_MODEL_ERROR(open(), "tensor \"model.layers.2.input_layernorm.weight\" is missing");
  config = tiny_config();
  config["vocab_size"] = config["hidden_size"] = 2147483640;
  folder_.write("config.json", config.dump());
  EXPECT_MODEL_ERROR(open(), "expected shape [2147483640, 2147483640], found [10, 8]");
}

TEST_F(CheckpointTest, BadFolders) {
  EXPECT_MODEL_ERROR(open(), "expected model.safetensors or model.safetensors.index.json");
  folder_.write("pytorch_model.bin", "x");
  EXPECT_MODEL_ERROR(open(), "save the model as safetensors");
  EXPECT_MODEL_ERROR(Checkpoint::open(folder_.path() / "none"),
                     "expected a model folder, found nothing there");
  EXPECT_MODEL_ERROR(Checkpoint::open(folder_.path() / "config.json"),
                     "expected a model folder, found something else");
  std::filesystem::create_directory(folder_.path() / "model.safetensors");
  EXPECT_MODEL_ERROR(open(), "model.safetensors: expected a regular file, found a directory");
  std::filesystem::remove(folder_.path() / "model.safetensors");
  ASSERT_EQ(::mkfifo((folder_.path() / "model.safetensors").c_str(), 0600), 0);
  EXPECT_MODEL_ERROR(open(), "model.safetensors: expected a regular file, found a FIFO");
  std::filesystem::remove(folder_.path() / "model.safetensors");
  std::filesystem::create_symlink("nowhere", folder_.path() / "model.safetensors");
  EXPECT_MODEL_ERROR(open(), "model.safetensors: cannot be opened");
}

TEST_F(CheckpointTest, ShardNamesMustStayInTheFolder) {
  TemporaryFolder outside;
  for (const std::string& name :
       {std::string("../two.safetensors"), (outside.path() / "two.safetensors").string(),
        std::string(".."), std::string("."), std::string(""), std::string("sub/two.safetensors"),
        std::string("..\\two.safetensors"), std::string("two.safetensors\0x", 17)}) {
    json index = write_shards();
    index["weight_map"]["model.norm.weight"] = name;
    write_index(index);
    EXPECT_MODEL_ERROR(open(), "\"model.norm.weight\": expected the name of a file in the folder");
  }
}

TEST_F(CheckpointTest, BadIndexes) {
  const json good = write_shards();
  const auto change = [&](auto&& edit) {
    json index = good;
    edit(index);
    write_index(index);
  };
  change([](json& index) { index.erase("weight_map"); });
  EXPECT_MODEL_ERROR(open(), "index.json: \"weight_map\" is missing");
  change([](json& index) { index["weight_map"] = 3; });
  EXPECT_MODEL_ERROR(open(), "\"weight_map\": expected an object, found 3");
  change([](json& index) { index["weight_map"]["model.norm.weight"] = 3; });
  EXPECT_MODEL_ERROR(open(), "expected the name of a file in the folder, found 3");
  change([](json& index) { index["weight_map"]["model.norm.weight"] = "three.safetensors"; });
  EXPECT_MODEL_ERROR(open(), "names the shard \"three.safetensors\", which is not in the folder");
  change([](json& index) { index["weight_map"] = json::object(); });
  EXPECT_MODEL_ERROR(open(), "is missing; expected shape");
  folder_.write(kIndexName, "[]");
  EXPECT_MODEL_ERROR(open(), "index.json: expected a JSON object");
}

// What files hold, they say themselves.
TEST_F(CheckpointTest, AnIndexThatIsWrongAboutTensorsDoesNoHarm) {
  const json good = write_shards();
  const auto change = [&](auto&& edit) {
    json index = good;
    edit(index);
    write_index(index);
  };
  change([](json& index) { index["weight_map"]["model.norm.weight"] = "two.safetensors"; });
  open();
  change([](json& index) { index["weight_map"]["lm_head.bias"] = "two.safetensors"; });
  open();
  change([](json& index) { index["weight_map"].erase("model.norm.weight"); });
  open();
}

TEST_F(CheckpointTest, ATensorInTwoShards) {
  write_shards();
  folder_.write("two.safetensors", safetensors_bytes(tiny_tensors()));
  EXPECT_MODEL_ERROR(open(), "is also in " + (folder_.path() / "one.safetensors").string());
}

TEST_F(CheckpointTest, BadShards) {
  write_shards();
  std::filesystem::remove(folder_.path() / "two.safetensors");
  EXPECT_MODEL_ERROR(open(), "names the shard \"two.safetensors\", which is not in the folder");
  std::filesystem::create_directory(folder_.path() / "two.safetensors");
  EXPECT_MODEL_ERROR(open(), "two.safetensors: expected a regular file, found a directory");
  std::filesystem::remove(folder_.path() / "two.safetensors");
  ASSERT_EQ(::mkfifo((folder_.path() / "two.safetensors").c_str(), 0600), 0);
  EXPECT_MODEL_ERROR(open(), "two.safetensors: expected a regular file, found a FIFO");
  std::filesystem::remove(folder_.path() / "two.safetensors");
  std::filesystem::create_symlink("/dev/zero", folder_.path() / "two.safetensors");
  EXPECT_MODEL_ERROR(open(), "two.safetensors: expected a regular file, found a device");
}

TEST_F(CheckpointTest, LoadsWithProgressAndNoticesTruncation) {
  write_single(tiny_tensors());
  const Checkpoint checkpoint = open();
  const auto bytes =
      static_cast<int64_t>(std::filesystem::file_size(folder_.path() / "model.safetensors"));
  std::vector<int64_t> done;
  checkpoint.load_all([&](int64_t now, int64_t total) {
    EXPECT_EQ(total, bytes);
    done.push_back(now);
  });
  ASSERT_FALSE(done.empty());
  EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
  EXPECT_EQ(done.back(), bytes);
  EXPECT_THROW(checkpoint.load_all([](int64_t, int64_t) { throw Cancelled("stop"); }), Cancelled);
  checkpoint.load_all();
  checkpoint.verify();

  std::filesystem::resize_file(folder_.path() / "model.safetensors", 100);
  EXPECT_MODEL_ERROR(checkpoint.verify(), "model.safetensors: changed size while it is in use");
  EXPECT_MODEL_ERROR(checkpoint.load_all(), "changed size while it is in use");
}

TEST(SharedCheckpointTest, OpensTrainedModels) {
  const std::filesystem::path models = testing::test_models();
  if (!std::filesystem::exists(models)) GTEST_SKIP() << models << " is not there";
  const Checkpoint story = Checkpoint::open(models / "story");
  EXPECT_TRUE(story.config().tie_word_embeddings);
  EXPECT_EQ(story.embedding().name, "lm_head.weight");
  EXPECT_EQ(story.config().head_dim, 16);
  story.load_all();
  const Checkpoint stories = Checkpoint::open(models / "stories260K");
  EXPECT_EQ(stories.embedding().name, "model.embed_tokens.weight");
  EXPECT_EQ(stories.config().n_layers, 5);
}

}  // namespace
}  // namespace mustafar
