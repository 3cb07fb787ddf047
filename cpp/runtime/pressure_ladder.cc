#include "runtime/pressure_ladder.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "mustafar/error.h"
#include "mustafar/profile.h"
#include "runtime/model_impl.h"

namespace mustafar {
namespace {

// From the largest down. "mustafar" is none of them: it takes more bytes than "balanced" and loses
// more, so that a cache on its way down would lose twice for nothing.
constexpr const char* kRungs[] = {"lossless", "balanced", "small"};

bool codes_rows(const std::shared_ptr<const Profile>& profile) {
  return profile != nullptr && !profile->k_sigma.empty() && !profile->v_sigma.empty();
}

}  // namespace

std::vector<KVConfig> pressure_ladder(const Model& model, const KVConfig& kv) {
  Model::Impl& engine = *model.impl();
  if (!engine.backend->expands()) {
    throw DeviceError("on_pressure \"sparser\" is not supported on device \"" +
                      engine.backend->device() +
                      "\", which has no kernels that bring a cache to another setting: use "
                      "\"pause\", or device \"cpu\"");
  }
  int64_t page_bytes = engine.cache_spec(kv)->layout.page_bytes;
  std::vector<KVConfig> ladder;
  for (const char* name : kRungs) {
    const KVPreset& preset = find_kv_preset(name);
    KVConfig rung = preset.config;
    rung.window = kv.window;
    rung.sink_tokens = kv.sink_tokens;
    try {
      // A basis that rows are in already costs them nothing.
      rung.profile = rung.coded() && codes_rows(kv.profile)
                         ? kv.profile
                         : Profile::resolve(preset.profile, model);
      const int64_t smaller = engine.cache_spec(rung)->layout.page_bytes;
      if (smaller >= page_bytes) continue;
      page_bytes = smaller;
      ladder.push_back(rung);
    } catch (const TokenizerError&) {         // nothing to calibrate a basis with
    } catch (const std::invalid_argument&) {  // heads of a size that the preset does not take
    }
  }
  if (ladder.empty()) {
    throw std::invalid_argument(
        "on_pressure \"sparser\" needs a preset that is smaller than the engine's setting, and "
        "there is none: use \"pause\", or a setting with more bits");
  }
  return ladder;
}

}  // namespace mustafar
