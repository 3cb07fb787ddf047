// profile="auto": calibrated once per model on a text that ships with the library, then kept in the
// user's cache folder.
#pragma once

#include <memory>

#include "mustafar/profile.h"

namespace mustafar {

// From the model itself, the cache folder, or a new calibration, in this order. Threads that ask
// for one model's at once wait for each other; processes work side by side and either's file stays.
// costs: with k_cost and v_cost, which a profile that is there without them gains.
std::shared_ptr<const Profile> auto_profile(const Model& model, const ProfileHooks& hooks,
                                            bool costs = false);

}  // namespace mustafar
