// Host-side classes of the decoder loop, the communicator, and the launcher of embedded kernels. Knows nothing of
// torch. Docstrings stand in _host.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/block_pool.h"
#include "host/communicator.h"
#include "host/driver_kernel.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side classes of the decoder loop.";

  using teco::host::BlockPool;
  using Ids = std::vector<int64_t>;
  using Tokens = std::vector<int32_t>;
  py::class_<BlockPool>(m, "BlockPool")
      .def(py::init<int64_t, int64_t, int>(), py::arg("num_blocks"), py::arg("block_size"), py::kw_only(),
           py::arg("hash_bits") = 64)
      .def("allocate", &BlockPool::allocate, py::arg("n") = 1)
      .def(
          "ref", [](BlockPool& pool, const Ids& block_ids) { pool.ref(block_ids); }, py::arg("block_ids"))
      .def(
          "free", [](BlockPool& pool, const Ids& block_ids) { pool.free(block_ids); }, py::arg("block_ids"))
      .def(
          "find_prefix",
          [](BlockPool& pool, const Tokens& token_ids, uint64_t salt) { return pool.find_prefix(token_ids, salt); },
          py::arg("token_ids"), py::kw_only(), py::arg("salt") = 0)
      .def(
          "cache_blocks",
          [](BlockPool& pool, const Ids& block_ids, const Tokens& token_ids, std::optional<int64_t> parent,
             uint64_t salt) { return pool.cache_blocks(block_ids, token_ids, parent, salt); },
          py::arg("block_ids"), py::arg("token_ids"), py::kw_only(), py::arg("parent") = py::none(),
          py::arg("salt") = 0)
      .def("clear_prefix_cache", &BlockPool::clear_prefix_cache)
      .def("ref_count", &BlockPool::ref_count, py::arg("block_id"))
      .def("is_shared", &BlockPool::is_shared, py::arg("block_id"))
      .def_property_readonly("num_blocks", &BlockPool::num_blocks)
      .def_property_readonly("block_size", &BlockPool::block_size)
      .def_property_readonly("num_free", &BlockPool::num_free)
      .def_property_readonly("num_cached", &BlockPool::num_cached)
      .def_property_readonly("num_available", &BlockPool::num_available)
      .def_property_readonly("num_used", &BlockPool::num_used)
      .def_property_readonly("peak_used", &BlockPool::peak_used)
      .def_property_readonly("num_evictions", &BlockPool::num_evictions)
      .def_property_readonly("queried_tokens", &BlockPool::queried_tokens)
      .def_property_readonly("hit_tokens", &BlockPool::hit_tokens);

  using teco::host::DriverKernel;
  py::class_<DriverKernel>(m, "DriverKernel")
      .def(py::init([](const std::string& library, bool is_hip, const py::bytes& image, const std::string& name,
                       const std::string& parameters, int block_threads, int shared_bytes, int device) {
             return DriverKernel(library, is_hip, image, name, parameters, block_threads, shared_bytes, device);
           }),
           py::arg("library"), py::arg("is_hip"), py::arg("image"), py::arg("name"), py::arg("parameters"),
           py::arg("block_threads"), py::arg("shared_bytes"), py::arg("device"))
      .def("launch", &DriverKernel::launch, py::arg("grid"), py::arg("stream"), py::arg("arguments"));

  teco::host::bind_communicator(m);
}
