// What lies in the memory that the ranks of a communicator share: a header, a line of flags per rank, per rank two
// slots for data, used in turns, and per rank as much registered memory as was asked for, which ranks write themselves.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace teco::comm {

constexpr int kMaxRanks = 8;

// Data that a rank hands over in one step. Two slots and a rank's share of the result stay within an L2 cache.
constexpr int64_t kSlotBytes = 256 * 1024;
constexpr int64_t kResultBytes = kSlotBytes / 2;

// Apart by two lines, since processors fetch lines in pairs.
constexpr size_t kApart = 128;

enum class Collective : uint8_t { kAllReduce, kAllReduceRmsNorm, kAllGather, kReduceScatter, kBroadcast };
constexpr size_t kNumCollectives = 5;

// What a rank takes part in. Ranks compare theirs before any of them looks at another's data.
struct Call {
  Collective collective;
  uint8_t dtype;       // as the caller numbers them
  int16_t root;        // of a broadcast
  uint32_t row_size;   // of a norm
  int64_t count;       // elements that a rank gives
  int64_t registered;  // where they lie in its registered memory, in bytes; -1: in its slot

  bool operator==(const Call&) const = default;
};

// Why a communicator came to its end: the first cause that a rank notices stays.
enum class Cause : uint8_t { kNone, kDied, kLate, kDiffers, kClosed, kInterrupted };
struct End {
  Cause cause = Cause::kNone;
  uint8_t about = 0;  // the rank that caused it
  uint8_t noticed_by = 0;
  uint8_t unused = 0;  // four bytes are one atomic word
};

// The number of the step up to which a rank has come. Everything that it wrote into its slot for this step can be read,
// and it has read all that it wanted of the step before. Numbers wrap around: ranks are never more than one apart.
using Step = uint32_t;

struct RankFlags {
  alignas(kApart) std::atomic<Step> arrived;  // also the futex that others sleep on
  Call calls[2];                              // of the steps in turns; in the same line, so that it comes along
  alignas(kApart) std::atomic<uint32_t> sleepers;
};

struct Header {
  uint64_t token;  // of this segment: who opens another one by mistake sees it
  std::atomic<End> end;
  RankFlags ranks[kMaxRanks];
};

struct Slot {
  alignas(4096) char data[kSlotBytes];
  alignas(4096) char result[kResultBytes];  // this rank's share of a sum, in two-shot all-reduce
};

struct Layout {
  Header header;
  Slot slots[kMaxRanks][2];

  // Where registered memory begins.
  static constexpr size_t slots_end(int world_size) { return offsetof(Layout, slots) + sizeof(Slot) * 2 * world_size; }
};

static_assert(std::atomic<Step>::is_always_lock_free && std::atomic<End>::is_always_lock_free);

}  // namespace teco::comm
