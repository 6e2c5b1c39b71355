// Gathers rows of the embedding matrix, converting them on the way. One read, one write; bound by latency.
#include "cpu/gptq_layout.h"

namespace teco::cpu::TECO_ISA {
namespace {

// The row of the weight that a token has; -1 where it belongs to another part of the vocabulary.
inline int64_t row_of(const TokenRange& tokens, int64_t token_id) {
  const int64_t row = token_id - tokens.first;
  return row >= 0 && row < tokens.count ? row : -1;
}

}  // namespace

void embedding(const EmbeddingParams& p, int num_threads) {
  with_float_type(p.weight_dtype, [&]<class W>(Type<W>) {
    with_float_type(p.dtype, [&]<class T>(Type<T>) {
      const int64_t tail = p.hidden_size % kLanes, body = p.hidden_size - tail;
      const int64_t row_bytes = p.hidden_size * static_cast<int64_t>(sizeof(T) + sizeof(W));
      parallel_for(p.num_tokens, task_grain(row_bytes), num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          T* out = static_cast<T*>(p.out) + t * p.out_stride;
          const int64_t found = row_of(p.tokens, p.token_ids[t]);
          if (found < 0) {
            __builtin_memset(out, 0, static_cast<size_t>(p.hidden_size) * sizeof(T));
            continue;
          }
          const W* row = static_cast<const W*>(p.weight) + found * p.weight_stride;
          for (int64_t i = 0; i < body; i += kLanes) store(out + i, load(row + i));
          if (tail) store_partial(out + body, load_partial(row + body, tail), tail);
        }
      });
    });
  });
}

namespace {

constexpr int64_t kColumns = 16;  // of a panel

// Eight codes of a column: the four of each quad, lowest byte first.
inline F32x8 codes_of(uint32_t low, uint32_t high) {
  const U32x8 quads = {low, low, low, low, high, high, high, high}, shifts = {0, 8, 16, 24, 0, 8, 16, 24};
  return to_float(reinterpret_cast<I32x8>((quads >> shifts) & 255));
}

// One column of a panel, by the very operations of GPTQWeight.dequantize.
template <int kBits, bool kMinimum, class T>
inline void unpack_column(const GptqLayout& layout, int64_t panel, int column, const int32_t* order, T* out) {
  int64_t k = 0;  // packed place
  for (int64_t g = 0; g < layout.num_groups; ++g) {
    const uint8_t* group = layout.group(panel, g);
    const auto header = reinterpret_cast<const Half*>(group);
    const F32x8 scale = splat(load_one(header + column)), offset = splat(load_one(header + kColumns + column));
    const uint8_t* block = group + kHeaderBytes;
    for (int64_t b = 0; b < layout.blocks_per_group; ++b, block += layout.block_bytes()) {
      for (int q = 0; q < kBlock / 4; q += 2, k += kLanes) {
        const F32x8 codes =
            codes_of(quad_codes<kBits, uint32_t>(block, q, column), quad_codes<kBits, uint32_t>(block, q + 1, column));
        const F32x8 values = kMinimum ? scale * codes + offset : scale * (codes - offset);
        if (!order) {
          store(out + k, values);
          continue;
        }
        T lanes[kLanes];
        store(lanes, values);
        for (int i = 0; i < kLanes; ++i)
          if (order[k + i] >= 0) out[order[k + i]] = lanes[i];
      }
    }
  }
}

}  // namespace

void gptq_embedding(const GptqEmbeddingParams& p, int num_threads) {
  const GptqLayout layout(p);
  with_format(p, [&]<int kBits, bool kMinimum>(Format<kBits, kMinimum>) {
    with_float_type(p.dtype, [&]<class T>(Type<T>) {
      parallel_for(p.num_tokens, task_grain(layout.panel_bytes()), num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          T* out = static_cast<T*>(p.out) + t * p.out_stride;
          const int64_t found = row_of(p.tokens, p.token_ids[t]);
          if (found < 0)
            __builtin_memset(out, 0, static_cast<size_t>(p.hidden_size) * sizeof(T));
          else
            unpack_column<kBits, kMinimum>(layout, found / kColumns, static_cast<int>(found % kColumns), p.input_order,
                                           out);
        }
      });
    });
  });
}

}  // namespace teco::cpu::TECO_ISA
