#include "runtime/auto_profile.h"

#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "mustafar/calibration.h"
#include "mustafar/error.h"
#include "runtime/calibration_pieces.h"
#include "runtime/calibration_text.h"
#include "runtime/layer_costs.h"
#include "runtime/model_impl.h"

namespace mustafar {
namespace {

namespace fs = std::filesystem;

// Part of a kept profile's file name, as the text's hash is: to be raised when auto_options()
// change, so that releases which calibrate differently each keep their own file.
constexpr const char* kVersion = "2";
constexpr int64_t kCalibrationTokens = 8192;

CalibrationOptions auto_options() {
  CalibrationOptions options;
  options.kind = "balanced";
  options.scale_power = 0.5;
  options.max_tokens = kCalibrationTokens;
  return options;
}

// $XDG_CACHE_HOME or ~/.cache; none where neither is set. Relative paths do not count (XDG Base
// Directory Specification).
std::optional<fs::path> cache_folder() {
  for (const auto& [variable, below] : {std::pair{"XDG_CACHE_HOME", ""}, {"HOME", ".cache"}}) {
    const char* value = std::getenv(variable);
    if (value != nullptr && fs::path(value).is_absolute()) {
      return fs::path(value) / below / "mustafar" / "profiles";
    }
  }
  return std::nullopt;
}

// The kept profile, or null; reason: why a file that is there can't be used.
std::shared_ptr<const Profile> kept_profile(const fs::path& file, const Model& model,
                                            const std::string& kind, const std::string& text_hash,
                                            std::string& reason) {
  std::error_code ignored;
  if (!fs::exists(file, ignored)) return nullptr;
  try {
    auto profile = Profile::load(file);
    profile->check(model.config(), model.impl()->fingerprint);
    if (profile->kind == kind && profile->text_hash == text_hash) return profile;
    reason = file.string() + ": calibrated differently";
  } catch (const Error& error) {
    reason = error.what();
  }
  return nullptr;
}

void keep(const Profile& profile, const std::optional<fs::path>& folder, const fs::path& file,
          const ProfileHooks& hooks) {
  std::string reason = "neither XDG_CACHE_HOME nor HOME is set";
  try {
    if (folder) {
      fs::create_directories(*folder);
      profile.save(file);
      return;
    }
  } catch (const fs::filesystem_error& error) {
    reason = error.what();
  } catch (const Error& error) {
    reason = error.what();
  }
  if (hooks.warning) {
    hooks.warning("the calibrated KV profile could not be kept and will be made again: " + reason);
  }
}

}  // namespace

std::shared_ptr<const Profile> auto_profile(const Model& model, const ProfileHooks& hooks,
                                            bool costs) {
  Model::Impl& engine = *model.impl();
  const std::lock_guard lock(engine.auto_profile_mutex);
  const auto suffices = [costs](const std::shared_ptr<const Profile>& profile) {
    return profile != nullptr && (!costs || profile->has_costs());
  };
  if (suffices(engine.auto_profile)) return engine.auto_profile;

  CalibrationOptions options = auto_options();
  options.progress = hooks.progress;
  std::vector<Prompt> pieces;
  for (const std::string_view text : calibration_texts()) pieces.emplace_back(std::string(text));
  const auto ids = calibration_pieces(model, pieces, options.max_tokens);
  pieces.assign(ids.begin(), ids.end());

  const std::optional<fs::path> folder = cache_folder();
  const fs::path file = folder.value_or(fs::path()) /
                        (engine.fingerprint + "-" + options.kind + "-" + kVersion + ".safetensors");
  std::string reason;
  if (folder) {
    auto kept = kept_profile(file, model, options.kind, calibration_text_hash(ids), reason);
    if (suffices(kept) || engine.auto_profile == nullptr) engine.auto_profile = std::move(kept);
    if (suffices(engine.auto_profile)) return engine.auto_profile;
  }
  const bool transform = engine.auto_profile == nullptr;  // that is missing, else the costs alone
  if (hooks.note) {
    hooks.note(std::string(transform ? "calibrating a KV profile for this model"
                                     : "measuring what errors in every layer cost") +
               ", once" + (reason.empty() ? "" : " (" + reason + ")") +
               (folder ? "; kept as " + file.string() : ""));
  }
  Profile profile;
  if (transform) {
    options.budget = costs;
    profile = calibrate(model, pieces, options);
  } else {
    profile = *engine.auto_profile;
    measure_costs(model, ids, profile, [&](int64_t done, int64_t total) {
      if (hooks.progress) hooks.progress(done, total);
    });
  }
  keep(profile, folder, file, hooks);
  engine.auto_profile = std::make_shared<const Profile>(std::move(profile));
  return engine.auto_profile;
}

}  // namespace mustafar
