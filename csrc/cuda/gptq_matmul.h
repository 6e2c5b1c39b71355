// The two ways of multiplying by a GPTQ weight; multiply_gptq chooses by the shape.
#pragma once

#include "cuda/gptq_layout.h"

namespace teco::cuda {

// Tensor cores, for many rows of fp16 or bf16: weights are rounded to that dtype.
Status multiply_gptq_tensor_cores(const GptqMatmulParams& p, const PanelBest& best, void* stream);

}  // namespace teco::cuda
