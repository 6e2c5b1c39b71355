#include "comm/peers.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

namespace teco::comm {

Peers::Peers(const std::vector<pid_t>& pids) {
  for (const pid_t pid : pids) {
    const auto descriptor = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));  // closed on exec by itself
    if (descriptor < 0) {
      const int error = errno;
      for (const int opened : descriptors_) ::close(opened);
      throw std::system_error(error, std::generic_category(), "pidfd_open of " + std::to_string(pid));
    }
    descriptors_.push_back(descriptor);
  }
}

Peers::~Peers() {
  for (const int descriptor : descriptors_) ::close(descriptor);
}

bool Peers::has_ended(int rank) const {
  pollfd poll{.fd = descriptors_[static_cast<size_t>(rank)], .events = POLLIN, .revents = 0};
  return ::poll(&poll, 1, 0) > 0;
}

}  // namespace teco::comm
