"""The few functions of ggml that are needed, from the libraries that llama-cpp-python brings."""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from problems import Array

TYPES = {"float32": 0, "float16": 1, "Q4_0": 2, "Q4_1": 3, "Q4_K": 12}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", ctypes.c_bool))


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("block_size", c_int64),
        ("block_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, POINTER(c_float), c_int64)),
    )


def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'llama_cpp'")
    folder = Path(spec.origin).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    return base, ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)


_base, _cpu = _libraries()
_SIGNATURES = {
    "ggml_init": (_base, c_void_p, [_InitParams]),
    "ggml_free": (_base, None, [c_void_p]),
    "ggml_new_tensor": (_base, c_void_p, [c_void_p, c_int, c_int, POINTER(c_int64)]),
    "ggml_nbytes": (_base, c_size_t, [c_void_p]),
    "ggml_mul_mat": (_base, c_void_p, [c_void_p] * 3),
    "ggml_permute": (_base, c_void_p, [c_void_p, c_void_p, c_int, c_int, c_int, c_int]),
    "ggml_flash_attn_ext": (_base, c_void_p, [c_void_p] * 5 + [c_float] * 3),
    "ggml_new_graph_custom": (_base, c_void_p, [c_void_p, c_size_t, ctypes.c_bool]),
    "ggml_build_forward_expand": (_base, None, [c_void_p, c_void_p]),
    "ggml_quantize_chunk": (_base, c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_get_type_traits": (_base, POINTER(_TypeTraits), [c_int]),
    "ggml_row_size": (_base, c_size_t, [c_int, c_int64]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_base, c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (_base, None, [c_void_p]),
    "ggml_backend_tensor_set": (_base, None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (_base, None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (_base, c_int, [c_void_p, c_void_p]),
    "ggml_backend_reg_get_proc_address": (_base, c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_reg_dev_get": (_base, c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buft_name": (_base, c_char_p, [c_void_p]),
    "ggml_backend_cpu_buffer_type": (_base, c_void_p, []),
    "ggml_backend_cpu_init": (_cpu, c_void_p, []),
    "ggml_backend_cpu_reg": (_cpu, c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (_cpu, None, [c_void_p, c_int]),
}


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the table above."""
    library, result, parameters = _SIGNATURES[name]
    function = getattr(library, name)
    function.restype, function.argtypes = result, parameters
    return function(*arguments)


def buffer_type(repacked: bool) -> int:
    """Where tensors lie: as they are, or rearranged for the kernels that are llama.cpp's fastest."""
    if not repacked:
        return int(call("ggml_backend_cpu_buffer_type"))
    registry = call("ggml_backend_cpu_reg")
    address = call("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(call("ggml_backend_reg_dev_get", registry, 0))
    index = 0
    while extra[index]:
        if call("ggml_backend_buft_name", extra[index]) == b"CPU_REPACK":
            return int(extra[index])
        index += 1
    raise RuntimeError("this build of ggml repacks no weights")


class Backend:
    """ggml's CPU backend with so many threads."""

    def __init__(self, threads: int) -> None:
        self._handle = call("ggml_backend_cpu_init")
        call("ggml_backend_cpu_set_n_threads", self._handle, threads)

    def compute(self, graph: int) -> None:
        status = call("ggml_backend_graph_compute", self._handle, graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute: status {status}")


class Context:
    """Tensors that are described first and get their memory together; freed with this object."""

    def __init__(self, num_tensors: int) -> None:
        self._buffer: int | None = None
        self.handle = call("ggml_init", _InitParams(num_tensors * 1024 + (1 << 20), None, True))

    def tensor(self, kind: str, *sizes: int) -> int:
        """Sizes begin with the innermost."""
        return int(call("ggml_new_tensor", self.handle, TYPES[kind], len(sizes), (c_int64 * len(sizes))(*sizes)))

    def node(self, name: str, *arguments: Any) -> int:
        return int(call(name, self.handle, *arguments))

    def graph(self, outputs: list[int]) -> int:
        graph = int(call("ggml_new_graph_custom", self.handle, max(64, 4 * len(outputs)), False))
        for output in outputs:
            call("ggml_build_forward_expand", graph, output)
        return graph

    def allocate(self, kind: int) -> None:
        self._buffer = call("ggml_backend_alloc_ctx_tensors_from_buft", self.handle, kind)
        if not self._buffer:
            raise MemoryError("ggml could not allocate its tensors")

    def __del__(self) -> None:
        if self._buffer:
            call("ggml_backend_buffer_free", self._buffer)
        call("ggml_free", self.handle)


def write(tensor: int, data: Array) -> None:
    data = np.ascontiguousarray(data)
    expected = call("ggml_nbytes", tensor)
    if data.nbytes != expected:
        raise ValueError(f"expected {expected} bytes for the tensor, got {data.nbytes}")
    call("ggml_backend_tensor_set", tensor, data.ctypes.data, 0, data.nbytes)


def read(tensor: int, shape: tuple[int, ...]) -> Array:
    """An fp32 tensor."""
    data = np.empty(shape, np.float32)
    call("ggml_backend_tensor_get", tensor, data.ctypes.data, 0, data.nbytes)
    return data


def quantize(kind: str, rows: Array) -> Array:
    """Bytes of fp32 rows in a quantised format, by ggml's own rounding."""
    rows = np.ascontiguousarray(rows, np.float32)
    data = np.empty(len(rows) * call("ggml_row_size", TYPES[kind], rows.shape[1]), np.uint8)
    call("ggml_quantize_chunk", TYPES[kind], rows.ctypes.data, data.ctypes.data, 0, *rows.shape, None)
    return data


def dequantize(kind: str, data: Array, shape: tuple[int, int]) -> Array:
    rows = np.empty(shape, np.float32)
    to_float = call("ggml_get_type_traits", TYPES[kind]).contents.to_float
    to_float(data.ctypes.data, rows.ctypes.data_as(POINTER(c_float)), rows.size)
    return rows
