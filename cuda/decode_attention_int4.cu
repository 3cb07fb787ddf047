// Decode attention over int4 values with an f16 or bf16 tail (decode_attention.cuh).
#include "cuda/decode_attention.cuh"

namespace mustafar::cuda {
namespace {

template <DType kTail>
void run(const AttentionArgs& args, Stream stream) {
  if (args.head_dim == 64) {
    launch_decode<kTail, 4, 64, 0, 0>(args, stream);
  } else {
    launch_decode<kTail, 4, 128, 0, 0>(args, stream);
  }
}

}  // namespace

bool decode_attention_int4(const AttentionArgs& args, Stream stream) {
  if (args.tail_dtype == DType::kF16) {
    run<DType::kF16>(args, stream);
  } else {
    run<DType::kBF16>(args, stream);
  }
  return true;
}

}  // namespace mustafar::cuda
