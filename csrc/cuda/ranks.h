// What the ranks of one host, each with a GPU, share: memory of every rank that all others have mapped, and how a
// collective's kernel is told of it.
//
// A rank's memory: RankFlags; two slots per block, for what it hands over in steps with even and odd numbers; then
// registered memory, which callers write themselves.
#pragma once

#include <cstdint>

#include "params.h"

namespace teco::cuda {

constexpr int kMaxRanks = 8;
// Blocks of a collective's launch: a block waits for the same one of other ranks, so all must fit a device at a time.
constexpr int kMaxRankBlocks = 64;

// All zeros at first.
struct RankFlags {
  // Where the block of each rank has come: the number of its step, and above it what it takes part in. Written by that
  // rank, 32 bytes for a block.
  uint64_t arrived[kMaxRankBlocks][kMaxRanks];
  uint32_t steps[kMaxRankBlocks];  // that this rank's own blocks have taken. Kept here: a launch is always the same
  uint32_t failure;                // why the ranks have given up; 0: they have not
};

// Why: in the lowest byte, above it the rank that it is about, above that the one that noticed.
enum class RankFailure : uint32_t { kNone, kLate, kDiffers };

struct Ranks {
  char* memory[kMaxRanks];  // of every rank, as it is mapped here
  uint32_t* report;         // memory of the host: where this rank tells of a failure
  int64_t slot_bytes;       // a multiple of 16
  int64_t one_shot_bytes;   // up to so many, every rank adds everything up
  int64_t timeout;          // nanoseconds that a block waits for those of other ranks
  int32_t rank, world_size, max_blocks;
};

// Offsets in a rank's memory.
constexpr int64_t kSlotsBegin = 8192;
static_assert(sizeof(RankFlags) <= kSlotsBegin);
constexpr int64_t registered_begin(int64_t slot_bytes) {
  return kSlotsBegin + 2 * kMaxRankBlocks * slot_bytes;
}

// out[i] = ((input of rank 0 + that of rank 1) + that of rank 2) + ..., in fp32, rounded once.
struct AllReduceParams {
  void* out;  // [count]
  const void* input;
  int64_t count;
  int64_t registered;  // where in the memory of every rank its input lies, or -1
  DType dtype;
};
// And then, as RmsNormParams has it with a residual, the norm of every row. All rows are contiguous.
struct AllReduceRmsNormParams {
  AllReduceParams reduce;  // out: of the norm
  void* residual_out;
  const void* residual;
  const void* weight;
  int64_t num_rows, hidden_size;
  float eps;
};
// out[i] = the same sum of input[rank, i]
struct ReduceScatterParams {
  void* out;          // [count]
  const void* input;  // [world_size, count]
  int64_t count;
  DType dtype;
};
// out[r] = input of rank r, bytes of any kind
struct AllGatherParams {
  void* out;          // [world_size, bytes]
  const void* input;  // [bytes]; may be the row of this rank
  int64_t bytes;
};
struct BroadcastParams {
  void* out;  // [bytes]
  const void* input;
  int64_t bytes;
  int32_t root;
};

// Memory of this rank, and what other processes find it by.
struct RankMemory {
  char* memory;
  int64_t bytes;
  uint32_t* report;            // on the host
  uint32_t* report_on_device;  // the same as kernels see it
};
struct RankHandle {
  unsigned char bytes[64];
};

}  // namespace teco::cuda
