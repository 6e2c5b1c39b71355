#include "host/driver_kernel.h"

#include <dlfcn.h>

#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>

namespace teco::host {

// cuModuleLoadData and its like; HIP's have the same parameters but for the names of errors. Null is what HIP needs
// not: shared memory of any size is there without asking, and a thread's context is made when it is first needed.
struct DriverFunctions {
  int (*load_module)(void** module, const void* image);
  int (*get_function)(void** function, void* module, const char* name);
  int (*set_attribute)(void* function, int attribute, int value);
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra);
  int (*get_context)(void** context);
  int (*get_device)(int* handle, int device);
  int (*retain_context)(void** context, int handle);
  int (*set_context)(void* context);
  int (*cuda_error_name)(int status, const char** name);
  const char* (*hip_error_name)(int status);
};

namespace {

constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kSharedWithoutAsking = 48 << 10;
constexpr int kScratchPointers = 2;

template <class Function>
void find(Function& function, void* handle, const std::string& name) {
  function = reinterpret_cast<Function>(dlsym(handle, name.c_str()));
  if (!function) throw std::runtime_error("driver: no function " + name);
}

// One per library, and for as long as the process lives.
const DriverFunctions& driver(const std::string& library, bool is_hip) {
  static std::mutex mutex;
  static std::map<std::string, DriverFunctions> drivers;
  const std::lock_guard lock(mutex);
  if (const auto found = drivers.find(library); found != drivers.end()) return found->second;
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(std::string("driver: ") + dlerror());
  DriverFunctions functions{};
  const std::string prefix = is_hip ? "hip" : "cu";
  find(functions.load_module, handle, prefix + "ModuleLoadData");
  find(functions.get_function, handle, prefix + "ModuleGetFunction");
  find(functions.launch, handle, is_hip ? "hipModuleLaunchKernel" : "cuLaunchKernel");
  if (is_hip) {
    find(functions.hip_error_name, handle, "hipGetErrorName");
  } else {
    find(functions.set_attribute, handle, "cuFuncSetAttribute");
    find(functions.get_context, handle, "cuCtxGetCurrent");
    find(functions.get_device, handle, "cuDeviceGet");
    find(functions.retain_context, handle, "cuDevicePrimaryCtxRetain");
    find(functions.set_context, handle, "cuCtxSetCurrent");
    find(functions.cuda_error_name, handle, "cuGetErrorName");
  }
  return drivers.emplace(library, functions).first->second;
}

void check(const DriverFunctions& driver, int status, const std::string& what, const std::string& kernel) {
  if (status == 0) return;
  const char* name = nullptr;
  if (driver.hip_error_name) name = driver.hip_error_name(status);
  if (driver.cuda_error_name && driver.cuda_error_name(status, &name) != 0) name = nullptr;
  throw std::runtime_error("driver: " + what + " of kernel " + kernel + " failed with error " + std::to_string(status) +
                           (name ? std::string(" (") + name + ")" : ""));
}

// Gives a thread that has no context yet that of the device which torch's runtime uses too. It is held for as long as
// the process lives. A thread that has one keeps it: the caller's device guard has seen to it.
void make_current(const DriverFunctions& driver, int device, const std::string& kernel) {
  if (!driver.get_context) return;
  void* context = nullptr;
  check(driver, driver.get_context(&context), "asking for the context", kernel);
  if (context) return;
  int handle = 0;
  check(driver, driver.get_device(&handle, device), "asking for the device", kernel);
  check(driver, driver.retain_context(&context, handle), "holding the context", kernel);
  check(driver, driver.set_context(context), "setting the context", kernel);
}

// The argument as the bytes of its parameter.
uint64_t packed(ParameterType type, const DriverArgument& argument, const std::string& kernel, size_t index) {
  const auto fail = [&](const char* expected) -> uint64_t {
    throw std::invalid_argument("kernel " + kernel + ": argument " + std::to_string(index) + ": expected " + expected);
  };
  if (type == ParameterType::kFloat32) {
    const auto* number = std::get_if<double>(&argument);
    const auto value = static_cast<float>(number ? *number : static_cast<double>(std::get<int64_t>(argument)));
    uint64_t bytes = 0;
    std::memcpy(&bytes, &value, sizeof value);
    return bytes;
  }
  const auto* integer = std::get_if<int64_t>(&argument);
  if (!integer) return fail("an integer");
  using Limits = std::numeric_limits<int32_t>;
  if (type == ParameterType::kInt32 && (*integer < Limits::min() || *integer > Limits::max()))
    return fail("an integer of 32 bits");
  return static_cast<uint64_t>(*integer);  // little-endian: the low half is the 32-bit integer
}

}  // namespace

DriverKernel::DriverKernel(const std::string& library, bool is_hip, const std::string& image, const std::string& name,
                           const std::string& parameters, int block_threads, int shared_bytes, int device)
    : driver_(driver(library, is_hip)),
      device_(device),
      name_(name),
      parameters_(parameters),
      block_threads_(static_cast<unsigned>(block_threads)),
      shared_bytes_(static_cast<unsigned>(shared_bytes)) {
  if (parameters.find_first_not_of("pilf") != std::string::npos)
    throw std::invalid_argument("parameters: expected characters of \"pilf\", got \"" + parameters + "\"");
  make_current(driver_, device_, name);
  void* module = nullptr;  // never unloaded: at the end of the process, the driver may be gone before us
  check(driver_, driver_.load_module(&module, image.data()), "loading the module", name);
  check(driver_, driver_.get_function(&function_, module, name.c_str()), "finding the function", name);
  if (driver_.set_attribute && shared_bytes > kSharedWithoutAsking)
    check(driver_, driver_.set_attribute(function_, kMaxDynamicSharedBytes, shared_bytes), "asking for shared memory",
          name);
}

void DriverKernel::launch(const std::array<int64_t, 3>& grid, uint64_t stream,
                          const std::vector<DriverArgument>& arguments) const {
  if (arguments.size() != parameters_.size())
    throw std::invalid_argument("kernel " + name_ + ": expected " + std::to_string(parameters_.size()) +
                                " arguments, got " + std::to_string(arguments.size()));
  for (const int64_t size : grid)
    if (size < 1 || size > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("kernel " + name_ + ": expected a grid of 1 to 2^31 - 1 programs, got " +
                                  std::to_string(size));
  std::vector<uint64_t> values(arguments.size() + kScratchPointers, 0);
  std::vector<void*> pointers(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    if (i < arguments.size()) values[i] = packed(static_cast<ParameterType>(parameters_[i]), arguments[i], name_, i);
    pointers[i] = &values[i];
  }
  make_current(driver_, device_, name_);
  check(driver_,
        driver_.launch(function_, static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]),
                       static_cast<unsigned>(grid[2]), block_threads_, 1, 1, shared_bytes_,
                       reinterpret_cast<void*>(stream), pointers.data(), nullptr),
        "the launch", name_);
}

}  // namespace teco::host
