// Calibrates a KV transform: a basis per layer and KV head in which pruning and quantising cost
// less.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "mustafar/model.h"
#include "mustafar/profile.h"

namespace mustafar {

struct CalibrationOptions {
  // "balanced": errors count in the metric of what the vectors meet (queries, or W_o); "klt": plain
  // energy; "hadamard": no calibration, texts are not looked at.
  std::string kind = "balanced";
  double balance = 1.0;  // the metric's exponent, [0, 1]; 0 makes balanced the same as klt
  // Power of every dim's standard deviation that it is divided by before it is quantised, [0, 1],
  // ranking undone; about 0.5 helps int4, 0 is off.
  double scale_power = 0.0;
  int64_t max_tokens = 16384;  // use at most so many; -1: all
  // First tokens of every piece of text that statistics leave out: attention sinks, whose keys are
  // unlike all others.
  int32_t skip_tokens = 4;
  // Contexts that the profile is for, in tokens. RoPE moves the energy of keys between dims with
  // position: a dim counts with the most that it has where the texts begin at 0, 1024, 1536, 2048,
  // 3072 and so on, below this. 0: the model's own context; 1: where the texts stand.
  int64_t context = 0;
  // Also measures what errors in every layer cost (Profile::k_cost, v_cost), which settings with a
  // budget need: 2 n_layers + 2 scorings of 1,024 tokens of the longest text, of at least 200. Not
  // for hadamard.
  bool budget = false;
  // Called now and then with tokens done and in all; what it throws ends the work.
  std::function<void(int64_t done, int64_t total)> progress = {};
};

// Gathers statistics over texts on the model's own device and makes a profile from them, which fits
// this model alone (by its fingerprint). Texts longer than the model's context are cut into pieces.
// Throws std::invalid_argument for an option out of range, a bad token id or too little text;
// TokenizerError for texts where the model has no tokenizer; DeviceError for a budget where the
// device needs layers to be alike; OutOfMemory.
Profile calibrate(const Model& model, std::span<const Prompt> texts,
                  const CalibrationOptions& options = {});

}  // namespace mustafar
