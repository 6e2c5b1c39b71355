// All-reduce, residual and RMS norm in one launch: what follows a row-parallel matmul. The bits are those of all_reduce
// and then fused_add_rms_norm, whose code it is.
//
// Over the link as in all_reduce; locally the sum is neither written nor read again, which saves two passes over memory
// and a launch. A block takes as many rows at a time as fit its slot; of few rows, as in decode, each has a block of
// its own, whose threads sum and norm it. Bound by latency in decode: a step, the loads of a row from all ranks, and
// the norm's one reduction over the block.
#include "cuda/rank_sum.h"
#include "cuda/rms_norm.h"

namespace teco::cuda {

Status all_reduce(const Ranks& ranks, const AllReduceParams& p, void* stream);
Status rms_norm(const RmsNormParams& p, void* stream);

namespace {

static_assert(kRankThreads == kRmsNormThreads);

template <class T, int kMaxWorld, bool kTwoShot>
__global__ void __launch_bounds__(kRankThreads, 1)
    all_reduce_rms_norm_kernel(const __grid_constant__ Ranks ranks, AllReduceRmsNormParams p, uint32_t call,
                               int64_t stretch, bool aligned_in, bool aligned) {
  constexpr int N = kVector<T>;
  const T* input = static_cast<const T*>(p.reduce.input);
  const T* residual = static_cast<const T*>(p.residual);
  T *out = static_cast<T*>(p.reduce.out), *residual_out = static_cast<T*>(p.residual_out);
  const int64_t size = p.hidden_size;
  const int row_vectors = static_cast<int>(ceil_div<int64_t>(size, N));
  RankSum<T, kMaxWorld, kTwoShot> sum(ranks, call);
  bool first = true;
  for (int64_t begin = blockIdx.x * stretch; begin < p.num_rows; begin += gridDim.x * stretch) {
    const int rows = static_cast<int>(smaller(stretch, p.num_rows - begin));
    const int64_t place = p.reduce.registered + begin * size * static_cast<int64_t>(sizeof(T));
    const bool is_there = p.reduce.registered >= 0
                              ? sum.take_registered(place, first)
                              : sum.take(input + begin * size, rows, static_cast<int>(size), size, aligned_in);
    if (!is_there) return;
    first = false;
    for (int r = 0; r < rows; ++r) {
      const int64_t row = (begin + r) * size;
      const auto elements = [&](int64_t i) { return sum.at(r * row_vectors + static_cast<int>(i) / N); };
      RmsNormRow<T, decltype(elements)>{
          elements, residual + row, residual_out + row, static_cast<const T*>(p.weight), out + row, size,
          p.eps,    aligned}
          .norm_by_block();
      __syncthreads();  // before the memory of the block's sum is used again
    }
  }
  sum.end();
}

// Rows that do not fit a slot.
Status in_two_launches(const Ranks& ranks, const AllReduceRmsNormParams& p, void* stream) {
  if (const Status status = all_reduce(ranks, p.reduce, stream)) return status;
  return rms_norm(
      RmsNormParams{
          .out = p.reduce.out,
          .residual_out = p.residual_out,
          .input = p.reduce.out,
          .residual = p.residual,
          .weight = p.weight,
          .num_rows = p.num_rows,
          .hidden_size = p.hidden_size,
          .inner_rows = p.num_rows,
          .out_stride = p.hidden_size,
          .residual_out_stride = p.hidden_size,
          .input_stride = p.hidden_size,
          .residual_stride = p.hidden_size,
          .out_outer_stride = 0,
          .input_outer_stride = 0,
          .eps = p.eps,
          .dtype = p.reduce.dtype,
      },
      stream);
}

}  // namespace

Status all_reduce_rms_norm(const Ranks& ranks, const AllReduceRmsNormParams& p, void* stream) {
  if (p.num_rows == 0) return nullptr;
  return with_float_type(p.reduce.dtype, [&]<class T>(Type<T>) {
    const int64_t row_bytes = ceil_div<int64_t>(p.hidden_size, kVector<T>) * 16;
    if (row_bytes > ranks.slot_bytes) return in_two_launches(ranks, p, stream);
    const Stretches s = stretches_of(p.num_rows, 1, ranks.slot_bytes / row_bytes, ranks.max_blocks);
    const AllReduceParams& reduce = p.reduce;
    const uint32_t call =
        call_number({static_cast<int64_t>(RankCollective::kAllReduceRmsNorm), static_cast<int64_t>(reduce.dtype),
                     p.num_rows, p.hidden_size, reduce.registered});
    const auto aligned = [&](const void* data) { return is_aligned(static_cast<const T*>(data), p.hidden_size, 16); };
    const auto launch_it = [&](auto kernel) {
      return launch("all_reduce_rms_norm", dim3{static_cast<unsigned>(s.blocks)}, dim3{kRankThreads}, {}, stream,
                    kernel, ranks, p, call, s.size, aligned(reduce.input),
                    aligned(reduce.out) && aligned(p.residual) && aligned(p.residual_out) && aligned(p.weight));
    };
    return with_world(ranks.world_size, [&]<int kMaxWorld>(World<kMaxWorld>) {
      return reduce.count * static_cast<int64_t>(sizeof(T)) <= ranks.one_shot_bytes
                 ? launch_it(all_reduce_rms_norm_kernel<T, kMaxWorld, false>)
                 : launch_it(all_reduce_rms_norm_kernel<T, kMaxWorld, true>);
    });
  });
}

}  // namespace teco::cuda
