// A kernel that was compiled ahead of time, launched through the driver of the GPU. Nothing is linked: the driver's
// library is opened when the first kernel is loaded.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace teco::host {

// A parameter as the kernel takes it.
enum class ParameterType : char { kPointer = 'p', kInt32 = 'i', kInt64 = 'l', kFloat32 = 'f' };

// An argument as the caller has it: an integer, which may be an address, or a number.
using DriverArgument = std::variant<int64_t, double>;

struct DriverFunctions;

class DriverKernel {
 public:
  // Loads `image`, a cubin or hsaco, into the current context, which is that of `device`; a thread that has none gets
  // it. `library` is the path or name of the driver's library, `is_hip` says by which names its functions go.
  // `parameters` has a character per parameter; the two pointers to scratch memory that Triton's kernels take behind
  // them are not counted, and null.
  DriverKernel(const std::string& library, bool is_hip, const std::string& image, const std::string& name,
               const std::string& parameters, int block_threads, int shared_bytes, int device);

  // Enqueues the kernel, from any thread. Fails when arguments are too few or too many, or an integer does not fit its
  // parameter.
  void launch(const std::array<int64_t, 3>& grid, uint64_t stream, const std::vector<DriverArgument>& arguments) const;

 private:
  const DriverFunctions& driver_;
  int device_;
  void* function_ = nullptr;
  std::string name_, parameters_;
  unsigned block_threads_, shared_bytes_;
};

}  // namespace teco::host
