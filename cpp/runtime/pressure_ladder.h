// The settings that an engine's caches may be brought to where memory is short.
#pragma once

#include <vector>

#include "mustafar/kv_config.h"
#include "mustafar/model.h"

namespace mustafar {

// Presets with smaller pages than kv's, the largest first, with kv's window and sinks. Presets that
// the model can't have are left out. Throws std::invalid_argument where none is left, DeviceError
// where the device can't bring a cache to another setting; what else is wrong with kv, as a session
// does.
std::vector<KVConfig> pressure_ladder(const Model& model, const KVConfig& kv);

}  // namespace mustafar
