"""Compiles the two native modules with ninja; everything else about the package is in pyproject.toml.

`_C.so`   operators, registered through LibTorch's stable ABI; loaded with torch.ops.load_library.
`_host`   host-side classes of the decoder loop and the communicator, a pybind11 module that knows nothing of torch;
          linked against `_C`, which holds the communicator's code and the kernels that it calls.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import native_build


class NinjaBuild(build_ext):
    """build_ext that hands all compilation to ninja: incremental, parallel, safe to interrupt."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == "_C":
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        outputs = {ext.name.split(".")[-1]: Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions}
        native_build.build(outputs, verbose=bool(self.verbose))


setup(
    ext_modules=[Extension("teco_kernels._C", sources=[]), Extension("teco_kernels._host", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
