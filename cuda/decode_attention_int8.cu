// Decode attention over int8 values with an f16 or bf16 tail (decode_attention.cuh).
#include "cuda/decode_attention.cuh"

namespace mustafar::cuda {
namespace {

template <DType kTail>
void run(const AttentionArgs& args, Stream stream) {
  const SlotLayout& k = args.layout.k;
  const SlotLayout& v = args.layout.v;
  if (args.head_dim == 64) {
    launch_decode<kTail, 8, 64, 0, 0>(args, stream);
  } else if (k.group == 32 && v.group == 16 && k.keep == 12 && v.keep == 4) {
    launch_decode<kTail, 8, 128, 12, 4>(args, stream);
  } else {
    launch_decode<kTail, 8, 128, 0, 0>(args, stream);
  }
}

}  // namespace

bool decode_attention_int8(const AttentionArgs& args, Stream stream) {
  if (args.tail_dtype == DType::kF16) {
    run<DType::kF16>(args, stream);
  } else {
    run<DType::kBF16>(args, stream);
  }
  return true;
}

}  // namespace mustafar::cuda
