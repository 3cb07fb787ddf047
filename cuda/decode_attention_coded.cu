// Decode kernels for coded rows of 3 and 4 bits a dim.
#include "cuda/decode_attention.cuh"

namespace mustafar::cuda {
namespace {

template <DType kTail>
bool launch_coded(const AttentionArgs& args, Stream stream) {
  const int words = args.layout.k.row_bytes / 4;
  if (args.head_dim == 64) {
    if (words == 6) return launch_shape<CodedShape<kTail, 64, 6>>(args, stream), true;
    if (words == 8) return launch_shape<CodedShape<kTail, 64, 8>>(args, stream), true;
    return false;
  }
  if (words == 12) return launch_shape<CodedShape<kTail, 128, 12>>(args, stream), true;
  if (words == 16) return launch_shape<CodedShape<kTail, 128, 16>>(args, stream), true;
  return false;
}

}  // namespace

bool decode_attention_coded(const AttentionArgs& args, Stream stream) {
  if (args.layout.k != args.layout.v) return false;
  return args.tail_dtype == DType::kF16 ? launch_coded<DType::kF16>(args, stream)
                                        : launch_coded<DType::kBF16>(args, stream);
}

}  // namespace mustafar::cuda
