// Decode attention for AVX-512 with VNNI, VBMI and VBMI2.
#include "backend/cpu/decode_attention_avx512_run.h"

namespace mustafar {

void decode_run_avx512(const DecodeRun& run) { run_tiles(run); }

}  // namespace mustafar
