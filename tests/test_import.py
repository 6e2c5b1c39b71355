"""Importing the operators is quick and brings nothing that only the decoder, the command or the bench need."""

from __future__ import annotations

import json
import subprocess
import sys

_PROGRAM = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import teco_kernels
seconds = time.process_time() - start
assert not torch.cuda.is_initialized()
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""

NOT_NEEDED = (
    "tokenizers",
    "safetensors",
    "gguf",
    "jinja2",
    "matplotlib",
    "typer",
    "rich",
    "tqdm",
    "triton",
    "transformers",
)


def test_import_is_light() -> None:
    run = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(run.stdout)
    assert not [name for name in modules if name.split(".")[0] in NOT_NEEDED]
    assert seconds < 0.3
