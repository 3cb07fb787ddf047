// Decode attention for AVX-512 with BF16: decode_avx512.cc's templates, with vdpbf16ps.
#include "backend/cpu/attention/decode_avx512_heads.h"

namespace mustafar {

void decode_runs_avx512bf16(DecodeRuns runs) { run_tiles<FmaProducts>(runs); }

}  // namespace mustafar
