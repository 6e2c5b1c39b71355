"""Writes teco_kernels.h, the C view of csrc/params.h and of the kernel table: one place for the structs of both."""

from __future__ import annotations

import re
from pathlib import Path

from native_build import CSRC

#: Raised whenever a struct or a function of the header changes (tests/test_c_api.py notices).
ABI_VERSION = 1

TEMPLATE = CSRC / "capi" / "teco_kernels.h.in"


def _structs(params: str) -> str:
    """What stands in params.h, with C's spelling."""
    body = params.split("namespace teco {\n", 1)[1].rsplit("}  // namespace teco", 1)[0].strip()
    names = re.findall(r"^struct (\w+) \{", body, re.MULTILINE)
    body = re.sub(r"enum class (\w+) : int32_t \{(.*?)\};", _enum, body, flags=re.DOTALL)
    body = re.sub(r"constexpr \w+ k(\w+) = (.*?);", lambda m: f"#define TECO_{_upper(m[1])} ({m[2]})", body)
    body = re.sub(r"\bk(?=[A-Z]\w+)(\w+)", lambda m: f"TECO_{_upper(m[1])}", body)
    body = re.sub(rf"\b({'|'.join([*names, 'DType'])})\b", r"Teco\1", body)
    return re.sub(r"^struct (\w+) \{(.*?)^\};", r"typedef struct \1 {\2} \1;", body, flags=re.MULTILINE | re.DOTALL)


def _enum(match: re.Match[str]) -> str:
    values = (value.strip().removeprefix("k") for value in match[2].split(","))
    listed = "".join(f"  TECO_{value.upper()} = {i},\n" for i, value in enumerate(values))
    return f"typedef int32_t {match[1]};\nenum {{\n{listed}}};"


def _upper(name: str) -> str:
    """InvalidRow: INVALID_ROW."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()


def _functions(table: str) -> str:
    """The operators of the kernel table; the probes behind them are none."""
    operators = table.split("struct KernelTable {", 1)[1].split("// Probes", 1)[0]
    functions = re.findall(r"void \(\*(\w+)\)\(const (\w+)&(, int num_threads)?\);", operators)
    if len(functions) != operators.count("(*"):
        raise SystemExit(
            "c_header: kernels.h: expected operators such as `void (*name)(const Params&, int num_threads);`"
        )
    return "\n".join(
        f"TecoStatus teco_{name}(const Teco{params}* params{', int32_t num_threads' if threads else ''});"
        for name, params, threads in functions
    )


def c_header() -> str:
    """The text of teco_kernels.h."""
    parts = {
        "@VERSION@": str(ABI_VERSION),
        "@STRUCTS@": _structs((CSRC / "params.h").read_text()),
        "@FUNCTIONS@": _functions((CSRC / "cpu" / "kernels.h").read_text()),
    }
    header = TEMPLATE.read_text()
    for mark, text in parts.items():
        header = header.replace(mark, text)
    return header


def write_header(path: Path) -> None:
    """Write it, unless it stands there already."""
    header = c_header()
    if not path.exists() or path.read_text() != header:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header)
