#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {

void embedding(Tensor out, Tensor token_ids, Tensor weight) {
  Size T{"T"}, vocab_size{"vocab_size"}, hidden_size{"hidden_size"};
  Argument(token_ids, "token_ids").on_cpu().dtype(ScalarType::Long).shape({&T}).contiguous();
  Argument(weight, "weight").on_cpu().floating().shape({&vocab_size, &hidden_size}).unit_last_stride();
  Argument(out, "out").on_cpu().floating().shape({&T, &hidden_size}).unit_last_stride().written();
  check_apart(out, "out", rows_of(out, "out"), weight, "weight", rows_of(weight, "weight"), InPlace::kNo);
  const auto* ids = token_ids.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < T.value; ++t)
    require(ids[t] >= 0 && ids[t] < vocab_size.value, "token_ids: expected 0 to ", vocab_size.value - 1,
            " (the rows of weight), got ", ids[t], " at index ", t);
  const EmbeddingParams params = {
      .out = out.mutable_data_ptr(),
      .token_ids = ids,
      .weight = weight.const_data_ptr(),
      .num_tokens = T.value,
      .hidden_size = hidden_size.value,
      .out_stride = out.stride(0),
      .weight_stride = weight.stride(0),
      .dtype = to_dtype(out.scalar_type(), "out"),
      .weight_dtype = to_dtype(weight.scalar_type(), "weight"),
  };
  launch(cpu::kernels()->embedding, params);
}

}  // namespace teco::ops
