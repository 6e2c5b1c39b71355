// gptq_matmul with activations quantised to 8 bits, per row and block of 32 inputs.
#pragma once

#include "params.h"

namespace teco::cpu::TECO_ISA {

void gptq_matmul_int8(const GptqMatmulParams& p, int num_threads);

}  // namespace teco::cpu::TECO_ISA
