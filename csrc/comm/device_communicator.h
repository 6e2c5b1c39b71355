// Collectives of ranks that are processes of one host, each with a GPU: kernels that read one another's memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/visible.h"
#include "cuda/kernels.h"

namespace teco::comm {

// The CUDA kernels of this library, or emulated ones in their place; null when there are none. Of the operator layer.
const cuda::KernelTable* device_kernels();

// Every rank makes the same calls in the same order. A call puts a kernel on the stream and comes back; it throws
// CommunicatorError once the ranks have given up, which a kernel finds out that waits in vain. Nothing a launch is told
// changes from call to call, so a launch may be captured in a graph.
class TECO_VISIBLE DeviceCommunicator {
 public:
  struct Options {
    int device, rank, world_size;
    double timeout;  // seconds
    int64_t registered_bytes = 0;
    int64_t slot_bytes = 64 * 1024;
    int64_t one_shot_bytes = -1;  // -1: default_one_shot_bytes
    int max_blocks = cuda::kMaxRankBlocks;
  };

  // Throws runtime_error where there is no memory, or no kernels.
  static std::shared_ptr<DeviceCommunicator> create(const Options& options);
  static std::shared_ptr<DeviceCommunicator> find(int64_t number);
  ~DeviceCommunicator();
  DeviceCommunicator(const DeviceCommunicator&) = delete;
  DeviceCommunicator& operator=(const DeviceCommunicator&) = delete;

  // What other ranks find this one's memory by, and those of all ranks in their order, before the first call. Throws
  // runtime_error where this device cannot see the memory of another.
  std::string handle() const { return {reinterpret_cast<const char*>(handle_.bytes), sizeof(handle_.bytes)}; }
  void connect(const std::vector<std::string>& handles);

  // As Communicator has them; null, or what went wrong with the launch.
  cuda::Status all_reduce(void* out, const void* in, int64_t count, DType dtype, void* stream);
  cuda::Status all_reduce_rms_norm(void* normed, void* new_residual, const void* in, const void* residual,
                                   const void* weight, int64_t num_rows, int64_t row_size, float eps, DType dtype,
                                   void* stream);
  cuda::Status reduce_scatter(void* out, const void* in, int64_t count, DType dtype, void* stream);
  cuda::Status all_gather(void* out, const void* in, int64_t bytes, void* stream);
  cuda::Status broadcast(void* out, const void* in, int64_t bytes, int root, void* stream);

  // As Communicator's. What was written there by a kernel before a collective on the same stream is what is summed.
  char* registered() const { return memory_.memory + cuda::registered_begin(options_.slot_bytes); }

  // This rank takes part no more; the others notice when they wait for it.
  void close() { closed_ = true; }
  bool ended() const;

  int64_t number() const { return number_; }
  int rank() const { return options_.rank; }
  int world_size() const { return options_.world_size; }
  int device() const { return options_.device; }

  // Up to so many bytes every rank adds everything up. From vLLM's choice for NVLink; not measured here.
  static int64_t default_one_shot_bytes(int world_size);

 private:
  DeviceCommunicator(const cuda::KernelTable& kernels, const Options& options);
  void check() const;
  int64_t registered_place(const void* in, const void* out, int64_t bytes, int64_t row_bytes) const;

  const cuda::KernelTable& kernels_;
  const Options options_;
  cuda::RankMemory memory_ = {};
  cuda::RankHandle handle_ = {};
  cuda::Ranks ranks_ = {};
  int64_t number_ = 0;
  bool closed_ = false;
};

}  // namespace teco::comm
