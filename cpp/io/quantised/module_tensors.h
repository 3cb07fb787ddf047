// The tensors of one module of a checkpoint ("model.layers.0.mlp.up_proj"), as readers of quantised
// matrices take them, with errors that name what they find.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "io/quantised/stored_matrix.h"

namespace mustafar {

class ModuleTensors {
 public:
  // Fills the part and returns true where the checkpoint has a tensor of that name.
  using Find = std::function<bool(const std::string& name, StoredPart& part)>;

  // where: the folder, for messages.
  ModuleTensors(std::string where, std::string module, Find find);

  bool has(const char* suffix) const;
  std::string_view dtype(const char* suffix) const;  // "" where there is no such tensor

  // The tensor, which now counts as read. Throws ModelError where it is missing.
  StoredPart take(const char* suffix);
  // The same, checked: its dtype is one of those, and its shape.
  StoredPart take(const char* suffix, std::initializer_list<std::string_view> dtypes,
                  const std::vector<int64_t>& shape);
  // Scales: f16, bf16 or f32 of a shape; one value may have no dimension, rows may lack the last.
  StoredPart take_scales(const char* suffix, const std::vector<int64_t>& shape, DType& dtype);

  // Shape of a tensor, empty where there is none.
  std::vector<int64_t> shape(const char* suffix) const;

  [[noreturn]] void fail(const StoredPart& part, const std::string& what) const;

  const std::vector<StoredPart>& taken() const { return taken_; }

 private:
  std::string where_;
  std::string module_;
  Find find_;
  std::vector<StoredPart> taken_;
};

}  // namespace mustafar
