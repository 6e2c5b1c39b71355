"""Runs a few lines of PTX between loads of their operands and a store of their result, a value of each per thread."""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from ptx import BankCounter, GlobalMemory, load

_REGISTERS = """
.reg .pred %p<20>;
.reg .b16 %h<40>;
.reg .b32 %r<60>;
.reg .f32 %f<60>;
.reg .b64 %d<40>;
"""


def run(
    body: str,
    *inputs: Any,
    result: Any = np.uint32,
    per_thread: int = 1,
    threads: int | None = None,
    shared: str = "",
    banks: BankCounter | None = None,
) -> np.ndarray:
    """The body's registers %in0, %in1, ... hold element `thread` of the inputs; it leaves %out, or %out0, %out1, ...

    Parameters
    ----------
    body : str
        PTX; besides those named, registers %p0 to %p19 and of other types %h, %r, %f, %d are declared. %input and
        %output hold the addresses of the first input and of the output.
    inputs : array_like
        1-D, all of one length, unless `threads` is given.
    result : dtype
        Of the output, whose element each %out is.
    shared : str
        Declarations of shared memory.

    Returns
    -------
    array [threads], or [threads, per_thread]
    """
    arrays = [np.ascontiguousarray(np.asarray(x)) for x in inputs]
    count = threads or len(arrays[0])
    memory, out = GlobalMemory(), np.zeros((count, per_thread), result)
    pointers = [memory.add_array(out, True, "output")]
    pointers += [memory.add_array(array, False, f"input {i}") for i, array in enumerate(arrays)]
    lines = [f".reg .b64 %address<{len(arrays) + 1}>;", ".reg .b64 %input, %output;", ".reg .b32 %thread;"]
    lines += ["mov.u32 %thread, %tid.x;", "ld.param.u64 %output, [run_param_0];"]
    if arrays:
        lines.append("ld.param.u64 %input, [run_param_1];")
    for i, array in enumerate(arrays):
        bits = max(8 * array.dtype.itemsize, 16)
        kind = f"{array.dtype.kind if array.dtype.itemsize == 1 else 'b'}{8 * array.dtype.itemsize}"
        lines += [
            f".reg .b{bits} %in{i};",
            f"ld.param.u64 %address{i}, [run_param_{i + 1}];",
            f"mad.wide.u32 %address{i}, %thread, {array.dtype.itemsize}, %address{i};",
        ]
        if len(array) == count:
            lines.append(f"ld.global.{kind} %in{i}, [%address{i}];")
    names = ["%out"] if per_thread == 1 else [f"%out{i}" for i in range(per_thread)]
    size = out.dtype.itemsize
    lines += [f".reg .b{max(8 * size, 16)} {', '.join(names)};", shared, body]
    lines += [".reg .b64 %target;", f"mad.wide.u32 %target, %thread, {size * per_thread}, %output;"]
    if re.search(r"%out\d*\b", body):
        lines += [f"st.global.b{8 * size} [%target+{size * i}], {name};" for i, name in enumerate(names)]
    parameters = ", ".join(f".param .u64 run_param_{i}" for i in range(len(pointers)))
    text = "\n".join(
        [
            ".version 8.7",
            ".target sm_80",
            ".address_size 64",
            f".visible .entry run({parameters})",
            "{",
            _REGISTERS,
            *lines,
            "ret;",
            "}",
            "",
        ]
    )
    load(text, "run").launch((1, 1, 1), (count, 1, 1), [struct.pack("Q", p) for p in pointers], memory, banks=banks)
    return out[:, 0] if per_thread == 1 else out
