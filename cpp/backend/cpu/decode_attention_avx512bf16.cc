// Decode attention for AVX-512 with BF16: the same with vdpbf16ps.
#include "backend/cpu/decode_attention_avx512_run.h"

namespace mustafar {

void decode_run_avx512bf16(const DecodeRun& run) { run_tiles(run); }

}  // namespace mustafar
