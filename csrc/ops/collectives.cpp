// Collectives as operators: a plan that holds one holds its communicator, and replays it like any kernel. Tensors of a
// GPU go to a communicator of GPUs.
#include <memory>

#include "comm/communicator.h"
#include "comm/device_communicator.h"
#include "comm/error.h"
#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {
namespace {

using comm::Communicator;
using comm::DeviceCommunicator;

struct CollectiveParams {
  std::shared_ptr<Communicator> comm;
  std::shared_ptr<DeviceCommunicator> device_comm;  // in its place
  void* out;
  const void* input;
  int64_t count;  // elements of a rank: of input, but of out where ranks get a row of the sum each
  ScalarType type;
  int element_bytes, root;
  DType dtype;      // of what is summed
  DType out_dtype;  // of the sum

  int type_number() const { return static_cast<int>(type); }
  int64_t bytes() const { return count * element_bytes; }
  int rank() const { return comm ? comm->rank() : device_comm->rank(); }
  int world_size() const { return comm ? comm->world_size() : device_comm->world_size(); }
};

struct ReduceRmsNormParams {
  CollectiveParams reduce;
  void* residual_out;
  const void *residual, *weight;
  int64_t num_rows, hidden_size;
  float eps;
};

// What a communicator throws as an error that crosses the stable ABI, in a replay too.
template <class Body>
auto guarded(Body body) {
  try {
    return body();
  } catch (const comm::CommunicatorError& error) {
    fail("CommunicatorError", error.what());
  } catch (const comm::Interrupted& error) {
    fail("Interrupted", error.what());
  }
}

// On the CPU, and on a stream.
void run_all_reduce(const CollectiveParams& p, int) {
  guarded([&] { p.comm->all_reduce(p.out, p.input, p.count, p.dtype); });
}
cuda::Status enqueue_all_reduce(const CollectiveParams& p, void* stream) {
  return p.device_comm->all_reduce(p.out, p.input, p.count, p.dtype, stream);
}

void run_all_reduce_rms_norm(const ReduceRmsNormParams& p, int) {
  const CollectiveParams& r = p.reduce;
  guarded([&] {
    r.comm->all_reduce_rms_norm(r.out, p.residual_out, r.input, p.residual, p.weight, p.num_rows, p.hidden_size, p.eps,
                                r.dtype, r.out_dtype);
  });
}
cuda::Status enqueue_all_reduce_rms_norm(const ReduceRmsNormParams& p, void* stream) {
  const CollectiveParams& r = p.reduce;
  return r.device_comm->all_reduce_rms_norm(r.out, p.residual_out, r.input, p.residual, p.weight, p.num_rows,
                                            p.hidden_size, p.eps, r.dtype, stream);
}

void run_all_gather(const CollectiveParams& p, int) {
  guarded([&] { p.comm->all_gather(p.out, p.input, p.count, p.element_bytes, p.type_number()); });
}
cuda::Status enqueue_all_gather(const CollectiveParams& p, void* stream) {
  return p.device_comm->all_gather(p.out, p.input, p.bytes(), stream);
}

void run_reduce_scatter(const CollectiveParams& p, int) {
  guarded([&] { p.comm->reduce_scatter(p.out, p.input, p.count, p.dtype); });
}
cuda::Status enqueue_reduce_scatter(const CollectiveParams& p, void* stream) {
  return p.device_comm->reduce_scatter(p.out, p.input, p.count, p.dtype, stream);
}

void run_broadcast(const CollectiveParams& p, int) {
  guarded([&] { p.comm->broadcast(p.out, p.input, p.count, p.element_bytes, p.type_number(), p.root); });
}
cuda::Status enqueue_broadcast(const CollectiveParams& p, void* stream) {
  return p.device_comm->broadcast(p.out, p.input, p.bytes(), p.root, stream);
}

// The end of every collective.
template <class Params>
void launch_collective(const Tensor& input, void (*run)(const Params&, int),
                       cuda::Status (*enqueue)(const Params&, void*), const Params& params) {
  if (!cuda_kernels_for(input)) return launch(input, run, params);
  run_on_stream(input, [enqueue, params](void* stream) { return guarded([&] { return enqueue(params, stream); }); });
}

// A contiguous tensor as one row.
Rows whole(const Tensor& tensor) {
  return {1, tensor.numel(), tensor.numel()};
}

void check_apart_from(const Tensor& out, const char* out_name, const Tensor& input, const char* input_name,
                      InPlace in_place) {
  check_apart(out, out_name, whole(out), input, input_name, whole(input), in_place);
}

// "[4, 8]", the leading dimension or dimensions given apart.
std::string shape_text(const Tensor& tensor, int64_t from, const std::string& before = "") {
  std::string text = before;
  for (int64_t d = from; d < tensor.dim(); ++d) text += (text.empty() ? "" : ", ") + std::to_string(tensor.size(d));
  return "[" + text + "]";
}

// Whether the dimensions of `tensor` behind `skipped` are those of `other` behind `other_skipped`.
bool same_sizes(const Tensor& tensor, int64_t skipped, const Tensor& other, int64_t other_skipped) {
  if (tensor.dim() - skipped != other.dim() - other_skipped) return false;
  for (int64_t d = skipped; d < tensor.dim(); ++d)
    if (tensor.size(d) != other.size(d - skipped + other_skipped)) return false;
  return true;
}

void check_shape_of(const Tensor& tensor, const char* name, const Tensor& input) {
  Argument(tensor, name).on_device_of(input, "input").contiguous();
  require(same_sizes(tensor, 0, input, 0), name, ": expected the shape of input, ", shape_text(input, 0), ", got ",
          shape_text(tensor, 0));
}

void check_like(const Tensor& tensor, const char* name, const Tensor& input, const char* input_name = "input") {
  Argument(tensor, name).same_dtype(input, input_name);
  check_shape_of(tensor, name, input);
}

CollectiveParams params_of(const Tensor& out, const Tensor& input, int64_t comm, int64_t count) {
  Argument(input, "input").contiguous();
  Argument(out, "out").on_device_of(input, "input").contiguous();
  CollectiveParams params{};
  if (cuda_kernels_for(input)) {
    params.device_comm = DeviceCommunicator::find(comm);
  } else {
    params.comm = Communicator::find(comm);
  }
  require(params.comm || params.device_comm, "comm: there is no communicator with number ", comm,
          " (any more) for tensors on this device");
  params.out = out.mutable_data_ptr();
  params.input = input.const_data_ptr();
  params.count = count;
  params.type = input.scalar_type();
  params.element_bytes = static_cast<int>(input.element_size());
  return params;
}

CollectiveParams sum_params(const Tensor& out, const Tensor& input, int64_t comm, int64_t count) {
  Argument(input, "input").floating();
  Argument(out, "out").same_dtype(input, "input");
  CollectiveParams params = params_of(out, input, comm, count);
  params.dtype = params.out_dtype = to_dtype(input.scalar_type(), "input");
  return params;
}

}  // namespace

void all_reduce(Tensor out, Tensor input, int64_t comm) {
  const CollectiveParams params = sum_params(out, input, comm, input.numel());
  check_like(out, "out", input);
  check_apart_from(out, "out", input, "input", InPlace::kYes);
  launch_collective(input, run_all_reduce, enqueue_all_reduce, params);
}

void all_reduce_rms_norm(Tensor out, Tensor residual_out, Tensor input, Tensor residual, Tensor weight, double eps,
                         int64_t comm) {
  ReduceRmsNormParams params{};
  const bool exact = input.scalar_type() == ScalarType::Double;
  if (exact) {
    Argument(input, "input").on_cpu();  // no CUDA kernel gives exact sums
    require(!cuda_kernels_for(input), "input: expected float32, float16 or bfloat16, got float64");
    Argument(residual, "residual").on_cpu().floating();
    params.reduce = params_of(out, input, comm, input.numel());
    params.reduce.dtype = DType::kFloat64;
    params.reduce.out_dtype = to_dtype(residual.scalar_type(), "residual");
  } else {
    params.reduce = sum_params(out, input, comm, input.numel());
    Argument(residual, "residual").on_device_of(input, "input").same_dtype(input, "input");
  }
  require(input.dim() > 0, "input: expected shape [..., hidden_size], got []");
  Size hidden_size{"hidden_size", input.size(input.dim() - 1), "input"};
  Argument(weight, "weight")
      .on_device_of(input, "input")
      .same_dtype(residual, "residual")
      .shape({&hidden_size})
      .contiguous();
  check_shape_of(residual, "residual", input);
  check_like(out, "out", residual, "residual");
  check_like(residual_out, "residual_out", residual, "residual");
  check_apart_from(out, "out", input, "input", exact ? InPlace::kNo : InPlace::kYes);
  check_apart_from(out, "out", residual, "residual", InPlace::kNo);
  check_apart_from(residual_out, "residual_out", residual, "residual", InPlace::kYes);
  check_apart_from(residual_out, "residual_out", input, "input", InPlace::kNo);
  check_apart_from(residual_out, "residual_out", out, "out", InPlace::kNo);
  require(eps >= 0, "eps: expected a value >= 0, got ", eps);
  params.residual_out = residual_out.mutable_data_ptr();
  params.residual = residual.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.hidden_size = hidden_size.value;
  params.num_rows = hidden_size.value ? input.numel() / hidden_size.value : 0;
  params.eps = static_cast<float>(eps);
  launch_collective(input, run_all_reduce_rms_norm, enqueue_all_reduce_rms_norm, params);
}

void all_gather(Tensor out, Tensor input, int64_t comm) {
  Argument(out, "out").same_dtype(input, "input");
  const CollectiveParams params = params_of(out, input, comm, input.numel());
  const int world_size = params.world_size();
  require(out.dim() > 0 && out.size(0) == world_size && same_sizes(out, 1, input, 0), "out: expected shape ",
          shape_text(input, 0, std::to_string(world_size)), ", a row per rank, got ", shape_text(out, 0));
  const auto* own_row = static_cast<const char*>(params.out) + params.rank() * params.count * params.element_bytes;
  if (params.input != own_row) check_apart_from(out, "out", input, "input", InPlace::kNo);
  launch_collective(input, run_all_gather, enqueue_all_gather, params);
}

void reduce_scatter(Tensor out, Tensor input, int64_t comm) {
  const CollectiveParams params = sum_params(out, input, comm, out.numel());
  const int world_size = params.world_size();
  require(input.dim() > 0 && input.size(0) == world_size, "input: expected shape [", world_size,
          ", ...], a row per rank, got ", shape_text(input, 0));
  require(same_sizes(out, 0, input, 1), "out: expected shape ", shape_text(input, 1), ", a row of input, got ",
          shape_text(out, 0));
  check_apart_from(out, "out", input, "input", InPlace::kNo);
  launch_collective(input, run_reduce_scatter, enqueue_reduce_scatter, params);
}

void broadcast(Tensor out, Tensor input, int64_t root, int64_t comm) {
  CollectiveParams params = params_of(out, input, comm, input.numel());
  const int world_size = params.world_size();
  require(root >= 0 && root < world_size, "root: expected a rank of 0 to ", world_size - 1, ", got ", root);
  check_like(out, "out", input);
  check_apart_from(out, "out", input, "input", InPlace::kYes);
  params.root = static_cast<int>(root);
  launch_collective(input, run_broadcast, enqueue_broadcast, params);
}

}  // namespace teco::ops
