"""Runs tritonserver: the one of the package nvidia-pytriton, beside this interpreter, or the one that is installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

_STUB = "triton_python_backend_stub"


@contextmanager
def server_command(
    repository: str | Path,
    *,
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    arguments: Sequence[str] = (),
) -> Iterator[tuple[list[str], dict[str, str]]]:
    """A command and its environment, which stay valid as long as the context.

    Parameters
    ----------
    repository : str or Path
    host : str
        Address to listen at; by default only this machine reaches it.
    http_port, grpc_port, metrics_port : int
    arguments : sequence of str
        Of tritonserver, after those that are made here.

    Raises
    ------
    FileNotFoundError
        There is no tritonserver, or nvidia-pytriton has none for this version of Python.
    """
    command = [f"--model-repository={repository}"]
    for name, port in (("http", http_port), ("grpc", grpc_port), ("metrics", metrics_port)):
        command += [f"--{name}-address={host}", f"--{name}-port={port}"]
    # Servers with the same prefix would share their memory.
    command += [f"--backend-config=python,shm-region-prefix-name=teco_kernels_{os.getpid()}", *arguments]
    if (package := find_spec("pytriton")) is None or package.origin is None:
        if (installed := shutil.which("tritonserver")) is None:
            raise FileNotFoundError(2, "No such program, and nvidia-pytriton is not installed", "tritonserver")
        yield [installed, *command], dict(os.environ)
        return
    root = Path(package.origin).parent
    with tempfile.TemporaryDirectory(prefix="teco_kernels-") as backends:
        _link_backend(root / "tritonserver", Path(backends) / "python")
        program = str(root / "tritonserver" / "bin" / "tritonserver")
        yield [program, f"--backend-directory={backends}", *command], _environment(root)


def run_server(repository: str | Path, *, host: str, ports: tuple[int, int, int], arguments: Sequence[str] = ()) -> int:
    """Run the server until it ends, as it does on SIGINT and SIGTERM; returns its exit code.

    `ports` are those of HTTP, gRPC and metrics.
    """
    http_port, grpc_port, metrics_port = ports
    with server_command(
        repository,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        arguments=arguments,
    ) as (command, environment):
        process = subprocess.Popen(command, env=environment)
        # A terminal sends SIGINT to the server too, which then ends in good order.
        before = (
            signal.signal(signal.SIGINT, signal.SIG_IGN),
            signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        )
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGINT, before[0])
            signal.signal(signal.SIGTERM, before[1])


def _link_backend(server: Path, folder: Path) -> None:
    """The package has one stub per version of Python; the server looks for one beside the backend."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / _STUB
    if not stub.exists():
        raise FileNotFoundError(2, f"nvidia-pytriton has no Python backend for Python {version}", str(stub))
    folder.mkdir()
    for file in (*(server / "backends" / "python").iterdir(), stub):
        (folder / file.name).symlink_to(file)


def _environment(root: Path) -> dict[str, str]:
    """So that the backend finds its libraries, and is the interpreter that runs here.

    It looks at no variable of Python's; like every interpreter it takes the ``python3`` that comes first in PATH for
    itself, and the packages of that one's environment.
    """
    libraries = [str(root.parent / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    libraries += filter(None, [os.environ.get("LD_LIBRARY_PATH")])
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries), "PATH": os.pathsep.join(programs)}
