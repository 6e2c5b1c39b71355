// One launch: its threads, and whose turn it is.
#pragma once

#include <list>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/memory.h"
#include "simt/simt.h"

namespace simt {

constexpr std::size_t kMaxPayload = 64;
constexpr int kWarpSize = 32;

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
};

struct Thread {
  enum class State : std::uint8_t { kReady, kAtBarrier, kInMeeting, kDone };
  Context context = {};
  const Stack* stack = nullptr;
  uint3 index = {};
  std::uint16_t number = 0;
  Warp* warp = nullptr;
  State state = State::kReady;
  Site site = {};  // where it waits
  std::vector<AsyncCopy> open_copies = {};
  std::vector<std::vector<AsyncCopy>> copies = {};  // groups that were committed, oldest first

  int lane() const { return number % kWarpSize; }
};

class Machine {
 public:
  Machine(const Launch& launch, void (*body)(void*), void* arguments, std::size_t argument_bytes);
  // What was found; empty when all is well.
  std::string run();

  const Launch& launch() const { return launch_; }
  uint3 block() const { return block_; }
  Thread& current() { return *current_; }
  bool in_kernel() const { return current_ != nullptr; }

  bool is_own_stack(const void* address) const {
    return static_cast<std::size_t>(static_cast<const char*>(address) - current_->stack->begin()) < Stack::kBytes;
  }

  void sync_threads(Site site);
  void gather(const char* name, unsigned mask, const void* mine, std::size_t bytes, void* all, bool order_memory,
              Site site);
  void* shared_memory(const void* tag, std::size_t bytes, std::size_t alignment, std::size_t granule);
  void access(std::uintptr_t address, std::size_t bytes, Access access, bool pending, const void* code);
  void copy_async(const AsyncCopy& copy);
  void commit_copies();
  void wait_for_copies(std::size_t pending_groups);

  // Ends the launch with this finding; does not return when called by a kernel.
  void fail(const std::string& what);

 private:
  struct SharedPiece {
    const void* tag;
    Region region;
  };

  static void enter_thread();
  void run_block();
  void run_thread(Thread& thread);
  void suspend();
  void pass_barrier();
  std::string stuck_threads() const;
  Region* shared_region(std::uintptr_t address);
  std::string place_of(std::uintptr_t address) const;
  Moment now() const;

  const Launch launch_;
  void (*const body_)(void*);
  void* const arguments_;
  const std::size_t argument_bytes_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::list<SharedPiece> shared_;
  std::size_t shared_used_ = 0;
  Context scheduler_ = {};
  Thread* current_ = nullptr;
  uint3 block_ = {};
  std::uint32_t first_block_ = 0, block_number_ = 0, barriers_ = 0;
  unsigned live_ = 0, at_barrier_ = 0;
  Site barrier_site_ = {};
  std::string finding_;
};

// The launch that this thread of the host is in, or null.
extern thread_local Machine* machine;
extern thread_local Regions allowed;
extern thread_local std::uint64_t seed;

// Random numbers of the current seed.
std::uint32_t random_below(std::uint32_t limit);

// "file:line (function)" of an instruction, when addr2line is there; else where it lies in its module.
std::string source_of(const void* code);

// Whether it lies in the constants of a loaded module.
bool is_constant(std::uintptr_t address);

}  // namespace simt
