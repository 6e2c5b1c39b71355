#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {

void silu_and_mul(Tensor out, Tensor input) {
  Argument(input, "input").floating();
  Argument(out, "out").on_device_of(input, "input").same_dtype(input, "input").written();
  const Rows rows = rows_of(input, "input"), out_rows = rows_of(out, "out");
  require(rows.size % 2 == 0, "input: expected an even last dimension (gate, then up), got ", rows.size);
  require(out_rows.count == rows.count && out_rows.size == rows.size / 2, "out: expected ", rows.count, " x ",
          rows.size / 2, " elements, got ", out_rows.count, " x ", out_rows.size);
  check_apart(out, "out", out_rows, input, "input", rows, InPlace::kYes);
  const SiluAndMulParams params = {
      .out = out.mutable_data_ptr(),
      .input = input.const_data_ptr(),
      .num_rows = out_rows.size ? rows.count : 0,
      .size = out_rows.size,
      .out_stride = out_rows.stride,
      .input_stride = rows.stride,
      .dtype = to_dtype(input.scalar_type(), "input"),
  };
  launch(input, [](const auto& kernels) { return kernels.silu_and_mul; }, params);
}

}  // namespace teco::ops
