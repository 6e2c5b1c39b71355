// What all ranks have, or one has, on every rank; bytes of any kind.
//
// Over the link come (R - 1) * S bytes of an all-gather, S of a broadcast (and as much goes R - 1 times over that of
// the root). Each rank copies what it hands over into its slot, and reads the others'. Bound as all_reduce is.
#include "cuda/rank_sum.h"

namespace teco::cuda {
namespace {

constexpr int N = kVector<uint8_t>;

__global__ void __launch_bounds__(kRankThreads, 1)
    all_gather_kernel(const __grid_constant__ Ranks ranks, AllGatherParams p, uint32_t call, int64_t stretch,
                      bool aligned_in, bool aligned_out) {
  const uint8_t* input = static_cast<const uint8_t*>(p.input);
  Steps steps(ranks, call);
  for (int64_t begin = blockIdx.x * stretch; begin < p.bytes; begin += gridDim.x * stretch) {
    const int size = static_cast<int>(smaller(stretch, p.bytes - begin));
    hand_over(steps.next_slot(), input + begin, 1, size, 0, aligned_in);
    if (!steps.take()) return;
    for (int i = 0; i < ranks.world_size; ++i) {
      // Each begins with itself, so that they do not all ask the same rank.
      const int from = (ranks.rank + i) % ranks.world_size;
      const auto* slot = reinterpret_cast<const uint8_t*>(steps.slot(from));
      uint8_t* out = static_cast<uint8_t*>(p.out) + from * p.bytes + begin;
      for (int b = thread_id() * N; b < size; b += kRankThreads * N)
        store_up_to<N>(out + b, load<N>(slot + b), size - b, aligned_out);
    }
  }
  steps.end();
}

__global__ void __launch_bounds__(kRankThreads, 1)
    broadcast_kernel(const __grid_constant__ Ranks ranks, BroadcastParams p, uint32_t call, int64_t stretch,
                     bool aligned_in, bool aligned_out) {
  Steps steps(ranks, call);
  for (int64_t begin = blockIdx.x * stretch; begin < p.bytes; begin += gridDim.x * stretch) {
    const int size = static_cast<int>(smaller(stretch, p.bytes - begin));
    if (ranks.rank == p.root)
      hand_over(steps.next_slot(), static_cast<const uint8_t*>(p.input) + begin, 1, size, 0, aligned_in);
    if (!steps.take()) return;
    const auto* slot = reinterpret_cast<const uint8_t*>(steps.slot(p.root));
    uint8_t* out = static_cast<uint8_t*>(p.out) + begin;
    for (int b = thread_id() * N; b < size; b += kRankThreads * N)
      store_up_to<N>(out + b, load<N>(slot + b), size - b, aligned_out);
  }
  steps.end();
}

bool aligned(const void* data, int64_t stride) {
  return is_aligned(static_cast<const uint8_t*>(data), stride, 16);
}

}  // namespace

Status all_gather(const Ranks& ranks, const AllGatherParams& p, void* stream) {
  if (p.bytes == 0) return nullptr;
  const Stretches s =
      stretches_of(ceil_div<int64_t>(p.bytes, N), kRankThreads, ranks.slot_bytes / 16, ranks.max_blocks);
  return launch("all_gather", dim3{static_cast<unsigned>(s.blocks)}, dim3{kRankThreads}, {}, stream, all_gather_kernel,
                ranks, p, call_number({static_cast<int64_t>(RankCollective::kAllGather), p.bytes}), s.size * N,
                aligned(p.input, 0), aligned(p.out, p.bytes));
}

Status broadcast(const Ranks& ranks, const BroadcastParams& p, void* stream) {
  if (p.bytes == 0) return nullptr;
  const Stretches s =
      stretches_of(ceil_div<int64_t>(p.bytes, N), kRankThreads, ranks.slot_bytes / 16, ranks.max_blocks);
  return launch("broadcast", dim3{static_cast<unsigned>(s.blocks)}, dim3{kRankThreads}, {}, stream, broadcast_kernel,
                ranks, p, call_number({static_cast<int64_t>(RankCollective::kBroadcast), p.bytes, p.root}), s.size * N,
                aligned(p.input, 0), aligned(p.out, 0));
}

}  // namespace teco::cuda
