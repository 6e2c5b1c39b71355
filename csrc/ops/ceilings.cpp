#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace teco::ops {

void read_probe(Tensor data, int64_t num_streams) {
  Argument(data, "data").on_cpu().contiguous();
  require(num_streams == 1 || num_streams == 2 || num_streams == 4 || num_streams == 8,
          "num_streams: expected 1, 2, 4 or 8, got ", num_streams);
  const int64_t num_bytes = data.numel() * static_cast<int64_t>(data.element_size());
  cpu::kernels()->read_probe({.data = data.const_data_ptr(), .num_bytes = num_bytes, .num_streams = num_streams},
                             num_threads());
}

int64_t fma_probe(int64_t iterations) {
  return cpu::kernels()->fma_probe(iterations, num_threads());
}

int64_t int8_probe(int64_t iterations) {
  return cpu::kernels()->int8_probe(iterations, num_threads());
}

}  // namespace teco::ops
