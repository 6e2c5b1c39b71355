// Gathers rows of the embedding matrix, converting them on the way. One read, one write; bound by latency.
#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {

void embedding(const EmbeddingParams& p, int num_threads) {
  with_float_type(p.weight_dtype, [&]<class W>(Type<W>) {
    with_float_type(p.dtype, [&]<class T>(Type<T>) {
      const int64_t tail = p.hidden_size % kLanes, body = p.hidden_size - tail;
      const int64_t row_bytes = p.hidden_size * static_cast<int64_t>(sizeof(T) + sizeof(W));
      parallel_for(p.num_tokens, task_grain(row_bytes), num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const W* row = static_cast<const W*>(p.weight) + p.token_ids[t] * p.weight_stride;
          T* out = static_cast<T*>(p.out) + t * p.out_stride;
          for (int64_t i = 0; i < body; i += kLanes) store(out + i, load(row + i));
          if (tail) store_partial(out + body, load_partial(row + body, tail), tail);
        }
      });
    });
  });
}

}  // namespace teco::cpu::TECO_ISA
