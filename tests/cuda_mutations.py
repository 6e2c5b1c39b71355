"""Plants small mistakes in the CUDA kernels, one at a time, and tells which of them the emulated case table catches.

    python tests/cuda_mutations.py [--file rms_norm.cu] [--json report.json]

A mistake is a line of a kernel without its barrier, without its early return, with `<=` for `<` in a condition, with
another lane, and the like (RULES). It is caught when a case of the file's operators is wrong or has a finding, in one
of two orders of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from emulated_cuda import ROOT, emulation
from emulated_ranks import collectives_are_right

from teco_kernels.testing import Case, all_cases, run_case

sys.path.insert(0, str(ROOT / "tools"))
import cuda_build

OPERATORS = {
    "device.h": ("rms_norm", "fused_add_rms_norm", "rotary_embedding", "reshape_and_cache", "embedding"),
    "copy_blocks.cu": ("copy_blocks", "swap_blocks"),
    "best_key.h": ("sample", "lm_head_argmax"),
    "dense_matmul.cu": ("dense_matmul", "lm_head_argmax"),
    "dense_matmul_tensor_cores.cu": ("dense_matmul",),
    "draw.h": ("sample", "verify_recycled_sampled"),
    "embedding.cu": ("embedding",),
    "gptq_layout.h": ("gptq_matmul", "embedding"),
    "gptq_matmul.cu": ("gptq_matmul",),
    "gptq_matmul_tensor_cores.cu": ("gptq_matmul",),
    "kv_element.h": ("reshape_and_cache", "paged_attention"),
    "lm_head_argmax.cu": ("lm_head_argmax",),
    "matmul.h": ("dense_matmul", "lm_head_argmax"),
    "merge_attention_states.cu": ("merge_attention_states",),
    "paged_attention.cu": ("paged_attention",),
    "paged_attention.h": ("paged_attention",),
    "panel_matmul.h": ("dense_matmul", "sparse24_matmul"),
    "recycle_project.cu": ("recycle_project",),
    "reshape_and_cache.cu": ("reshape_and_cache",),
    "rms_norm.cu": ("rms_norm", "fused_add_rms_norm"),
    "rms_norm.h": ("rms_norm", "fused_add_rms_norm"),
    "rotary_embedding.cu": ("rotary_embedding",),
    "sample.cu": ("sample",),
    "silu_and_mul.cu": ("silu_and_mul",),
    "sparse24_matmul.cu": ("sparse24_matmul",),
    "tensor_core_matmul.h": ("dense_matmul", "gptq_matmul"),
    "verify_recycled.cu": ("verify_recycled", "verify_recycled_sampled"),
}

# What these do takes several ranks to see.
OF_RANKS = ("steps.h", "rank_sum.h", "all_reduce.cu", "all_reduce_rms_norm.cu", "all_gather.cu")

# What is replaced, by what; each occurrence in the kernels' code is a mutation of its own.
RULES = [
    ("drop a barrier", re.compile(r"__sync(threads|warp)\(\);"), ";"),
    ("drop a return", re.compile(r"^  if \(.*\) return;"), ""),
    ("one too far", re.compile(r"(?<=[\w)\]]) < (?=[\w(])"), " <= "),
    ("one too few", re.compile(r"(?<=[\w)\]]) >= (?=[\w(])"), " > "),
    ("first lane for all", re.compile(r"\blane_id\(\)(?= \*| %| /|\])"), "0"),
    ("wrong distance", re.compile(r"(?<=, )(kPanel|distance)(?=\);)"), r"(\1 / 2)"),
    ("smaller for larger", re.compile(r"\blarger\b(?=[<(])"), "smaller"),
    ("maximum for minimum", re.compile(r"\bfminf\b"), "fmaxf"),
    ("drop a barrier", re.compile(r"__syncthreads_or\((\w+)\)"), r"(\1)"),
    ("plain store", re.compile(r"ptx::store_release\(&(.*?), (.*)\);"), r"\1 = \2;"),
    ("plain load", re.compile(r"ptx::load_acquire\(&(.*)\);"), r"\1;"),
    ("drop a step", re.compile(r"if \(!(sum|steps)\.take\(.*\)\) return;"), ";"),
    ("one buffer", re.compile(r"step % 2"), "0"),
    ("the step before", re.compile(r"step_ \+ 1\b"), "step_"),
    ("the step before", re.compile(r"behind <= 0"), "behind <= 1"),
    ("other sign", re.compile(r"(?<=\w) \+ (?=\w+ \* \w)"), " - "),
]


@dataclass(frozen=True)
class Mutation:
    """One mistake: in which file, on which line, and what the line then is."""

    file: str
    line: int
    rule: str
    text: str

    @property
    def name(self) -> str:
        """Such as "rms_norm.cu:31 drop a barrier"."""
        return f"{self.file}:{self.line} {self.rule}: {self.text.strip()}"


def mutations(file: str) -> Iterator[Mutation]:
    """Every mutation of a file, outside of comments and of what only the host runs."""
    on_host = False
    for number, text in enumerate((ROOT / "csrc" / "cuda" / file).read_text().splitlines(), 1):
        begins = text.startswith(("Status ", "inline ", "int64_t ", "bool ")) and not text.endswith(";")
        on_host = (on_host and text != "}") or begins
        code = text.split("//")[0]
        if on_host or not code.strip() or code.startswith(("template", "#")) or "pragma" in code:
            continue
        for rule, pattern, replacement in RULES:
            for match in pattern.finditer(code):
                changed = code[: match.start()] + match.expand(replacement) + code[match.end() :]
                yield Mutation(file, number, rule, changed)


def is_caught(library: Path, cases: list[Case], of_ranks: bool) -> bool:
    """Whether a case fails with this library, or collectives do; told by a child, which may crash or hang."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        torch.set_num_threads(1)
        for seed in (0, 3):
            if of_ranks and not collectives_are_right(library, seed):
                os._exit(1)
            with emulation(library, seed):
                for case in cases:
                    try:
                        ok = run_case(case).ok
                    except Exception:
                        ok = False
                    if not ok:
                        os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", action="append", choices=[*OPERATORS, *OF_RANKS])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    survivors: list[str] = []
    caught = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = folder / "csrc"
        shutil.copytree(ROOT / "csrc", sources)
        for file in arguments.file or [*OPERATORS, *OF_RANKS]:
            operators = OPERATORS.get(file, ())
            cases = [c for c in all_cases() if c.operator in operators and c.flops < 3e6 and c.bytes_moved < 1e6]
            original = (ROOT / "csrc" / "cuda" / file).read_text()
            for number, mutation in enumerate(mutations(file)):
                lines = original.splitlines()
                lines[mutation.line - 1] = mutation.text
                (sources / "cuda" / file).write_text("\n".join(lines) + "\n")
                try:
                    built = cuda_build.build_emulation(folder / "build", sources)
                except SystemExit:  # it does not compile: no mistake that could be made
                    continue
                library = built.with_name(f"{file}-{number}.so")  # a name of its own: loaded libraries are kept
                built.rename(library)
                if is_caught(library, cases, file in OF_RANKS):
                    caught += 1
                else:
                    survivors.append(mutation.name)
                    print("survived:", mutation.name, flush=True)
                library.unlink()
            (sources / "cuda" / file).write_text(original)
            print(f"{file}: {caught} caught so far, {len(survivors)} survived", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps({"caught": caught, "survivors": survivors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
