"""Compiles the native libraries with ninja; everything else about the package is in pyproject.toml.

`libteco_kernels.so`  the CPU's kernels, and the C interface to them (docs/c-api.md); knows neither torch nor Python.
`_C.so`  operators, registered through LibTorch's stable ABI; loaded with torch.ops.load_library.
`_host`  host-side classes of the decoder loop and the communicator, a pybind11 module that knows nothing of torch;
          linked against `_C`, which holds the communicator's code and the kernels that it calls.

With TECO_TRITON_AOT=1 in the environment, the Triton kernels are compiled too, for every target, and become part of the
package (docs/triton.md). That needs the package triton, and torch, where the build runs: `--no-build-isolation`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import native_build

ROOT = Path(__file__).resolve().parent


class NinjaBuild(build_ext):
    """build_ext that hands all compilation to ninja: incremental, parallel, safe to interrupt."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] in ("_C", native_build.KERNELS_NAME):
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        with_triton = os.environ.get("TECO_TRITON_AOT") == "1"
        if with_triton and (self.inplace or self.editable_mode):
            raise SystemExit("teco_kernels: TECO_TRITON_AOT=1: expected a build that is not editable")
        outputs = {ext.name.split(".")[-1]: Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions}
        native_build.build(outputs, verbose=bool(self.verbose))
        for package in (outputs["_C"].parent, ROOT / "python" / "teco_kernels"):  # those of a build before
            (package / "triton_kernels" / "kernels.zip").unlink(missing_ok=True)
        if with_triton:
            self._compile_triton_kernels(outputs["_C"].parent)

    def copy_extensions_to_source(self) -> None:
        """Also the header, which is no extension, for builds in place and editable ones."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "teco_kernels" / "include" / "teco_kernels.h"
        package = Path(self.get_finalized_command("build_py").get_package_dir("teco_kernels"))
        if built.exists():
            (package / "include").mkdir(exist_ok=True)
            shutil.copyfile(built, package / "include" / built.name)

    def _compile_triton_kernels(self, package: Path) -> None:
        """With the package as it was just built: its own launchers say what is to be compiled."""
        command = [sys.executable, str(ROOT / "tools" / "triton_build.py")]
        command += ["--output", str(package / "triton_kernels" / "kernels.zip")]
        path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        if subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode != 0:
            raise SystemExit("teco_kernels: TECO_TRITON_AOT=1: the Triton kernels were not compiled, see above")


setup(
    ext_modules=[Extension(f"teco_kernels.{name}", []) for name in (native_build.KERNELS_NAME, "_C", "_host")],
    cmdclass={"build_ext": NinjaBuild},
)
