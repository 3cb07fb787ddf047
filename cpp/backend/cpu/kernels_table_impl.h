// The table of all kernels over Simd. Included last by kernels_*.cc.
#pragma once

#include "backend/cpu/kernels.h"
#include "format/pack.h"

namespace mustafar {
namespace {

Kernels make_kernels() {
  Kernels k;
  k.rms_norm = rms_norm;
  k.silu_mul = silu_mul;
  k.store = store;
  k.scale = scale;
  k.rope = rope;
  k.multiply_row = multiply_row;
  k.to_f32 = to_f32;
  k.from_f32 = from_f32;
  k.gemv = gemv;
  k.gemv_quantised = gemv_quantised;
  k.gemv_int8_input = gemv_int8_input_plain;
  k.quantise_input = quantise_input;
  k.quantise_tile = quantise_tile_plain;
  k.unpack_slot = unpack_slot;
  k.row_max = row_max;
  k.exp_sum = exp_sum;
  k.divergence = divergence;
  k.unpack_coded_slot = unpack_coded_slot;
  k.f32 = make_gemm_kernels<StepF32>();
  return k;
}

}  // namespace
}  // namespace mustafar
