// Decode attention over int4 values with an f16 or bf16 tail (decode_attention.cuh).
#include "cuda/decode_attention.cuh"

namespace mustafar::cuda {

void decode_attention_int4(const AttentionArgs& args, Stream stream) {
  launch_codes<4>(args, stream);
}

}  // namespace mustafar::cuda
