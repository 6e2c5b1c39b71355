"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Triton decides when it is imported whether it interprets its kernels or compiles them. This process interprets;
# compilation has processes of its own.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stress", action="store_true", help="also run tests that take many minutes")
    parser.addoption("--nvcc", action="store_true", help="also run tests that compile the CUDA kernels for GPUs")
    parser.addoption("--triton", action="store_true", help="also compile all Triton kernels and interpret all cases")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--stress"):
        for item in items:
            if item.get_closest_marker("stress"):
                item.add_marker(pytest.mark.skip(reason="takes many minutes; asked for with --stress"))
    if not config.getoption("--triton"):
        for item in items:
            if item.get_closest_marker("triton"):
                item.add_marker(pytest.mark.skip(reason="takes many minutes; asked for with --triton"))
    if not config.getoption("--nvcc"):
        for item in items:
            if item.get_closest_marker("nvcc"):
                item.add_marker(pytest.mark.skip(reason="compiles for GPUs; asked for with --nvcc"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that waking a second thread costs more than it does."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def nothing_left_in_shared_memory() -> Iterator[None]:
    """Communicators leave nothing in /dev/shm, whatever becomes of them."""

    def names() -> set[str]:  # but for the semaphores of Python's multiprocessing: any program may have those
        return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}

    before = names()
    yield
    assert names() <= before


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The real model as a GGUF file; fetched once, then from the cache."""
    from teco_kernels.assets import default_model

    return default_model()


@pytest.fixture(scope="session")
def model_4bit() -> Path:
    """The real model quantised to 4 bits, as `make demo` uses it; made once, then from the cache."""
    from teco_kernels.quantization import default_quantized_model

    return default_quantized_model()
