// Decode attention for AVX-512 with VNNI, VBMI and VBMI2.
#include "backend/cpu/attention/decode_avx512_heads.h"

namespace mustafar {

void decode_runs_avx512(DecodeRuns runs) { run_tiles<FmaProducts>(runs); }

}  // namespace mustafar
