#include "comm/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <new>
#include <string>
#include <system_error>
#include <utility>

namespace teco::comm {
namespace {

// Close to where numbers of steps wrap around, so that every program comes past it.
constexpr Step kFirstStep = static_cast<Step>(-64);

[[noreturn]] void fail(const std::string& what, int error = errno) {
  throw std::system_error(error, std::generic_category(), what);
}

constexpr int64_t whole_pages(int64_t bytes) {
  constexpr int64_t kPage = 4096;
  return (bytes + kPage - 1) / kPage * kPage;
}

// Closes itself on the way out of an error.
struct Descriptor {
  int value;
  ~Descriptor() {
    if (value >= 0) ::close(value);
  }
  int release() { return std::exchange(value, -1); }
};

}  // namespace

size_t Segment::bytes(int world_size, int64_t registered_bytes) {
  return Layout::slots_end(world_size) + static_cast<size_t>(world_size * whole_pages(registered_bytes));
}

Segment Segment::create(int world_size, int64_t registered_bytes) {
  Descriptor descriptor{::memfd_create("teco_kernels", MFD_CLOEXEC | MFD_ALLOW_SEALING)};
  if (descriptor.value < 0) fail("memfd_create");
  if (::fchmod(descriptor.value, 0600) != 0) fail("fchmod");
  // All of it now: a page that cannot be had later would be a signal in the middle of a copy.
  const int error = ::posix_fallocate(descriptor.value, 0, static_cast<off_t>(bytes(world_size, registered_bytes)));
  if (error) fail("no shared memory", error);
  if (::fcntl(descriptor.value, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) fail("F_ADD_SEALS");

  Segment segment(descriptor.release(), world_size, registered_bytes);
  auto* header = new (&segment.layout_->header) Header;
  if (::getrandom(&header->token, sizeof header->token, 0) != sizeof header->token) fail("getrandom");
  header->end.store({});
  for (RankFlags& flags : header->ranks) {
    flags.arrived.store(kFirstStep);
    flags.sleepers.store(0);
  }
  return segment;
}

Segment Segment::open(pid_t pid, int descriptor, uint64_t token, int world_size, int64_t registered_bytes) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(descriptor);
  Descriptor opened{::open(path.c_str(), O_RDWR | O_CLOEXEC)};
  if (opened.value < 0) fail(path);
  struct stat status{};
  if (::fstat(opened.value, &status) != 0) fail(path);
  if (status.st_size != static_cast<off_t>(bytes(world_size, registered_bytes)))
    fail(path + " is something else", EINVAL);
  Segment segment(opened.release(), world_size, registered_bytes);
  segment.close_descriptor();
  if (segment.token() != token) fail(path + " is another segment", EINVAL);
  return segment;
}

Segment::Segment(int descriptor, int world_size, int64_t registered_bytes)
    : descriptor_(descriptor), world_size_(world_size), registered_bytes_(whole_pages(registered_bytes)) {
  void* memory = ::mmap(nullptr, bytes(world_size, registered_bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                        descriptor, 0);
  if (memory == MAP_FAILED) {
    const int error = errno;
    ::close(descriptor);
    fail("mmap", error);
  }
  layout_ = static_cast<Layout*>(memory);
}

Segment::Segment(Segment&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)),
      world_size_(other.world_size_),
      registered_bytes_(other.registered_bytes_),
      layout_(std::exchange(other.layout_, nullptr)) {}

Segment::~Segment() {
  close_descriptor();
  if (layout_) ::munmap(layout_, bytes(world_size_, registered_bytes_));
}

void Segment::close_descriptor() {
  if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
}

}  // namespace teco::comm
