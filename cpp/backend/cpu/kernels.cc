#include "backend/cpu/kernels.h"

#include "backend/cpu/attention/coded_kernels.h"
#include "backend/cpu/attention/unpack.h"

namespace mustafar {
namespace {

#if defined(__x86_64__)
// gemv of AVX-512, but for bf16 weights.
template <void (*kBF16)(const GemvArgs&)>
void gemv_with_bf16(const GemvArgs& args) {
  static const auto other = avx512_kernels().gemv;
  args.dtype == DType::kBF16 ? kBF16(args) : other(args);
}
#endif

}  // namespace

Kernels select_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2: {
      Kernels kernels = avx2_kernels();
      kernels.gemv_int8_input = gemv_int8_input_avx2;
      kernels.quantise_tile = quantise_tile_avx2;
      return kernels;
    }
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
    case Isa::kAmx: {
      Kernels kernels = avx512_kernels();
      kernels.unpack_slot = unpack_slot_avx512;
      kernels.unpack_coded_slot = unpack_coded_slot_avx512;
      kernels.gemv_int8_input = gemv_int8_input_avx512;
      kernels.quantise_tile = quantise_tile_avx512;
      kernels.rounds_prompts = isa != Isa::kAmx;  // whose tiles multiply prompts faster
      if (isa == Isa::kAvx512Bf16) {
        kernels.bf16 = avx512bf16_gemm_kernels();
        kernels.gemv = gemv_with_bf16<gemv_bf16_avx512bf16>;
        kernels.terms_bytes = gemv_terms_bytes_avx512bf16;
        kernels.split_terms = gemv_split_terms_avx512bf16;
      }
      if (isa == Isa::kAmx) {
        kernels.bf16 = amx_gemm_kernels();
        kernels.gemv = gemv_with_bf16<gemv_bf16_amx>;
        kernels.terms_bytes = gemv_terms_bytes_amx;
        kernels.split_terms = gemv_split_terms_amx;
        kernels.gemv_int8_input = gemv_int8_input_amx;
        kernels.int8_tiles_bytes = int8_tiles_bytes_amx;
        kernels.tile_int8_input = tile_int8_input_amx;
      }
      return kernels;
    }
#elif defined(__aarch64__)
    case Isa::kNeon:
      return neon_kernels();
#endif
    default:
      return scalar_kernels();
  }
}

}  // namespace mustafar
