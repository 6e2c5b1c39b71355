#include "host/communicator.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "comm/communicator.h"
#include "comm/device_communicator.h"
#include "comm/error.h"
#include "comm/steps.h"

namespace py = pybind11;

namespace teco::host {
namespace {

using comm::Communicator;
using comm::DeviceCommunicator;
using comm::Segment;

std::chrono::nanoseconds duration(double seconds) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(std::min(seconds, 4e9)));
}

// What a signal's handler has raised while a rank waited. Python's exceptions do not travel through other libraries:
// the call that was interrupted fails with an error of its own, and who gets that takes this one.
PyObject* raised = nullptr;

bool check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return true;
  py::error_already_set error;
  Py_XSETREF(raised, error.value().inc_ref().ptr());
  return false;
}

py::object take_raised() {
  return raised ? py::reinterpret_steal<py::object>(std::exchange(raised, nullptr)) : py::none();
}

}  // namespace

void bind_communicator(py::module_& m) {
  py::register_exception<comm::CommunicatorError>(m, "CommunicatorError", PyExc_RuntimeError);
  m.attr("CommunicatorError").attr("__module__") = "teco_kernels";
  comm::set_interrupt_check(check_signals);
  m.def("take_raised", take_raised);
  m.attr("MAX_RANKS") = comm::kMaxRanks;

  py::class_<Segment>(m, "Segment")
      .def_static("create", &Segment::create, py::arg("world_size"), py::arg("registered_bytes") = 0)
      .def_static("open", &Segment::open, py::arg("pid"), py::arg("descriptor"), py::arg("token"),
                  py::arg("world_size"), py::arg("registered_bytes") = 0)
      .def_property_readonly("descriptor", &Segment::descriptor)
      .def_property_readonly("token", &Segment::token);

  py::class_<Communicator, std::shared_ptr<Communicator>>(m, "Communicator")
      .def(py::init([](Segment& segment, int rank, const std::vector<pid_t>& pids, double timeout) {
             return Communicator::create(std::move(segment), rank, pids, duration(timeout));
           }),
           py::arg("segment"), py::arg("rank"), py::arg("pids"), py::arg("timeout"))
      .def_property_readonly("number", &Communicator::number)
      .def_property_readonly("registered",
                             [](const Communicator& comm) { return reinterpret_cast<uintptr_t>(comm.registered()); })
      .def("close_descriptor", &Communicator::close_descriptor)
      .def("close", &Communicator::close)
      .def_property_readonly("ended", &Communicator::ended)
      .def_static("one_shot_bytes", &Communicator::one_shot_bytes, py::arg("world_size"));

  py::class_<DeviceCommunicator, std::shared_ptr<DeviceCommunicator>>(m, "DeviceCommunicator")
      .def(py::init([](int device, int rank, int world_size, double timeout, int64_t registered_bytes,
                       int64_t slot_bytes, int64_t one_shot_bytes, int max_blocks) {
             return DeviceCommunicator::create({.device = device,
                                                .rank = rank,
                                                .world_size = world_size,
                                                .timeout = timeout,
                                                .registered_bytes = registered_bytes,
                                                .slot_bytes = slot_bytes,
                                                .one_shot_bytes = one_shot_bytes,
                                                .max_blocks = max_blocks});
           }),
           py::arg("device"), py::arg("rank"), py::arg("world_size"), py::arg("timeout"),
           py::arg("registered_bytes") = 0, py::kw_only(),
           py::arg("slot_bytes") = DeviceCommunicator::Options{}.slot_bytes, py::arg("one_shot_bytes") = -1,
           py::arg("max_blocks") = cuda::kMaxRankBlocks)
      .def_property_readonly("handle", [](const DeviceCommunicator& comm) { return py::bytes(comm.handle()); })
      .def("connect", &DeviceCommunicator::connect, py::arg("handles"))
      .def_property_readonly("number", &DeviceCommunicator::number)
      .def_property_readonly(
          "registered", [](const DeviceCommunicator& comm) { return reinterpret_cast<uintptr_t>(comm.registered()); })
      .def("close", &DeviceCommunicator::close)
      .def_property_readonly("ended", &DeviceCommunicator::ended)
      .def_static("one_shot_bytes", &DeviceCommunicator::default_one_shot_bytes, py::arg("world_size"));
}

}  // namespace teco::host
