#include "host/communicator.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "comm/communicator.h"
#include "comm/error.h"
#include "comm/steps.h"

namespace py = pybind11;

namespace teco::host {
namespace {

using comm::Communicator;
using comm::Segment;

// Tensors come as addresses: this module knows nothing of torch.
template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::chrono::nanoseconds duration(double seconds) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(std::min(seconds, 4e9)));
}

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace

void bind_communicator(py::module_& m) {
  py::register_exception<comm::CommunicatorError>(m, "CommunicatorError", PyExc_RuntimeError);
  m.attr("CommunicatorError").attr("__module__") = "teco_kernels";
  comm::set_interrupt_check(check_signals);
  m.attr("MAX_RANKS") = comm::kMaxRanks;

  py::class_<Segment>(m, "Segment")
      .def_static("create", &Segment::create, py::arg("world_size"))
      .def_static("open", &Segment::open, py::arg("pid"), py::arg("descriptor"), py::arg("token"),
                  py::arg("world_size"))
      .def_property_readonly("descriptor", &Segment::descriptor)
      .def_property_readonly("token", &Segment::token);

  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Communicator>(m, "Communicator")
      .def(py::init([](Segment& segment, int rank, const std::vector<pid_t>& pids, double timeout) {
             return std::make_unique<Communicator>(std::move(segment), rank, pids, duration(timeout));
           }),
           py::arg("segment"), py::arg("rank"), py::arg("pids"), py::arg("timeout"))
      .def(
          "all_reduce",
          [](Communicator& comm, uintptr_t out, uintptr_t input, int64_t count, int dtype) {
            comm.all_reduce(pointer(out), pointer<const void>(input), count, static_cast<DType>(dtype));
          },
          py::arg("out"), py::arg("input"), py::arg("count"), py::arg("dtype"), Unlocked())
      .def(
          "all_reduce_rms_norm",
          [](Communicator& comm, uintptr_t normed, uintptr_t new_residual, uintptr_t input, uintptr_t residual,
             uintptr_t weight, int64_t num_rows, int64_t row_size, double eps, int dtype) {
            comm.all_reduce_rms_norm(pointer(normed), pointer(new_residual), pointer<const void>(input),
                                     pointer<const void>(residual), pointer<const void>(weight), num_rows, row_size,
                                     static_cast<float>(eps), static_cast<DType>(dtype));
          },
          py::arg("normed"), py::arg("new_residual"), py::arg("input"), py::arg("residual"), py::arg("weight"),
          py::arg("num_rows"), py::arg("row_size"), py::arg("eps"), py::arg("dtype"), Unlocked())
      .def(
          "reduce_scatter",
          [](Communicator& comm, uintptr_t out, uintptr_t input, int64_t count, int dtype) {
            comm.reduce_scatter(pointer(out), pointer<const void>(input), count, static_cast<DType>(dtype));
          },
          py::arg("out"), py::arg("input"), py::arg("count"), py::arg("dtype"), Unlocked())
      .def(
          "all_gather",
          [](Communicator& comm, uintptr_t out, uintptr_t input, int64_t count, int element_bytes, int dtype) {
            comm.all_gather(pointer(out), pointer<const void>(input), count, element_bytes, dtype);
          },
          py::arg("out"), py::arg("input"), py::arg("count"), py::arg("element_bytes"), py::arg("dtype"), Unlocked())
      .def(
          "broadcast",
          [](Communicator& comm, uintptr_t out, uintptr_t input, int64_t count, int element_bytes, int dtype,
             int root) { comm.broadcast(pointer(out), pointer<const void>(input), count, element_bytes, dtype, root); },
          py::arg("out"), py::arg("input"), py::arg("count"), py::arg("element_bytes"), py::arg("dtype"),
          py::arg("root"), Unlocked())
      .def("close_descriptor", &Communicator::close_descriptor)
      .def("close", &Communicator::close)
      .def_property_readonly("ended", &Communicator::ended)
      .def_static("one_shot_bytes", &Communicator::one_shot_bytes, py::arg("world_size"));
}

}  // namespace teco::host
