// Decode attention over int8 values with an f16 or bf16 tail (decode_attention.cuh).
#include "cuda/decode_attention.cuh"

namespace mustafar::cuda {

void decode_attention_int8(const AttentionArgs& args, Stream stream) {
  launch_codes<8>(args, stream);
}

}  // namespace mustafar::cuda
