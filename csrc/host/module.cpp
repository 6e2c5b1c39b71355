// Host-side classes of the decoder loop. Knows nothing of torch.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side classes of the decoder loop.";
}
