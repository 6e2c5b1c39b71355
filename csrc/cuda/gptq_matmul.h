// The two ways of multiplying by a GPTQ weight; gptq_matmul chooses by the shape.
#pragma once

#include "cuda/gptq_layout.h"

namespace teco::cuda {

// Tensor cores, for many rows of fp16 or bf16: weights are rounded to that dtype.
Status gptq_matmul_tensor_cores(const GptqMatmulParams& p, void* stream);

}  // namespace teco::cuda
