// The two ways of multiplying by a dense weight; multiply_dense chooses by the shape and the dtypes.
#pragma once

#include "cuda/matmul.h"

namespace teco::cuda {

// Tensor cores, for many rows of fp16 or bf16, by a weight of the same dtype.
Status multiply_dense_tensor_cores(const DenseMatmulParams& p, const PanelBest& best, void* stream);

}  // namespace teco::cuda
