// Decode attention over f16 values with a f16 tail (decode_attention.cuh).
#include "cuda/decode_attention.cuh"

namespace mustafar::cuda {

bool decode_attention_f16(const AttentionArgs& args, Stream stream) {
  const SlotLayout& k = args.layout.k;
  const SlotLayout& v = args.layout.v;
  const bool first_class = args.head_dim == 128 && k.group == 32 && v.group == 16;
  if (first_class && k.keep == 12 && v.keep == 4) {
    launch_decode<DType::kF16, 16, 128, 12, 4>(args, stream);
  } else if (first_class && k.keep == 16 && v.keep == 8) {
    launch_decode<DType::kF16, 16, 128, 16, 8>(args, stream);
  } else if (args.head_dim == 128) {
    launch_decode<DType::kF16, 16, 128, 0, 0>(args, stream);
  } else {
    launch_decode<DType::kF16, 16, 64, 0, 0>(args, stream);
  }
  return true;
}

}  // namespace mustafar::cuda
