// Memory of a rank, found by the processes of other ranks through a handle of the CUDA runtime (IPC). In the emulation
// all ranks are of one process, and a handle is an address.
#include <cstring>

#include "cuda/device.h"
#include "cuda/ranks.h"

#ifndef __CUDACC__
#include <cstdlib>
#endif

namespace teco::cuda {

#ifdef __CUDACC__

namespace {

static_assert(sizeof(RankHandle) == sizeof(cudaIpcMemHandle_t));

// Makes a device the current one of this thread, for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&before_);
    error = cudaSetDevice(device);
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  cudaError_t error;

 private:
  int before_ = 0;
};

Status status_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

// The memory itself stays until the process ends: to free what another process still has open is undefined, and ranks
// close their communicators when they like.
void free_rank_memory(int device, const RankMemory& memory) {
  const OnDevice guard(device);
  cudaFreeHost(memory.report);
}

Status allocate_rank_memory(int device, int64_t slot_bytes, int64_t registered_bytes, RankMemory* result,
                            RankHandle* handle) {
  const OnDevice guard(device);
  cudaError_t error = guard.error;
  const auto then = [&](auto call) {
    if (error == cudaSuccess) error = call();
  };
  RankMemory memory = {};
  cudaIpcMemHandle_t found_by;
  memory.bytes = registered_begin(slot_bytes) + registered_bytes;
  then([&] { return cudaMalloc(&memory.memory, memory.bytes); });
  then([&] { return cudaMemset(memory.memory, 0, kSlotsBegin); });
  then([&] { return cudaHostAlloc(&memory.report, sizeof(uint32_t), cudaHostAllocMapped); });
  then([&] { return cudaHostGetDevicePointer(&memory.report_on_device, memory.report, 0); });
  then([&] { return cudaIpcGetMemHandle(&found_by, memory.memory); });
  then([&] { return cudaDeviceSynchronize(); });  // the flags are zeros before any rank has the handle
  if (error != cudaSuccess) {
    cudaFree(memory.memory);
    cudaFreeHost(memory.report);
    cudaGetLastError();  // or the next launch would tell of it
    return status_of(error);
  }
  *memory.report = 0;
  *result = memory;
  std::memcpy(handle->bytes, &found_by, sizeof(found_by));
  return nullptr;
}

Status open_rank_memory(int device, const RankHandle& handle, char** memory) {
  const OnDevice guard(device);
  cudaIpcMemHandle_t found_by;
  std::memcpy(&found_by, handle.bytes, sizeof(found_by));
  cudaError_t error = guard.error;
  if (error == cudaSuccess)
    error = cudaIpcOpenMemHandle(reinterpret_cast<void**>(memory), found_by, cudaIpcMemLazyEnablePeerAccess);
  if (error != cudaSuccess) cudaGetLastError();
  return status_of(error);
}

void close_rank_memory(int device, char* memory) {
  const OnDevice guard(device);
  cudaDeviceSynchronize();  // kernels may be reading it
  cudaIpcCloseMemHandle(memory);
}

#else

void free_rank_memory(int, const RankMemory& memory) {
  simt::unmap_within(memory.memory, memory.bytes);
  simt::unmap_within(memory.report, sizeof(uint32_t));
  std::free(memory.memory);
  delete memory.report;
}

Status allocate_rank_memory(int, int64_t slot_bytes, int64_t registered_bytes, RankMemory* memory, RankHandle* handle) {
  const int64_t registered = registered_begin(slot_bytes), bytes = registered + registered_bytes;
  char* begin =
      static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(ceil_div<int64_t>(bytes, 4096) * 4096)));
  std::memset(begin, 0, kSlotsBegin);
  std::memset(begin + kSlotsBegin, 0xff, static_cast<size_t>(bytes - kSlotsBegin));  // NaN
  auto* report = new uint32_t(0);
  *memory = {begin, bytes, report, report};
  simt::map(begin, kSlotsBegin, 4, "a rank's flags");
  simt::map(begin + kSlotsBegin, static_cast<size_t>(registered - kSlotsBegin), 16, "a rank's slots");
  simt::map(begin + registered, static_cast<size_t>(registered_bytes), 2, "a rank's registered memory");
  simt::map(report, sizeof(uint32_t), 4, "a rank's report");
  std::memcpy(handle->bytes, &begin, sizeof(begin));
  return nullptr;
}

Status open_rank_memory(int, const RankHandle& handle, char** memory) {
  std::memcpy(memory, handle.bytes, sizeof(*memory));
  return nullptr;
}

void close_rank_memory(int, char*) {}

#endif

}  // namespace teco::cuda
