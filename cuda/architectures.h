// Which GPUs this build has code for.
#pragma once

namespace mustafar::cuda {

// Whether a kernel of ours can be loaded on the current device. elementwise.cu has it.
bool has_code_for_device();

}  // namespace mustafar::cuda

#ifndef MUSTAFAR_CUDA_ARCHITECTURES
#define MUSTAFAR_CUDA_ARCHITECTURES "unknown architectures"
#endif
