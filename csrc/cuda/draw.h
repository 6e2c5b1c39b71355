// Random numbers, and draws in proportion to weights that are integers: their sums are exact, hence the same in any
// order, and a draw is integer arithmetic alone. The numbers, weights and draws of csrc/cpu/random.h, to the last bit.
#pragma once

#include "cuda/device.h"

namespace teco::cuda {

constexpr int kDrawThreads = 512;
constexpr int kDrawWarps = kDrawThreads / kWarpSize;

struct RandomBits {
  uint64_t low, high;
};

// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) of counter (offset, stream)
// under the key `seed`: its four words, the first one lowest.
__device__ __forceinline__ RandomBits random_bits(uint64_t seed, uint64_t offset, uint32_t stream) {
  uint32_t c0 = static_cast<uint32_t>(offset), c1 = static_cast<uint32_t>(offset >> 32), c2 = stream, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xd2511f53u} * c0, b = uint64_t{0xcd9e8d57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {uint64_t{c1} << 32 | c0, uint64_t{c3} << 32 | c2};
}

// A uniform integer below `total`.
__device__ __forceinline__ uint64_t draw_below(uint64_t total, uint64_t bits) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(total) * bits >> 64);
}

// In units of 2^-40, rounded to the nearest, ties to even.
__device__ __forceinline__ uint64_t to_units(float weight) {
  return static_cast<uint64_t>(llrintf(weight * 0x1p40f));
}

// exp(x) for x <= 0, as csrc/cpu/vec.h has it: Cody-Waite reduction x = n ln2 + r, |r| <= ln2/2, then a polynomial in
// r. 0 where it is so small that it makes no unit.
__device__ __forceinline__ float exp_nonpositive(float x) {
  if (!(x >= -87.f)) return 0.f;
  const float shift = 0x1.8p23f;  // adding it rounds to an integer kept in the low mantissa bits
  const float n_shifted = fmaf(x, 0x1.715476p0f, shift), n = n_shifted - shift;
  float r = fmaf(n, -0x1.62e4p-1f, x);
  r = fmaf(n, -0x1.7f7d1cp-20f, r);
  float p = 0x1.6a2434p-10f;
  p = fmaf(p, r, 0x1.1239e2p-7f);
  p = fmaf(p, r, 0x1.5558f2p-5f);
  p = fmaf(p, r, 0x1.555492p-3f);
  p = fmaf(p, r, 0x1.fffffcp-2f);
  p = fmaf(p, r, 1.f);
  p = fmaf(p, r, 1.f);
  return p * ptx::as_float((ptx::as_bits(n_shifted) << 23) + (127u << 23));  // the shift drops all but n
}

struct Sum {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};

// The sum of weigh(i), i from 0 to size - 1. All threads of the block call it, and get it.
template <class Weigh>
__device__ uint64_t total_weight(int64_t size, Weigh weigh) {
  uint64_t sum = 0;
  for (int64_t i = thread_id(); i < size; i += kDrawThreads) sum += weigh(i);
  return block_fold<kDrawThreads>(sum, Sum{});
}

// The token at `point` of the summed weights, in order of id, which is below their total. All threads of the block call
// it, and get it. Every warp sums a section of the row; the one that the point lies in walks its own once more.
template <class Weigh>
__device__ int64_t token_at(uint64_t point, int64_t size, Weigh weigh) {
  struct Found {
    uint64_t weight[kDrawWarps];
    int64_t token;
  };
  Found& found = shared<Found>();
  const int64_t section = ceil_div<int64_t>(size, kDrawThreads) * kWarpSize;
  const int64_t begin = warp_id() * section, end = smaller(begin + section, size);
  uint64_t sum = 0;
  for (int64_t i = begin + lane_id(); i < end; i += kWarpSize) sum += weigh(i);
  sum = warp_sum(sum);
  __syncthreads();  // what the last call found has been read
  if (lane_id() == 0) found.weight[warp_id()] = sum;
  __syncthreads();
  int warp = 0;
  while (point >= found.weight[warp]) point -= found.weight[warp++];
  if (warp == warp_id()) {
    for (int64_t i = begin;; i += kWarpSize) {
      uint64_t up_to = i + lane_id() < end ? weigh(i + lane_id()) : 0;
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const uint64_t before = __shfl_up_sync(kAllLanes, up_to, static_cast<unsigned>(distance));
        if (lane_id() >= distance) up_to += before;
      }
      if (const unsigned beyond = __ballot_sync(kAllLanes, point < up_to)) {
        if (lane_id() == 0) found.token = i + ptx::lowest_bit(beyond);
        break;
      }
      point -= __shfl_sync(kAllLanes, up_to, kWarpSize - 1);
    }
  }
  __syncthreads();
  return found.token;
}

}  // namespace teco::cuda
