// What config.json says about how a folder's weights are quantised ("quantization_config").
//
// It says which numbers tensors hold; the tensors themselves say which matrices are quantised, as
// the lists of modules that are not (ignore, modules_to_not_convert) follow from them. What would
// change the result and is not read is refused by name. Activations are never rounded as the config
// asks: what it says about them (dynamic or static int8 or fp8) would only lose precision.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace mustafar {

class Fields;

// How one kind of matrix is quantised.
struct QuantScheme {
  enum class Scales : uint8_t { kTensor, kRow, kGroups, kBlocks };

  bool is_float = false;  // fp8, e4m3
  int32_t bits = 0;       // 4 or 8
  Scales scales = Scales::kTensor;
  int32_t block_rows = 1;  // of kBlocks
  int32_t group = 0;       // inputs, of kGroups and kBlocks
  bool zero_points = false;

  int64_t n_groups(int64_t cols) const { return group > 0 ? (cols + group - 1) / group : 1; }
  // Of compressed-tensors and fp8: outputs before groups.
  std::vector<int64_t> scale_shape(int64_t rows, int64_t cols) const;
};

struct Quantisation {
  enum class Method : uint8_t { kNone, kCompressedTensors, kAwq, kGptq, kFp8 };

  Method method = Method::kNone;
  std::vector<QuantScheme> schemes;  // that matrices may have
  bool gptq_zeros_less_one = false;  // GPTQ's first version stores zero points minus one
  bool gptq_needs_index = false;     // desc_act: inputs are in groups by g_idx
  std::string name() const;          // as in "gptq", "" where there is none
};

// Of the config that `fields` reads. Throws ModelError naming the field that is not supported.
Quantisation read_quantisation(const Fields& fields);
// Of a folder's config.json.
Quantisation read_quantisation(const std::filesystem::path& folder);

}  // namespace mustafar
