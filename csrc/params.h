// One plain struct per operator: pointers, strides, sizes, scalars. Shared by every backend; knows nothing.
// Strides and sizes are int64 and count elements. "Rows" are the leading dimensions of a tensor, flattened.
#pragma once

#include <cstdint>

namespace teco {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kInt8, kFloat8E4M3 };

// out[r, i] = input[r, i] * weight[i] / sqrt(mean_i(input[r, i]^2) + eps)
// With a residual: first residual_out = input + residual (rounded to the tensors' dtype), then the norm of that sum.
struct RmsNormParams {
  void* out;
  void* residual_out;    // null without a residual
  const void* input;     // [num_rows, hidden_size]
  const void* residual;  // [num_rows, hidden_size] or null
  const void* weight;    // [hidden_size]
  int64_t num_rows, hidden_size;
  int64_t out_stride, residual_out_stride, input_stride, residual_stride;
  float eps;
  DType dtype;
};

// out[r, i] = silu(input[r, i]) * input[r, size + i]
struct SiluAndMulParams {
  void* out;          // [num_rows, size]
  const void* input;  // [num_rows, 2 * size]
  int64_t num_rows, size;
  int64_t out_stride, input_stride;
  DType dtype;
};

}  // namespace teco
