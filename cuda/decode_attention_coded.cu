// Decode kernels for coded rows of 2, 3 and 4 bits a dim, and of 2.5 at head_dim 128.
#include "cuda/decode_attention.cuh"

namespace mustafar::cuda {
namespace {

// Starts the kernel for rows of one of kWords words; false where there is none.
template <DType kTail, int kDim, int... kWords>
bool launch_words(const AttentionArgs& args, Stream stream) {
  const int words = args.layout.k.row_bytes / 4;
  const auto launch_if = [&]<int kRowWords>() {
    if (words != kRowWords) return false;
    if (args.n_heads / args.n_kv_heads > kSetQueries) {
      launch_shape<CodedShape<kTail, kDim, kRowWords, 2>>(args, stream);
    } else {
      launch_shape<CodedShape<kTail, kDim, kRowWords, 1>>(args, stream);
    }
    return true;
  };
  return (launch_if.template operator()<kWords>() || ...);
}

template <DType kTail>
bool launch_coded(const AttentionArgs& args, Stream stream) {
  return args.head_dim == 64 ? launch_words<kTail, 64, 4, 6, 8>(args, stream)
                             : launch_words<kTail, 128, 8, 10, 12, 16>(args, stream);
}

}  // namespace

bool decode_attention_coded(const AttentionArgs& args, Stream stream) {
  if (args.layout.k != args.layout.v) return false;
  return args.tail_dtype == DType::kF16 ? launch_coded<DType::kF16>(args, stream)
                                        : launch_coded<DType::kBF16>(args, stream);
}

}  // namespace mustafar::cuda
