#include "comm/steps.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <sstream>

#include "comm/error.h"
#include "comm/futex.h"

namespace teco::comm {
namespace {

using Clock = std::chrono::steady_clock;

// Peers in step are microseconds apart, or, where their shares of a layer are uneven, some tens of them: a system call
// meanwhile would slow down a peer that shares its core's units with this rank. Where there are more ranks than cores
// the one that is waited for may need this very core, so then it is a few microseconds. After that the core is offered
// to others, and only then is it worth to sleep: ranks that went to sleep at once would come to share a core, as the
// system puts who is woken beside who wakes, and would be seen to need no other: one runs while the other sleeps.
constexpr int kSpins = 2000, kSpinsOfMany = 100, kYields = 200;

int spins_of(int world_size) {
  return world_size <= ::sysconf(_SC_NPROCESSORS_ONLN) ? kSpins : kSpinsOfMany;
}

// How soon the death of a rank is noticed.
constexpr std::chrono::milliseconds kNap{10};

bool (*interrupt_check)() = nullptr;

// How many forks lie between this process and the one that loaded the library.
std::atomic<int> forks{0};

int count_forks() {
  static const int registered = ::pthread_atfork(nullptr, nullptr, [] { ++forks; });
  static_cast<void>(registered);
  return forks;
}

std::string describe(const Call& call) {
  static constexpr const char* kNames[] = {"all_reduce", "all_reduce_rms_norm", "all_gather", "reduce_scatter",
                                           "broadcast"};
  std::ostringstream text;
  text << kNames[static_cast<int>(call.collective)] << " of " << call.count << " elements of dtype number "
       << static_cast<int>(call.dtype);
  if (call.collective == Collective::kBroadcast) text << " from rank " << call.root;
  if (call.collective == Collective::kAllReduceRmsNorm) text << " in rows of " << call.row_size;
  if (call.registered >= 0) text << " at " << call.registered << " of registered memory";
  return text.str();
}

}  // namespace

void set_interrupt_check(bool (*check)()) {
  interrupt_check = check;
}

Steps::Steps(Layout& layout, int rank, int world_size, const std::vector<pid_t>& pids, std::chrono::nanoseconds timeout)
    : layout_(layout),
      rank_(rank),
      world_size_(world_size),
      peers_(pids),
      timeout_(timeout),
      spins_(spins_of(world_size)),
      forks_(count_forks()),
      step_(layout.header.ranks[rank].arrived.load()) {}

void Steps::begin() {
  if (forks_ != forks) fail("this process was forked from that of the rank, and may not act in its place");
  if (ended()) fail_as_ended();
  ++step_;
}

void Steps::arrive(const Call& call) {
  RankFlags& own = layout_.header.ranks[rank_];
  own.calls[step_ & 1] = call;
  // Either this rank sees a sleeper here, or the sleeper, which counts itself first, sees the arrival.
  own.arrived.store(step_, std::memory_order_seq_cst);
  if (own.sleepers.load(std::memory_order_seq_cst) != 0) futex_wake(own.arrived);
}

void Steps::wait() {
  Clock::time_point started{};  // of the first sleep
  for (int rank = 0; rank < world_size_; ++rank) {
    if (rank == rank_) continue;
    for (int spins = 0; !has_arrived(rank); ++spins) {
      if (spins < spins_) {
        cpu_pause();
      } else if (spins < spins_ + kYields) {
        ::sched_yield();
      } else {
        sleep_until_arrival(rank, started);
        break;
      }
    }
    check_call(rank);
  }
}

bool Steps::has_arrived(int rank) const {
  const Step arrived = layout_.header.ranks[rank].arrived.load(std::memory_order_acquire);
  return static_cast<int32_t>(arrived - step_) >= 0;
}

void Steps::sleep_until_arrival(int rank, Clock::time_point& started) {
  RankFlags& other = layout_.header.ranks[rank];
  if (started == Clock::time_point{}) started = Clock::now();
  other.sleepers.fetch_add(1, std::memory_order_seq_cst);
  struct Awake {
    std::atomic<uint32_t>& sleepers;
    ~Awake() { sleepers.fetch_sub(1, std::memory_order_relaxed); }
  } const awake{other.sleepers};

  for (;;) {
    // The end first: others may have come through this step, and closed, by now.
    const bool was_ended = ended();
    const Step arrived = other.arrived.load(std::memory_order_seq_cst);
    if (static_cast<int32_t>(arrived - step_) >= 0) return;
    if (was_ended) fail_as_ended();
    for (int peer = 0; peer < world_size_; ++peer) {
      if (peer == rank_ || !peers_.has_ended(peer) || has_arrived(peer)) continue;
      end(Cause::kDied, peer);  // without having done its part
      fail_as_ended();
    }
    const auto waited = Clock::now() - started;
    if (waited >= timeout_) {
      end(Cause::kLate, rank);
      fail_as_ended();
    }
    if (interrupt_check && !interrupt_check()) {
      end(Cause::kInterrupted, rank_);
      throw Interrupted();
    }
    futex_wait(other.arrived, arrived, std::min<std::chrono::nanoseconds>(kNap, timeout_ - waited));
  }
}

void Steps::check_call(int rank) {
  const Call &own = layout_.header.ranks[rank_].calls[step_ & 1], &other = layout_.header.ranks[rank].calls[step_ & 1];
  if (own == other) return;
  end(Cause::kDiffers, rank);
  fail("rank " + std::to_string(rank) + " called " + describe(other) + ", this rank " + describe(own));
}

void Steps::end(Cause cause, int about) {
  Header& header = layout_.header;
  End none;
  const End end{cause, static_cast<uint8_t>(about), static_cast<uint8_t>(rank_)};
  if (!header.end.compare_exchange_strong(none, end)) return;
  for (int rank = 0; rank < world_size_; ++rank) futex_wake(header.ranks[rank].arrived);
}

void Steps::fail(const std::string& text) const {
  throw CommunicatorError("communicator of " + std::to_string(world_size_) + " ranks, at rank " +
                          std::to_string(rank_) + ": " + text);
}

void Steps::fail_as_ended() const {
  const End end = layout_.header.end.load();
  const std::string about = "rank " + std::to_string(end.about);
  const std::string noticed = ", as rank " + std::to_string(end.noticed_by) + " noticed";
  switch (end.cause) {
    case Cause::kDied:
      fail(about + " has ended" + noticed);
    case Cause::kLate: {
      std::ostringstream seconds;
      seconds << std::chrono::duration<double>(timeout_).count();
      fail(about + " did not come within " + seconds.str() + " s" + noticed);
    }
    case Cause::kDiffers:
      fail(about + " called something else" + noticed);
    case Cause::kClosed:
      fail(about + " has closed its communicator");
    case Cause::kInterrupted:
      fail(about + " was interrupted");
    case Cause::kNone:
      break;
  }
  fail("nothing is wrong");
}

}  // namespace teco::comm
