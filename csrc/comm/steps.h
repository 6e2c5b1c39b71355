// The steps that all ranks take together: who has come how far, waiting for the others, and the end when one fails.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "comm/peers.h"
#include "comm/segment.h"

namespace teco::comm {

// A step of a collective: fill this rank's slot, arrive(), wait(), read the slots of the others. Slots are used in
// turns, and that a rank has arrived says that it has done with the step before: one synchronisation per step is all.
//
// wait() waits for all ranks, whatever the collective needs, so that ranks which call different things notice, all of
// them, before any reads what it should not. Each failure ends the communicator for everybody, for good.
class Steps {
 public:
  Steps(Layout& layout, int rank, int world_size, const std::vector<pid_t>& pids, std::chrono::nanoseconds timeout);

  // The slot of a rank for the step that this rank prepares or, between arrive() and wait() and after, is in.
  Slot& slot(int rank) const { return layout_.slots[rank][step_ & 1]; }
  // Of the step after that. This rank's own may be written once wait() has returned.
  Slot& next_slot(int rank) const { return layout_.slots[rank][(step_ + 1) & 1]; }

  void begin();  // a step; throws when the communicator is at its end
  void arrive(const Call& call);
  void wait();

  // Ends the communicator, if it is not at its end yet, and wakes everybody.
  void end(Cause cause, int about);
  bool ended() const { return layout_.header.end.load().cause != Cause::kNone; }
  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  std::chrono::nanoseconds timeout() const { return timeout_; }

 private:
  bool has_arrived(int rank) const;
  void sleep_until_arrival(int rank, std::chrono::steady_clock::time_point& started);
  void check_call(int rank);
  [[noreturn]] void fail(const std::string& text) const;
  [[noreturn]] void fail_as_ended() const;

  Layout& layout_;
  const int rank_, world_size_;
  const Peers peers_;
  const std::chrono::nanoseconds timeout_;
  const int spins_;
  const int forks_;  // when it was made
  Step step_;
};

// Called while a rank sleeps, every now and then, for signals to be heard: false ends the communicator, and the call
// that waits throws Interrupted.
TECO_VISIBLE void set_interrupt_check(bool (*check)());

}  // namespace teco::comm
