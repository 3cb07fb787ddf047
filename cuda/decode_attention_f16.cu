// Decode attention over f16 values with a f16 tail (decode_attention.cuh).
#include "cuda/decode_attention.cuh"

namespace mustafar::cuda {

void decode_attention_f16(const AttentionArgs& args, Stream stream) {
  launch_values<DType::kF16, 16>(args, stream);
}

}  // namespace mustafar::cuda
