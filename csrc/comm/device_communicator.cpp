#include "comm/device_communicator.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "comm/error.h"
#include "comm/registry.h"

namespace teco::comm {
namespace {

void check_status(cuda::Status status) {
  if (status) throw std::runtime_error(status);
}

int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// Nanoseconds; a timeout without end is one of centuries.
int64_t nanoseconds(double seconds) {
  return static_cast<int64_t>(std::min(seconds, 4e9) * 1e9);
}

}  // namespace

std::shared_ptr<DeviceCommunicator> DeviceCommunicator::create(const Options& options) {
  const cuda::KernelTable* kernels = device_kernels();
  if (!kernels) throw std::runtime_error("this build has no CUDA kernels");
  std::shared_ptr<DeviceCommunicator> made(new DeviceCommunicator(*kernels, options));
  made->number_ = Registry<DeviceCommunicator>::instance().add(made);
  return made;
}

std::shared_ptr<DeviceCommunicator> DeviceCommunicator::find(int64_t number) {
  return Registry<DeviceCommunicator>::instance().find(number);
}

DeviceCommunicator::DeviceCommunicator(const cuda::KernelTable& kernels, const Options& options)
    : kernels_(kernels), options_(options) {
  check_status(
      kernels.allocate_rank_memory(options.device, options.slot_bytes, options.registered_bytes, &memory_, &handle_));
  ranks_.report = memory_.report_on_device;
  ranks_.slot_bytes = options.slot_bytes;
  ranks_.one_shot_bytes =
      options.one_shot_bytes < 0 ? default_one_shot_bytes(options.world_size) : options.one_shot_bytes;
  ranks_.timeout = nanoseconds(options.timeout);
  ranks_.rank = options.rank;
  ranks_.world_size = options.world_size;
  ranks_.max_blocks = options.max_blocks;
}

DeviceCommunicator::~DeviceCommunicator() {
  Registry<DeviceCommunicator>::instance().remove(number_);
  for (int rank = 0; rank < world_size(); ++rank)
    if (rank != this->rank() && ranks_.memory[rank]) kernels_.close_rank_memory(device(), ranks_.memory[rank]);
  kernels_.free_rank_memory(device(), memory_);
}

void DeviceCommunicator::connect(const std::vector<std::string>& handles) {
  if (static_cast<int>(handles.size()) != world_size())
    throw std::runtime_error("handles: expected one per rank, " + std::to_string(world_size()) + ", got " +
                             std::to_string(handles.size()));
  for (int rank = 0; rank < world_size(); ++rank) {
    if (rank == this->rank()) {
      ranks_.memory[rank] = memory_.memory;
      continue;
    }
    cuda::RankHandle handle;
    if (handles[rank].size() != sizeof(handle.bytes))
      throw std::runtime_error("handles: expected " + std::to_string(sizeof(handle.bytes)) + " bytes each, got " +
                               std::to_string(handles[rank].size()) + " of rank " + std::to_string(rank));
    std::memcpy(handle.bytes, handles[rank].data(), sizeof(handle.bytes));
    if (const cuda::Status status = kernels_.open_rank_memory(device(), handle, &ranks_.memory[rank]))
      throw std::runtime_error("the memory of rank " + std::to_string(rank) + " cannot be mapped: " + status);
  }
}

int64_t DeviceCommunicator::default_one_shot_bytes(int world_size) {
  return world_size <= 2 ? INT64_MAX : world_size <= 4 ? 512 * 1024 : 256 * 1024;
}

namespace {

uint32_t reported(const uint32_t* report) {
  return std::atomic_ref(*const_cast<uint32_t*>(report)).load(std::memory_order_relaxed);
}

}  // namespace

bool DeviceCommunicator::ended() const {
  return closed_ || reported(memory_.report) != 0;
}

void DeviceCommunicator::check() const {
  const std::string at = "communicator at rank " + std::to_string(rank()) + ": ";
  if (closed_) throw CommunicatorError(at + "it was closed here");
  const uint32_t report = reported(memory_.report);
  if (report == 0) return;
  const std::string about = "rank " + std::to_string(report >> 8 & 255);
  const std::string noticed = ", as rank " + std::to_string(report >> 16 & 255) + " noticed";
  switch (static_cast<cuda::RankFailure>(report & 255)) {
    case cuda::RankFailure::kLate:
      throw CommunicatorError(at + about + " did not come within the timeout" + noticed);
    case cuda::RankFailure::kDiffers:
      throw CommunicatorError(at + about + " called another collective, or one of another size or dtype" + noticed);
    case cuda::RankFailure::kNone:
      break;
  }
  throw CommunicatorError(at + "the ranks have given up");
}

// Where it is summed from registered memory: whole vectors, and as many bytes as are summed in one shot.
int64_t DeviceCommunicator::registered_place(const void* in, const void* out, int64_t bytes, int64_t row_bytes) const {
  const auto offset_of = [&](const void* p) { return static_cast<const char*>(p) - registered(); };
  const int64_t from = offset_of(in), to = offset_of(out);
  const bool is_registered = from >= 0 && from + bytes <= options_.registered_bytes;
  const bool out_is_apart = to + bytes <= 0 || to >= options_.registered_bytes;
  const bool is_whole = from % 16 == 0 && row_bytes % 16 == 0;
  const bool is_taken = is_registered && out_is_apart && is_whole && bytes <= ranks_.one_shot_bytes;
  return is_taken ? from + (registered() - memory_.memory) : -1;
}

cuda::Status DeviceCommunicator::all_reduce(void* out, const void* in, int64_t count, DType dtype, void* stream) {
  check();
  const int64_t bytes = count * size_of(dtype);
  return kernels_.all_reduce(
      ranks_,
      {.out = out, .input = in, .count = count, .registered = registered_place(in, out, bytes, bytes), .dtype = dtype},
      stream);
}

cuda::Status DeviceCommunicator::all_reduce_rms_norm(void* normed, void* new_residual, const void* in,
                                                     const void* residual, const void* weight, int64_t num_rows,
                                                     int64_t row_size, float eps, DType dtype, void* stream) {
  check();
  const int64_t count = num_rows * row_size, row_bytes = row_size * size_of(dtype);
  return kernels_.all_reduce_rms_norm(
      ranks_,
      {
          .reduce = {.out = normed,
                     .input = in,
                     .count = count,
                     .registered = registered_place(in, normed, num_rows * row_bytes, row_bytes),
                     .dtype = dtype},
          .residual_out = new_residual,
          .residual = residual,
          .weight = weight,
          .num_rows = num_rows,
          .hidden_size = row_size,
          .eps = eps,
      },
      stream);
}

cuda::Status DeviceCommunicator::reduce_scatter(void* out, const void* in, int64_t count, DType dtype, void* stream) {
  check();
  return kernels_.reduce_scatter(ranks_, {.out = out, .input = in, .count = count, .dtype = dtype}, stream);
}

cuda::Status DeviceCommunicator::all_gather(void* out, const void* in, int64_t bytes, void* stream) {
  check();
  return kernels_.all_gather(ranks_, {.out = out, .input = in, .bytes = bytes}, stream);
}

cuda::Status DeviceCommunicator::broadcast(void* out, const void* in, int64_t bytes, int root, void* stream) {
  check();
  return kernels_.broadcast(ranks_, {.out = out, .input = in, .bytes = bytes, .root = root}, stream);
}

}  // namespace teco::comm
