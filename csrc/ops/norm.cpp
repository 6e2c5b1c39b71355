#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {
namespace {

void check_rows_match(const Rows& rows, const char* name, const Rows& input) {
  require(rows.count == input.count && rows.size == input.size, name, ": expected the ", input.count, " x ", input.size,
          " elements of input, got ", rows.count, " x ", rows.size);
}

// Rows in two strides: heads within tokens of a wider matrix.
struct NestedRows {
  Rows inner;
  int64_t outer_count, outer_stride;

  int64_t count() const { return inner.count * outer_count; }
  int64_t extent() const { return (outer_count - 1) * outer_stride + (inner.count - 1) * inner.stride + inner.size; }
};

NestedRows nested_rows_of(const Tensor& tensor, const char* name) {
  const bool nested = tensor.dim() == 3 && tensor.size(0) > 1 && tensor.size(1) > 1 &&
                      tensor.stride(0) != tensor.size(1) * tensor.stride(1);
  if (!nested) {
    const Rows rows = rows_of(tensor, name);
    return {rows, 1, 0};
  }
  Argument(tensor, name).unit_last_stride();
  return {{tensor.size(1), tensor.size(2), tensor.stride(1)}, tensor.size(0), tensor.stride(0)};
}

// `out` is `input` itself, or begins behind its end, or ends before its beginning.
void check_same_or_apart(const Tensor& out, const NestedRows& out_rows, const Tensor& input, const NestedRows& rows) {
  if (out.numel() == 0 || input.numel() == 0) return;
  if (rows.outer_count == 1 && out_rows.outer_count == 1)
    return check_apart(out, "out", out_rows.inner, input, "input", rows.inner, InPlace::kYes);
  const auto begin = reinterpret_cast<uintptr_t>(input.const_data_ptr());
  const auto out_begin = reinterpret_cast<uintptr_t>(out.const_data_ptr());
  const bool same_rows = out_rows.inner.stride == rows.inner.stride && out_rows.outer_count == rows.outer_count &&
                         out_rows.outer_stride == rows.outer_stride;
  const bool apart = out_begin >= begin + rows.extent() * input.element_size() ||
                     begin >= out_begin + out_rows.extent() * out.element_size();
  require(apart || (out_begin == begin && same_rows), "out: expected memory apart from that of input");
}

// Everything but the residual.
RmsNormParams norm_params(const Tensor& out, const Tensor& input, const Tensor& weight, double eps) {
  Argument(input, "input").floating();
  const NestedRows rows = nested_rows_of(input, "input");
  Size hidden_size{"hidden_size", rows.inner.size, "input"};
  Argument(weight, "weight").on_device_of(input, "input").same_dtype(input, "input").shape({&hidden_size}).contiguous();
  Argument(out, "out").on_device_of(input, "input").same_dtype(input, "input").written();
  const NestedRows out_rows = nested_rows_of(out, "out");
  const bool one_nesting =
      rows.outer_count == 1 || out_rows.outer_count == 1 || rows.outer_count == out_rows.outer_count;
  require(out_rows.count() == rows.count() && out_rows.inner.size == rows.inner.size && one_nesting,
          "out: expected the ", rows.count(), " x ", rows.inner.size, " elements of input, got ", out_rows.count(),
          " x ", out_rows.inner.size);
  check_same_or_apart(out, out_rows, input, rows);
  require(eps >= 0, "eps: expected a value >= 0, got ", eps);
  // Where one of both lies in one stride, it is a special case of the other's two.
  const int64_t inner_rows = rows.outer_count > 1 ? rows.inner.count : out_rows.inner.count;
  const auto outer_stride = [&](const NestedRows& r) {
    return r.outer_count > 1 ? r.outer_stride : inner_rows * r.inner.stride;
  };
  return RmsNormParams{
      .out = out.mutable_data_ptr(),
      .residual_out = nullptr,
      .input = input.const_data_ptr(),
      .residual = nullptr,
      .weight = weight.const_data_ptr(),
      .num_rows = rows.inner.size ? rows.count() : 0,
      .hidden_size = rows.inner.size,
      .inner_rows = inner_rows,
      .out_stride = out_rows.inner.stride,
      .residual_out_stride = 0,
      .input_stride = rows.inner.stride,
      .residual_stride = 0,
      .out_outer_stride = outer_stride(out_rows),
      .input_outer_stride = outer_stride(rows),
      .eps = static_cast<float>(eps),
      .dtype = to_dtype(input.scalar_type(), "input"),
  };
}

constexpr auto rms_norm_kernel = [](const auto& kernels) { return kernels.rms_norm; };

}  // namespace

void rms_norm(Tensor out, Tensor input, Tensor weight, double eps) {
  launch(input, rms_norm_kernel, norm_params(out, input, weight, eps));
}

void fused_add_rms_norm(Tensor out, Tensor residual_out, Tensor input, Tensor residual, Tensor weight, double eps) {
  RmsNormParams params = norm_params(out, input, weight, eps);
  const Rows input_rows = rows_of(input, "input");
  Argument(residual, "residual").on_device_of(input, "input").same_dtype(input, "input");
  Argument(residual_out, "residual_out").on_device_of(input, "input").same_dtype(input, "input").written();
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
  launch(input, rms_norm_kernel, params);
}

}  // namespace teco::ops
