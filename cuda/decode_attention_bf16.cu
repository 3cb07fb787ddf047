// Decode attention over bf16 values with a bf16 tail (decode_attention.cuh).
#include "cuda/decode_attention.cuh"

namespace mustafar::cuda {

void decode_attention_bf16(const AttentionArgs& args, Stream stream) {
  launch_values<DType::kBF16, 16>(args, stream);
}

}  // namespace mustafar::cuda
