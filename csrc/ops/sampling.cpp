#include <limits>

#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {
namespace {

// Sums of weights (see cpu/sample.cpp) fit 64 bits up to this vocabulary.
constexpr int64_t kMaxVocabSize = 1 << 22;

// The values of a tensor with one element per row, each of which must satisfy `valid`.
template <class T, class Valid>
const T* per_row(const Tensor& tensor, const char* name, const Tensor& logits, ScalarType type, Size& S,
                 const char* expected, Valid valid) {
  Argument(tensor, name).on_device_of(logits, "logits").dtype(type).shape({&S}).contiguous();
  const T* values = static_cast<const T*>(tensor.const_data_ptr());
  for (int64_t r = 0; is_readable(tensor) && r < S.value; ++r)
    require(valid(values[r]), name, ": expected ", expected, ", got ", values[r], " in row ", r);
  return values;
}

}  // namespace

void sample(Tensor out, Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed,
            Tensor offset) {
  Size S{"S"}, V{"V"};
  Argument(logits, "logits").floating().shape({&S, &V}).unit_last_stride();
  Argument(out, "out").on_device_of(logits, "logits").dtype(ScalarType::Long).shape({&S}).contiguous();
  require(V.value >= 1 && V.value <= kMaxVocabSize, "logits: expected V from 1 to 2^22, got ", V.value);
  const auto any = [](int64_t) { return true; };
  const auto is_temperature = [](float x) { return x >= 0 && x <= std::numeric_limits<float>::max(); };
  int64_t* token_ids = static_cast<int64_t*>(out.mutable_data_ptr());
  const SampleParams params = {
      .token_ids = token_ids,
      .logits = logits.const_data_ptr(),
      .temperature = per_row<float>(temperature, "temperature", logits, ScalarType::Float, S, "a finite value >= 0",
                                    is_temperature),
      .top_k = per_row<int64_t>(top_k, "top_k", logits, ScalarType::Long, S, "a value >= 1, or 0 or -1 for all",
                                [](int64_t x) { return x >= -1; }),
      .top_p = per_row<float>(top_p, "top_p", logits, ScalarType::Float, S, "0 < top_p <= 1",
                              [](float x) { return x > 0 && x <= 1; }),
      .min_p = per_row<float>(min_p, "min_p", logits, ScalarType::Float, S, "0 <= min_p <= 1",
                              [](float x) { return x >= 0 && x <= 1; }),
      .seed = per_row<int64_t>(seed, "seed", logits, ScalarType::Long, S, "an integer", any),
      .offset = per_row<int64_t>(offset, "offset", logits, ScalarType::Long, S, "an integer", any),
      .num_rows = S.value,
      .vocab_size = V.value,
      .logits_stride = logits.stride(0),
      .dtype = to_dtype(logits.scalar_type(), "logits"),
  };
  launch(logits, [](const auto& kernels) { return kernels.sample; }, params);
  for (int64_t r = 0; is_readable(out) && r < S.value; ++r)
    require(token_ids[r] != kInvalidRow,
            "logits: expected numbers and -inf, with one number at least, got NaN, +inf or "
            "nothing but -inf in row ",
            r);
}

}  // namespace teco::ops
