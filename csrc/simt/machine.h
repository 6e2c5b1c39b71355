// What runs: threads, their blocks, and whose turn it is.
#pragma once

#include <array>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/memory.h"
#include "simt/order.h"
#include "simt/simt.h"
#include "simt/stores.h"

namespace simt {

constexpr std::size_t kMaxPayload = 64;
constexpr int kWarpSize = 32;
constexpr std::size_t kMaxSharedBytes = 99 * 1024;  // what a block can have on any device from sm_80 on
constexpr std::size_t kSharedGap = 128;             // between two pieces of shared memory

// A launch, with its arguments.
struct Job {
  Launch launch;
  void (*body)(void*);
  void* arguments;
  std::size_t argument_bytes;
  int rank = 0;
};

// The lanes of a mask that wait for each other; gone when all of them have taken what they came for.
struct Meeting {
  const char* name;
  Site site;
  unsigned mask, arrived = 0, taken = 0;
  alignas(16) std::byte payloads[kWarpSize][kMaxPayload] = {};
};

struct Warp {
  unsigned live = 0;
  std::uint32_t barriers = 0;
  std::list<Meeting> meetings = {};
};

struct AsyncCopy {
  char* target;
  const char* source;
  std::size_t bytes, source_bytes;
  const void* code;
  std::array<std::byte, 16> issued = {};  // what the source was then
};

struct Block;

struct Thread {
  enum class State : std::uint8_t { kReady, kAtBarrier, kInMeeting, kDone };
  Context context = {};
  std::unique_ptr<Stack> stack = {};
  uint3 index = {};
  std::uint16_t number = 0;
  std::uint16_t releases = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  State state = State::kReady;
  Site site = {};              // where it waits
  bool polls_in_vain = false;  // has seen what it had seen there before, and nothing else since
  std::map<const void*, std::uint64_t> seen = {};
  Knowledge known = {};                            // acquired since the last barrier
  std::shared_ptr<const Knowledge> acquired = {};  // last
  std::vector<AsyncCopy> open_copies = {};
  std::vector<std::vector<AsyncCopy>> copies = {};  // groups that were committed, oldest first

  int lane() const { return number % kWarpSize; }
};

struct alignas(1024) SharedMemory {
  std::byte bytes[kMaxSharedBytes + 64 * kSharedGap];
};

struct Block {
  struct SharedPiece {
    const void* tag;
    Region region;
  };

  const Job* job = nullptr;
  uint3 index = {};
  std::uint32_t number = 0;  // over all launches, from 1
  std::uint32_t barriers = 0;
  unsigned live = 0, at_barrier = 0;
  Site barrier_site = {};
  bool any_vote = false, last_vote = false;  // at the barrier, and at the one before
  std::vector<Thread> threads = {};
  std::vector<Warp> warps = {};
  std::list<SharedPiece> shared = {};
  std::size_t shared_used = 0;
  std::unique_ptr<SharedMemory> memory = {};
  Knowledge known = {};  // to all threads, since the last barrier
  DelayedStores stores = {};

  Region* shared_region(std::uintptr_t address);
  bool is_in_shared(std::uintptr_t address) const {
    return address - reinterpret_cast<std::uintptr_t>(memory->bytes) < sizeof(SharedMemory);
  }
};

class Machine {
 public:
  // Runs a launch, or those of several ranks; what was found, empty when all is well.
  std::string run(const Job& job);
  std::string run_ranks(const std::vector<std::deque<Job>>& jobs);

  Thread& current() { return *current_; }
  Block& block() { return *current_->block; }
  const Launch& launch() { return block().job->launch; }
  bool in_kernel() const { return current_ != nullptr; }

  bool is_own_stack(const void* address) const {
    return static_cast<std::size_t>(static_cast<const char*>(address) - current_->stack->begin()) < Stack::kBytes;
  }

  // Whether any thread of the block came with `vote`.
  bool sync_threads(bool vote, Site site);
  void gather(const char* name, unsigned mask, const void* mine, std::size_t bytes, void* all, bool order_memory,
              Site site);
  void* shared_memory(const void* tag, std::size_t bytes, std::size_t alignment, std::size_t granule);
  void access(std::uintptr_t address, std::size_t bytes, Access access, Async async, const void* code);
  void copy_async(AsyncCopy copy);
  void commit_copies();
  void wait_for_copies(std::size_t pending_groups);
  std::uint64_t load(const void* address, std::size_t bytes, Order order, Site site, const void* code);
  void store(void* address, std::size_t bytes, std::uint64_t value, Order order, const void* code);
  // Time passes when threads do nothing but wait.
  std::uint64_t nanoseconds();

  // Ends the launch with this finding; does not return when called by a kernel.
  void fail(const std::string& what);

 private:
  static void enter_thread();
  void begin();
  void start(Block& block, const Job& job, unsigned index);
  void end(Block& block);
  // Gives every thread that can run a turn, in this order; whether any did more than look again at what it had seen.
  bool turn(Block& block, const std::vector<unsigned>& order);
  void run_thread(Thread& thread);
  void suspend();
  void pass_barrier(Block& block);
  static void share_knowledge(Block& block, const Warp& warp, unsigned mask);
  // After a round in which something happened, or nothing did: false when nothing will any more.
  bool go_on(bool any_progress);
  std::string stuck_threads(const Block& block) const;
  std::string place_of(std::uintptr_t address);
  Accessor accessor(const void* code);
  void fail(const Block& block, const std::string& what);

  Context scheduler_ = {};
  Thread* current_ = nullptr;
  std::string finding_;
  std::uint32_t first_block_ = 0;  // what happened in those before it is in order
  bool several_ranks_ = false;
  std::map<std::uint32_t, std::string> names_;                           // of the blocks of several ranks
  std::map<std::uintptr_t, std::shared_ptr<const Knowledge>> released_;  // what the last store to an address made known
  int idle_rounds_ = 0;
  std::uint64_t time_ = 0;
  bool time_was_asked_ = false;
};

// The launch that this thread of the host is in, or null.
extern thread_local Machine* machine;
// What the kernels of each rank may use (one rank, if there are no several), and what all of them may.
extern thread_local std::vector<Regions> allowed;
extern thread_local Regions mapped;
extern thread_local std::uint64_t seed;

std::string to_string(uint3 v);
// What is wrong with its sizes.
std::string check(const Launch& launch);

// Random numbers of the current seed.
std::uint32_t random_below(std::uint32_t limit);
// 0, 1, ... in the order that the seed asks for.
std::vector<unsigned> arranged(unsigned count);

// "file:line (function)" of an instruction, when addr2line is there; else where it lies in its module.
std::string source_of(const void* code);

// Whether it lies in the constants of a loaded module.
bool is_constant(std::uintptr_t address);

}  // namespace simt
