// The instruction sets that CPU kernels are written for, and the choice among them at run time.
#pragma once

#include <vector>

namespace mustafar {

// Ordered: on x86 each name implies the ones before it.
enum class Isa {
  kScalar,      // plain C++, the reference
  kAvx2,        // AVX2, FMA, F16C, BMI2
  kAvx512,      // AVX-512 F, BW, VL, DQ, VNNI, VBMI, VBMI2
  kAvx512Bf16,  // the same and AVX512_BF16
  kAmx,   // the same and AMX-TILE, AMX-BF16, AMX-INT8. Processors that have it take four times
          // as long for a dot product of AVX512_BF16 as for an FMA, so GEMV uses the latter
  kNeon,  // AArch64 Advanced SIMD
};

// Every instruction set that this processor and operating system run, the plain one first. On Linux
// asks once for the leave to use AMX's tile registers, which a process starts without.
std::vector<Isa> available_isas();

// The best available one, or the one that the environment variable MUSTAFAR_ISA names (scalar,
// avx2, avx512, avx512bf16, amx, neon). Throws std::invalid_argument for an unknown name or one
// that can't run.
Isa detect_isa();

// As MUSTAFAR_ISA spells it.
const char* isa_name(Isa isa);

// For people: "AVX-512 BF16".
const char* isa_description(Isa isa);

}  // namespace mustafar
