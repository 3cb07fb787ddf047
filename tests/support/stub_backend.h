// A device that computes nothing, for tests of what only needs its memory: they override how memory
// is given and copied.
#pragma once

#include <memory>
#include <span>
#include <stdexcept>
#include <string>

#include "backend/backend.h"

namespace mustafar::testing {

class StubBackend : public Backend {
 public:
  std::string device() const override { return "stub"; }
  std::string description() const override { return "a stub"; }
  void upload(void*, const void*, int64_t) override { unused(); }
  void download(void*, const void*, int64_t) override { unused(); }
  void copy(void*, const void*, int64_t) override { unused(); }
  std::unique_ptr<Workspace> make_workspace() override { return nullptr; }
  void embed(const Weights&, std::span<const int32_t>, float*) override { unused(); }
  void project_qkv(const Weights&, int32_t, const Batch&, const float*, float*,
                   Workspace&) override {
    unused();
  }
  void attend(int32_t, const Batch&, const float*, float*, Workspace&) override { unused(); }
  void project_output(const Weights&, int32_t, const Batch&, const float*, float*,
                      Workspace&) override {
    unused();
  }
  void mlp(const Weights&, int32_t, const Batch&, float*, Workspace&) override { unused(); }
  void logits(const Weights&, const Batch&, std::span<const int32_t>, const float*, float*,
              Workspace&) override {
    unused();
  }
  void commit(std::span<const CommitStep>, int32_t, int32_t, Workspace&) override { unused(); }
  void synchronize() override {}

 private:
  static void unused() { throw std::logic_error("the stub was asked for more than memory"); }
};

}  // namespace mustafar::testing
