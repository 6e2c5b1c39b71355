// Copies whole blocks, within a cache or from one to another: a read and a write per byte. A thread takes the same part
// of every block, pair after pair, so a block that is written first and read later needs no barrier. Parts of a block
// are all the parallelism there is: for a few pairs of large blocks, as copy-on-write has them, that is enough.
#include "cuda/device.h"

namespace teco::cuda {
namespace {

constexpr int kThreads = 128;

// Words of a block are numbered along its runs.
template <class Word>
__global__ void __launch_bounds__(kThreads) copy_blocks_kernel(CopyBlocksParams p) {
  constexpr int64_t kBytes = sizeof(Word);
  const int64_t word = static_cast<int64_t>(blockIdx.x) * kThreads + thread_id();
  const int64_t words_of_run = p.run_bytes / kBytes, run = word / words_of_run, byte = word % words_of_run * kBytes;
  if (run >= p.outer * p.inner) return;
  const int64_t i = run / p.inner, j = run % p.inner;
  const char* source = static_cast<const char*>(p.source) + i * p.source_outer_bytes + j * p.source_inner_bytes + byte;
  char* target = static_cast<char*>(p.target) + i * p.target_outer_bytes + j * p.target_inner_bytes + byte;
  for (int64_t pair = 0; pair < p.num_pairs; ++pair) {
    const Pack<Word, 1> x =
        load<1>(reinterpret_cast<const Word*>(source + p.block_mapping[2 * pair] * p.source_block_bytes));
    store<1>(reinterpret_cast<Word*>(target + p.block_mapping[2 * pair + 1] * p.target_block_bytes), x);
  }
}

bool all_multiples(const CopyBlocksParams& p, int64_t bytes) {
  const int64_t strides = p.source_block_bytes | p.source_outer_bytes | p.source_inner_bytes | p.target_block_bytes |
                          p.target_outer_bytes | p.target_inner_bytes;
  const int64_t addresses = reinterpret_cast<intptr_t>(p.source) | reinterpret_cast<intptr_t>(p.target);
  return (strides | addresses | p.run_bytes) % bytes == 0;
}

}  // namespace

Status copy_blocks(const CopyBlocksParams& p, void* stream) {
  const int64_t bytes = p.outer * p.inner * p.run_bytes;
  if (bytes == 0 || p.num_pairs == 0) return nullptr;
  const auto copy = [&]<class Word>(Type<Word>) {
    const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(bytes / sizeof(Word), kThreads));
    return launch("copy_blocks", dim3{blocks}, dim3{kThreads}, {}, stream, copy_blocks_kernel<Word>, p);
  };
  if (all_multiples(p, 16)) return copy(Type<ptx::Words<4>>{});
  if (all_multiples(p, 4)) return copy(Type<uint32_t>{});
  return copy(Type<uint8_t>{});
}

}  // namespace teco::cuda
