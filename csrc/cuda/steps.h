// The steps that ranks take together, block by block: block b of a rank hands something over, says so to block b of all
// others, waits until they have too, and reads what they have handed over. Blocks of other numbers it knows nothing of.
//
// What is handed over in step n lies in slot n % 2 of the block. A block that has come to step n + 1 has read what it
// wanted of step n; so who has passed step n + 1 may write the slot of step n again: one synchronisation per step.
// Steps are numbered over all launches, on the device: launches with the same arguments may be captured and replayed.
//
// Flags: a release of one 8-byte word per rank over the link, and one acquire per rank of words in this GPU's own
// memory, polled. Bound by latency: a store's way to the farthest rank, behind the fence that waits for the block's own
// stores to arrive.
#pragma once

#include "cuda/device.h"
#include "cuda/ranks.h"

namespace teco::cuda {

class Steps {
 public:
  // `call`: what this launch takes part in, the same number on all ranks.
  __device__ __forceinline__ Steps(const Ranks& ranks, uint32_t call) : ranks_(ranks), call_(call) {
    step_ = flags(ranks.rank).steps[block()];
  }

  // What this rank hands over in the step to come, and what a rank has in the one that was taken last.
  __device__ __forceinline__ char* next_slot() const { return slot(ranks_.rank, step_ + 1); }
  __device__ __forceinline__ const char* slot(int rank) const { return slot(rank, step_); }

  // By all threads, which have written all that they hand over and read all that they wanted of the step before. False
  // for all of them when the ranks have given up, for good.
  [[nodiscard]] __device__ __forceinline__ bool take() {
    ++step_;
    __syncthreads();
    const int peer = thread_id();
    bool has_failed = false;
    if (peer < ranks_.world_size) {
      ptx::store_release(&flags(peer).arrived[block()][ranks_.rank], static_cast<uint64_t>(call_) << 32 | step_);
      has_failed = !has_come(peer);
    }
    return __syncthreads_or(has_failed) == 0;
  }

  // Behind the last one.
  __device__ __forceinline__ void end() const {
    if (thread_id() == 0) flags(ranks_.rank).steps[block()] = step_;
  }

 private:
  static __device__ __forceinline__ int block() { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ RankFlags& flags(int rank) const {
    return *reinterpret_cast<RankFlags*>(ranks_.memory[rank]);
  }
  __device__ __forceinline__ char* slot(int rank, uint32_t step) const {
    return ranks_.memory[rank] + kSlotsBegin + (2 * block() + static_cast<int>(step % 2)) * ranks_.slot_bytes;
  }

  // Waits for the same block of another rank, until the ranks give up.
  __device__ __forceinline__ bool has_come(int peer) const {
    RankFlags& own = flags(ranks_.rank);
    uint64_t started = 0;
    uint32_t failure = 0;
    while (failure == 0) {
      failure = ptx::load_relaxed(&own.failure);
      const uint64_t arrived = ptx::load_acquire(&own.arrived[block()][peer]);
      const auto behind = static_cast<int32_t>(step_ - static_cast<uint32_t>(arrived));
      if (behind <= 0) {
        // One that is ahead has seen this rank's call.
        if (behind == 0 && arrived >> 32 != call_ && failure == 0) failure = give_up(RankFailure::kDiffers, peer);
        break;
      }
      const uint64_t now = ptx::nanoseconds();
      if (started == 0) started = now;
      if (now - started > static_cast<uint64_t>(ranks_.timeout)) failure = give_up(RankFailure::kLate, peer);
    }
    if (failure != 0) ptx::store_relaxed(ranks_.report, failure);
    return failure == 0;
  }

  // Tells all ranks.
  __device__ __forceinline__ uint32_t give_up(RankFailure cause, int about) const {
    const uint32_t failure =
        static_cast<uint32_t>(cause) | static_cast<uint32_t>(about) << 8 | static_cast<uint32_t>(ranks_.rank) << 16;
    for (int rank = 0; rank < ranks_.world_size; ++rank) ptx::store_relaxed(&flags(rank).failure, failure);
    return failure;
  }

  const Ranks& ranks_;
  const uint32_t call_;
  uint32_t step_;
};

}  // namespace teco::cuda
