// Whether the processes of the other ranks still run.
#pragma once

#include <sys/types.h>

#include <vector>

namespace teco::comm {

// Holds a descriptor per process: unlike a number, it never comes to mean another process, and a process that has ended
// counts as ended even while nobody has asked for its exit code.
class Peers {
 public:
  // Throws system_error where the system lacks such descriptors (Linux before 5.3), or a process has ended already.
  explicit Peers(const std::vector<pid_t>& pids);
  ~Peers();
  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;

  bool has_ended(int rank) const;

 private:
  std::vector<int> descriptors_;
};

}  // namespace teco::comm
