// Sums over ranks: what each hands over, added in the order of the ranks in fp32 and rounded once, so that all get the
// same bits whoever adds.
//
// One-shot: every rank reads what all others have handed over. Two-shot: each adds up a share, which is handed over in
// a second step. A rank of R reads (R - 1) * S bytes over the link one way, 2 * (R - 1) / R * S the other, for S bytes
// of its own; one-shot has one step's latency less.
#pragma once

#include <initializer_list>

#include "cuda/steps.h"

namespace teco::cuda {

// Blocks are fewer than a device has multiprocessors, so each may take all registers that it wants.
constexpr int kRankThreads = 256;

// Copies rows into a slot, each filled up to whole vectors. Who reads a vector from here on, by the same thread, may
// write over what it was copied from.
template <class T>
__device__ __forceinline__ void hand_over(char* slot, const T* rows, int num_rows, int row_size, int64_t stride,
                                          bool vectors) {
  constexpr int N = kVector<T>;
  const int row_vectors = ceil_div(row_size, N);
  for (int v = thread_id(); v < num_rows * row_vectors; v += kRankThreads) {
    const int row = v / row_vectors, i = (v - row * row_vectors) * N;
    store<N>(reinterpret_cast<T*>(slot) + v * N, load_up_to<N>(rows + row * stride + i, row_size - i, vectors));
  }
}

// The stretch of a tensor that a block is at. kMaxWorld: at least as many as there are ranks; all loads of a vector are
// under way before the first addition.
template <class T, int kMaxWorld, bool kTwoShot>
class RankSum {
 public:
  static constexpr int N = kVector<T>;

  __device__ __forceinline__ RankSum(const Ranks& ranks, uint32_t call) : ranks_(ranks), steps_(ranks, call) {}

  // From here on at(v) has the sum of vector v of these rows, counted over the rows. False when the ranks have given
  // up.
  [[nodiscard]] __device__ __forceinline__ bool take(const T* rows, int num_rows, int row_size, int64_t stride,
                                                     bool vectors) {
    hand_over(steps_.next_slot(), rows, num_rows, row_size, stride, vectors);
    if (!steps_.take()) return false;
    if constexpr (kTwoShot) {
      const int count = num_rows * ceil_div(row_size, N);
      share_ = ceil_div(count, ranks_.world_size);
      const int begin = ranks_.rank * share_, end = smaller(begin + share_, count);
      T* sums = reinterpret_cast<T*>(steps_.next_slot());
      for (int v = begin + thread_id(); v < end; v += kRankThreads) store<N>(sums + v * N, add(v));
      return steps_.take();
    }
    return true;
  }
  // The same of rows that lie in registered memory, at this place in the memory of all ranks: the first time, ranks
  // tell each other that they are there.
  [[nodiscard]] __device__ __forceinline__ bool take_registered(int64_t place, bool first) {
    registered_ = place;
    return !first || steps_.take();
  }

  __device__ __forceinline__ Pack<T, N> at(int v) const {
    if constexpr (kTwoShot) return load<N>(reinterpret_cast<const T*>(steps_.slot(v / share_)) + v * N);
    return add(v);
  }

  __device__ __forceinline__ void end() const { steps_.end(); }

 private:
  __device__ __forceinline__ Pack<T, N> add(int v) const {
    Pack<T, N> parts[kMaxWorld];
#pragma unroll
    for (int rank = 0; rank < kMaxWorld; ++rank) {
      if (rank < ranks_.world_size) {
        const char* from = registered_ >= 0 ? ranks_.memory[rank] + registered_ : steps_.slot(rank);
        parts[rank] = load<N>(reinterpret_cast<const T*>(from) + v * N);
      }
    }
    Pack<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float sum = to_float(parts[0].at[i]);
#pragma unroll
      for (int rank = 1; rank < kMaxWorld; ++rank)
        if (rank < ranks_.world_size) sum += to_float(parts[rank].at[i]);
      set(result.at[i], sum);
    }
    return result;
  }

  const Ranks& ranks_;
  Steps steps_;
  int share_ = 1;
  int64_t registered_ = -1;
};

// How a tensor is dealt out to blocks: stretches of so many rows or vectors, in turns.
struct Stretches {
  int64_t size;
  int blocks;
};
inline Stretches stretches_of(int64_t count, int64_t least, int64_t most, int max_blocks) {
  const int64_t size = smaller(larger(ceil_div<int64_t>(count, max_blocks), least), most);
  return {size, static_cast<int>(smaller<int64_t>(ceil_div(count, size), max_blocks))};
}

// What ranks compare: two calls that differ have different numbers, as good as always.
inline uint32_t call_number(std::initializer_list<int64_t> what) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const int64_t word : what) hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
  return static_cast<uint32_t>(hash >> 32);
}
enum class RankCollective : int64_t { kAllReduce, kAllReduceRmsNorm, kReduceScatter, kAllGather, kBroadcast };

template <int N>
struct World {};

// Calls body(World<N>{}), N being the next larger number of ranks that there are kernels for.
template <class Body>
inline Status with_world(int world_size, Body body) {
  if (world_size <= 2) return body(World<2>{});
  if (world_size <= 4) return body(World<4>{});
  return body(World<8>{});
}

}  // namespace teco::cuda
