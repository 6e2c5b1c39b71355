#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace teco::ops {
namespace {

void check_rows_match(const Rows& rows, const char* name, const Rows& input) {
  require(rows.count == input.count && rows.size == input.size, name, ": expected the ", input.count, " x ", input.size,
          " elements of input, got ", rows.count, " x ", rows.size);
}

RmsNormParams norm_params(const Tensor& out, const Tensor& input, const Tensor& weight, double eps) {
  Argument(input, "input").on_cpu().floating();
  const Rows rows = rows_of(input, "input");
  Size hidden_size{"hidden_size", rows.size, "input"};
  Argument(weight, "weight").on_cpu().same_dtype(input, "input").shape({&hidden_size}).contiguous();
  Argument(out, "out").on_cpu().same_dtype(input, "input").written();
  const Rows out_rows = rows_of(out, "out");
  check_rows_match(out_rows, "out", rows);
  check_apart(out, "out", out_rows, input, "input", rows, InPlace::kYes);
  require(eps >= 0, "eps: expected a value >= 0, got ", eps);
  return RmsNormParams{
      .out = out.mutable_data_ptr(),
      .residual_out = nullptr,
      .input = input.const_data_ptr(),
      .residual = nullptr,
      .weight = weight.const_data_ptr(),
      .num_rows = rows.size ? rows.count : 0,
      .hidden_size = rows.size,
      .out_stride = out_rows.stride,
      .residual_out_stride = 0,
      .input_stride = rows.stride,
      .residual_stride = 0,
      .eps = static_cast<float>(eps),
      .dtype = to_dtype(input.scalar_type(), "input"),
  };
}

}  // namespace

void rms_norm(Tensor out, Tensor input, Tensor weight, double eps) {
  cpu::kernels()->rms_norm(norm_params(out, input, weight, eps), num_threads());
}

void fused_add_rms_norm(Tensor out, Tensor residual_out, Tensor input, Tensor residual, Tensor weight, double eps) {
  RmsNormParams params = norm_params(out, input, weight, eps);
  const Rows input_rows = rows_of(input, "input");
  Argument(residual, "residual").on_cpu().same_dtype(input, "input");
  Argument(residual_out, "residual_out").on_cpu().same_dtype(input, "input").written();
  const Rows residual_rows = rows_of(residual, "residual"), residual_out_rows = rows_of(residual_out, "residual_out");
  check_rows_match(residual_rows, "residual", input_rows);
  check_rows_match(residual_out_rows, "residual_out", input_rows);
  const Rows out_rows = rows_of(out, "out");
  check_apart(out, "out", out_rows, residual, "residual", residual_rows, InPlace::kYes);
  check_apart(out, "out", out_rows, residual_out, "residual_out", residual_out_rows, InPlace::kNo);
  check_apart(residual_out, "residual_out", residual_out_rows, input, "input", input_rows, InPlace::kYes);
  check_apart(residual_out, "residual_out", residual_out_rows, residual, "residual", residual_rows, InPlace::kYes);
  params.residual = residual.const_data_ptr();
  params.residual_stride = residual_rows.stride;
  params.residual_out = residual_out.mutable_data_ptr();
  params.residual_out_stride = residual_out_rows.stride;
  cpu::kernels()->rms_norm(params, num_threads());
}

}  // namespace teco::ops
