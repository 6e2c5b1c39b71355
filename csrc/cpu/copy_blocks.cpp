// Copies whole blocks, within a cache or from one to another: a read and a write per byte, bound by bandwidth.
#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {

void copy_blocks(const CopyBlocksParams& p, int num_threads) {
  // A thread takes the same part of every block, so a block that is written first and read later needs no barrier.
  const int64_t part_bytes = 2 * p.run_bytes * p.num_pairs;
  parallel_for(p.outer * p.inner, task_grain(part_bytes), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t pair = 0; pair < p.num_pairs; ++pair) {
      const char* source = static_cast<const char*>(p.source) + p.block_mapping[2 * pair] * p.source_block_bytes;
      char* target = static_cast<char*>(p.target) + p.block_mapping[2 * pair + 1] * p.target_block_bytes;
      for (int64_t part = begin; part < end; ++part) {
        const int64_t i = part / p.inner, j = part % p.inner;
        __builtin_memmove(target + i * p.target_outer_bytes + j * p.target_inner_bytes,
                          source + i * p.source_outer_bytes + j * p.source_inner_bytes,
                          static_cast<size_t>(p.run_bytes));
      }
    }
  });
}

}  // namespace teco::cpu::TECO_ISA
