"""Triton kernels of the operators, for GPUs of NVIDIA and AMD: one source, one file per operator.

They are used through the operators of `teco_kernels`, see `teco_kernels.ops.triton_backend.use_triton`. Importing this
package imports no Triton; `launchers` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

#: Kernels that were compiled when the package was built, and their index.
EMBEDDED = Path(__file__).resolve().parent / "kernels.zip"

#: Where the launcher of an operator is. Its arguments are those of the operator's schema, already checked.
_MODULES = {
    "embedding": "embedding",
    "embedding.gptq": "embedding",
    "rms_norm": "rms_norm",
    "fused_add_rms_norm": "rms_norm",
    "silu_and_mul": "silu_and_mul",
    "rotary_embedding": "rotary_embedding",
    "sample": "sample",
    "dense_matmul": "dense_matmul",
    "gptq_matmul": "gptq_matmul",
    "reshape_and_cache": "reshape_and_cache",
    "copy_blocks": "copy_blocks",
    "swap_blocks": "copy_blocks",
    "paged_attention": "paged_attention",
    "merge_attention_states": "merge_attention_states",
    "recycle_project": "recycle_project",
    "recycle_project.gptq": "recycle_project",
    "lm_head_argmax": "lm_head_argmax",
    "lm_head_argmax.gptq": "lm_head_argmax",
    "verify_recycled": "verify_recycled",
    "verify_recycled_sampled": "verify_recycled",
}

#: Operators that have a Triton kernel.
OPERATORS = frozenset(name.partition(".")[0] for name in _MODULES)


def is_embedded() -> bool:
    """Whether this build has kernels that were compiled ahead of time."""
    return EMBEDDED.exists()


def not_embedded(operator: str, dtype: torch.dtype, case: Mapping[str, Any], device: int) -> str:
    """Why kernels that were compiled ahead of time are not enough for a case on a GPU; else nothing."""
    from teco_kernels.triton_kernels.embedded import missing

    return missing(EMBEDDED, operator, dtype, case, device)


def launchers() -> dict[str, Callable[..., None]]:
    """By the name of an operator in the dispatcher: the function that launches its kernels."""

    def launcher(name: str, module: str) -> Callable[..., None]:
        operator, _, overload = name.partition(".")
        function = f"{overload}_{operator}" if overload else operator
        found: Callable[..., None] = getattr(import_module(f"{__name__}.{module}"), function)
        return found

    return {name: launcher(name, module) for name, module in _MODULES.items()}


def prepare(interpreted: bool) -> None:
    """Choose how kernels run: those of the build as they are, all others compiled by Triton; or all interpreted.

    Raises
    ------
    ImportError
        When Triton is not installed, and for a GPU, nothing was compiled ahead of time either.
    RuntimeError
        When Triton was imported for the other of both, or the embedded kernels are of other sources than this package.
    """
    from teco_kernels.triton_kernels import _language, _launch, embedded

    _language.require(interpreted)
    if interpreted or not is_embedded():
        _launch.launch_with(None)
    else:
        _launch.launch_with(embedded.runner(EMBEDDED, _launch.compile_and_run if _language.HAS_TRITON else None))
