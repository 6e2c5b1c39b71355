// The sum of all ranks' tensors on every rank, and a row of it on each.
//
// Over the link come (R - 1) * S bytes of S of a rank's own one-shot, 2 * (R - 1) / R * S two-shot; locally a read and
// a write of S go into the slot, one more write into out. A block's stretch fits its slot, and blocks are as many as
// have work, up to `max_blocks`, each going from stretch to stretch without waiting for other blocks. Bound by latency
// up to some hundred KB (a step is two ways over the link: the flag's, and the data's there and back), then by the
// link.
#include "cuda/rank_sum.h"

namespace teco::cuda {
namespace {

template <class T, int kMaxWorld, bool kTwoShot>
__global__ void __launch_bounds__(kRankThreads, 1)
    all_reduce_kernel(const __grid_constant__ Ranks ranks, AllReduceParams p, uint32_t call, int64_t stretch,
                      bool aligned_in, bool aligned_out) {
  constexpr int N = kVector<T>;
  const T* input = static_cast<const T*>(p.input);
  T* out = static_cast<T*>(p.out);
  RankSum<T, kMaxWorld, kTwoShot> sum(ranks, call);
  bool first = true;
  for (int64_t begin = blockIdx.x * stretch; begin < p.count; begin += gridDim.x * stretch) {
    const int size = static_cast<int>(smaller(stretch, p.count - begin)), count = ceil_div(size, N);
    const bool is_there = p.registered >= 0
                              ? sum.take_registered(p.registered + begin * static_cast<int64_t>(sizeof(T)), first)
                              : sum.take(input + begin, 1, size, 0, aligned_in);
    if (!is_there) return;
    first = false;
    for (int v = thread_id(); v < count; v += kRankThreads)
      store_up_to<N>(out + begin + v * N, sum.at(v), size - v * N, aligned_out);
  }
  sum.end();
}

template <class T, int kMaxWorld>
__global__ void __launch_bounds__(kRankThreads, 1)
    reduce_scatter_kernel(const __grid_constant__ Ranks ranks, ReduceScatterParams p, uint32_t call, int64_t stretch,
                          bool aligned_in, bool aligned_out) {
  constexpr int N = kVector<T>;
  const T* input = static_cast<const T*>(p.input);
  T* out = static_cast<T*>(p.out);
  RankSum<T, kMaxWorld, false> sum(ranks, call);
  for (int64_t begin = blockIdx.x * stretch; begin < p.count; begin += gridDim.x * stretch) {
    const int size = static_cast<int>(smaller(stretch, p.count - begin)), count = ceil_div(size, N);
    if (!sum.take(input + begin, ranks.world_size, size, p.count, aligned_in)) return;
    for (int v = thread_id(); v < count; v += kRankThreads)
      store_up_to<N>(out + begin + v * N, sum.at(ranks.rank * count + v), size - v * N, aligned_out);
  }
  sum.end();
}

}  // namespace

Status all_reduce(const Ranks& ranks, const AllReduceParams& p, void* stream) {
  if (p.count == 0) return nullptr;
  return with_float_type(p.dtype, [&]<class T>(Type<T>) {
    constexpr int64_t N = kVector<T>;
    const int64_t bytes = p.count * static_cast<int64_t>(sizeof(T));
    const Stretches s = stretches_of(ceil_div(p.count, N), kRankThreads, ranks.slot_bytes / 16, ranks.max_blocks);
    const uint32_t call = call_number(
        {static_cast<int64_t>(RankCollective::kAllReduce), static_cast<int64_t>(p.dtype), p.count, p.registered});
    const auto launch_it = [&](auto kernel) {
      return launch("all_reduce", dim3{static_cast<unsigned>(s.blocks)}, dim3{kRankThreads}, {}, stream, kernel, ranks,
                    p, call, s.size * N, is_aligned(static_cast<const T*>(p.input), 0, 16),
                    is_aligned(static_cast<const T*>(p.out), 0, 16));
    };
    return with_world(ranks.world_size, [&]<int kMaxWorld>(World<kMaxWorld>) {
      return bytes <= ranks.one_shot_bytes ? launch_it(all_reduce_kernel<T, kMaxWorld, false>)
                                           : launch_it(all_reduce_kernel<T, kMaxWorld, true>);
    });
  });
}

Status reduce_scatter(const Ranks& ranks, const ReduceScatterParams& p, void* stream) {
  if (p.count == 0) return nullptr;
  return with_float_type(p.dtype, [&]<class T>(Type<T>) {
    constexpr int64_t N = kVector<T>;
    const Stretches s =
        stretches_of(ceil_div(p.count, N), kRankThreads, ranks.slot_bytes / 16 / ranks.world_size, ranks.max_blocks);
    const uint32_t call =
        call_number({static_cast<int64_t>(RankCollective::kReduceScatter), static_cast<int64_t>(p.dtype), p.count});
    return with_world(ranks.world_size, [&]<int kMaxWorld>(World<kMaxWorld>) {
      return launch("reduce_scatter", dim3{static_cast<unsigned>(s.blocks)}, dim3{kRankThreads}, {}, stream,
                    reduce_scatter_kernel<T, kMaxWorld>, ranks, p, call, s.size * N,
                    is_aligned(static_cast<const T*>(p.input), p.count, 16),
                    is_aligned(static_cast<const T*>(p.out), 0, 16));
    });
  });
}

}  // namespace teco::cuda
