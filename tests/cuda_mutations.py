"""Plants small mistakes in the CUDA kernels, one at a time, and tells which of them the tests of the emulation catch.

    python tests/cuda_mutations.py [--file rms_norm.cu] [--results FILE] [--sample 8 --seed 0] [--again survived]

The mistakes are those of cuda_mutation_rules.py. Before those of a file, the file as it is must pass. A mistake is
caught when what the default test run has fails: a case of the file's operators, with the same order of threads, or one
of their tests in TESTS; a wrong result, a finding or a crash. One that makes a case run for ever is counted by itself,
and one that does not compile is none. tests/data/cuda_mutations.json lists those that cannot change a result, and why.

Results are written as they come, and a second run goes on where the first one stopped; those of a file that has
changed since are taken again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import emulated_cuda
import pytest
import torch
from cuda_mutation_rules import KERNELS, ORDER, Mutation, mutations
from emulated_cuda import ROOT, SEEDS, emulation
from emulated_ranks import collectives_are_right
from tqdm import tqdm

from teco_kernels.testing import Case, run_case

sys.path.insert(0, str(ROOT / "tools"))
import cuda_build

#: Mistakes that cannot change a result, by the reason why.
WITHOUT_EFFECT = ROOT / "tests" / "data" / "cuda_mutations.json"
TESTS = ("test_cuda_operators.py", "test_cuda_emulation.py")
CPU_SECONDS = 20  # of a case, of which none takes more than two
CPU_SECONDS_OF_TESTS = 150


#: What tests there are beside the case table, as `pytest -k` has it.
_HEAD_TESTS = "as_on_the_cpu or lowest_id or weights_as_they_are"
_MATMUL_TESTS = "test_cuda_operators and rows_stand_alone or weights_as_they_are or unaligned_tensors"
_TESTS_OF = {
    "rms_norm": "test_cuda_emulation and test_rows_stand_alone or in_place or unaligned_stride and norm",
    "silu_and_mul": "test_cuda_emulation and test_rows_stand_alone or unaligned_stride and silu",
    "rotary_embedding": "unaligned_stride and rotary",
    "embedding": "embedding",
    "dense_matmul": _MATMUL_TESTS,
    "sparse24_matmul": _MATMUL_TESTS,
    "gptq_matmul": "gptq or parts_of_sections or a_weight",
    "copy_blocks": "nothing_to_copy",
    "reshape_and_cache": "unaligned_stride and reshape or 8_bit_cache",
    "paged_attention": "sequences_stand_alone or unseen_keys or fp8_cache or many_rows or unaligned_stride and paged",
    "merge_attention_states": "in_place or unaligned_stride and merge",
    "lm_head_argmax": _HEAD_TESTS,
    "recycle_project": "as_on_the_cpu or without_a_token",
    "sample": "as_on_the_cpu or sample or largest_finite",
    "verify_recycled_sampled": "as_on_the_cpu or verify",
}


class Target(NamedTuple):
    """What is compiled with a mistake in it (the file itself, if nothing), and what it is held against."""

    units: tuple[str, ...]
    operators: tuple[str, ...]
    collectives: bool = False

    @property
    def tests(self) -> str:
        """Of these operators, as `pytest -k` has it; "" when there are none."""
        return " or ".join(sorted({_TESTS_OF[name] for name in self.operators if name in _TESTS_OF}))


def _of(*operators: str) -> Target:
    """A file that has the kernels of these operators."""
    return Target((), operators)


_NORMS = ("rms_norm", "fused_add_rms_norm")
_RANK_UNITS = ("all_reduce.cu", "all_reduce_rms_norm.cu", "all_gather.cu")
_TENSOR_CORES = ("dense_matmul_tensor_cores.cu", "gptq_matmul_tensor_cores.cu")

TARGETS = {
    # Every unit includes it. These have an instance of all that it has.
    "device.h": Target(
        ("rms_norm.cu", "reshape_and_cache.cu", "dense_matmul.cu", "sample.cu"),
        (*_NORMS, "reshape_and_cache", "dense_matmul", "sample"),
    ),
    "best_key.h": Target(("sample.cu", "lm_head_argmax.cu", "dense_matmul.cu"), ("sample", "lm_head_argmax")),
    "draw.h": Target(("sample.cu", "verify_recycled.cu"), ("sample", "verify_recycled_sampled")),
    "gptq_layout.h": Target(("embedding.cu",), ("embedding",)),
    "kv_element.h": Target(("reshape_and_cache.cu", "paged_attention.cu"), ("reshape_and_cache", "paged_attention")),
    "matmul.h": Target(("dense_matmul.cu", _TENSOR_CORES[0]), ("dense_matmul", "lm_head_argmax")),
    "paged_attention.h": Target(("paged_attention.cu",), ("paged_attention",)),
    "panel_matmul.h": Target(
        ("dense_matmul.cu", "sparse24_matmul.cu"), ("dense_matmul", "sparse24_matmul", "lm_head_argmax")
    ),
    "rms_norm.h": Target(("rms_norm.cu",), _NORMS),
    "tensor_core_matmul.h": Target(_TENSOR_CORES, ("dense_matmul", "gptq_matmul", "lm_head_argmax")),
    "copy_blocks.cu": _of("copy_blocks", "swap_blocks"),
    "dense_matmul.cu": _of("dense_matmul", "lm_head_argmax"),
    "dense_matmul_tensor_cores.cu": _of("dense_matmul", "lm_head_argmax"),
    "embedding.cu": _of("embedding"),
    "gptq_matmul.cu": _of("gptq_matmul", "lm_head_argmax"),
    "gptq_matmul_tensor_cores.cu": _of("gptq_matmul", "lm_head_argmax"),
    "lm_head_argmax.cu": _of("lm_head_argmax"),
    "merge_attention_states.cu": _of("merge_attention_states"),
    "paged_attention.cu": _of("paged_attention"),
    "recycle_project.cu": _of("recycle_project"),
    "reshape_and_cache.cu": _of("reshape_and_cache"),
    "rms_norm.cu": _of(*_NORMS),
    "rotary_embedding.cu": _of("rotary_embedding"),
    "sample.cu": _of("sample"),
    "silu_and_mul.cu": _of("silu_and_mul"),
    "sparse24_matmul.cu": _of("sparse24_matmul"),
    "verify_recycled.cu": _of("verify_recycled", "verify_recycled_sampled"),
    "steps.h": Target(_RANK_UNITS, (), True),
    "rank_sum.h": Target(_RANK_UNITS, (), True),
    **{unit: Target((), (), True) for unit in _RANK_UNITS},
}
#: Declarations, what no rule applies to, and the instructions that only nvcc compiles (tests/test_cuda_ptx.py).
NOTHING_TO_PLANT = (
    "attention_state.h",
    "dense_matmul.h",
    "gptq_matmul.h",
    "kernels.h",
    "ptx.h",
    "rank_memory.cu",
    "ranks.h",
)


def cases_of(operators: Iterable[str]) -> list[Case]:
    """The cases that the default test run takes, those with the least to compute first."""
    from test_cuda_emulation import CASES

    return sorted(
        (case for case in CASES if case.operator in operators), key=lambda case: case.flops + case.bytes_moved
    )


def limit_time(cpu_seconds: int) -> None:
    """End this process after so much more time on a CPU; one that is stopped and goes on later is given as much."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)


def what_fails(library: Path, cases: list[Case], collectives: bool, tests: str) -> str | None:
    """The first case or test that fails with this library."""
    for case in cases:
        limit_time(CPU_SECONDS)
        try:
            with emulation(library, SEEDS[crc32(case.name.encode()) % len(SEEDS)]):
                ok = run_case(case).ok
        except Exception:
            ok = False
        if not ok:
            return case.name
    for seed in SEEDS if collectives else ():
        limit_time(6 * CPU_SECONDS)
        if not collectives_are_right(library, seed):
            return f"collectives, seed {seed}"
    if tests:
        limit_time(CPU_SECONDS_OF_TESTS)
        emulated_cuda.library = lambda: library  # type: ignore[assignment]
        failed: list[str] = []

        class Failed:
            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                if report.failed:
                    failed.append(report.nodeid)

        chosen = f"not test_matches_reference and ({tests})"
        options = ["-x", "-q", "-p", "no:cacheprovider", "-k", chosen]
        if pytest.main([*options, *(str(ROOT / "tests" / name) for name in TESTS)], [Failed()]) != 0:
            return failed[0] if failed else "a test that cannot be run"
    return None


class Verdict(NamedTuple):
    """`outcome`: "caught", "hangs", "survived" or "does not compile"; `by`: the case or test that failed."""

    outcome: str
    by: str = ""


def in_child(work: Callable[[], Verdict], folder: Path) -> Verdict:
    """What a child has to say, which may crash or hang; its output is in folder/log."""
    told = folder / "verdict.json"
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)
        told.write_text(json.dumps(work()))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGPROF:
        return Verdict("hangs")
    return Verdict(*json.loads(told.read_text())) if code == 0 else Verdict("caught", f"exit code {code}")


class Workshop:
    """Where mistakes of one file are planted.

    Parameters
    ----------
    folder : Path
        Scratch of its own.
    file : str
        Such as "rms_norm.cu".
    cases_only : bool
        Whether to leave out the tests beside the case table.
    """

    def __init__(self, folder: Path, file: str, cases_only: bool = False) -> None:
        self._folder, self._file, self._target = folder, file, TARGETS[file]
        self._tests = "" if cases_only else self._target.tests
        self._cases = cases_of(self._target.operators)
        (folder / "csrc" / "cuda").mkdir(parents=True)

    def hold(self, source: str) -> Verdict:
        """Against all that the file is held against, stopping at the first that fails."""
        (self._folder / "csrc" / "cuda" / self._file).write_text(source)
        verdict = in_child(self._build_and_run, self._folder)
        by = [case.name for case in self._cases]
        if verdict.by in by:  # what has caught one mistake is likely to catch the next
            self._cases.insert(0, self._cases.pop(by.index(verdict.by)))
        return verdict

    def _build_and_run(self) -> Verdict:
        units = list(self._target.units or (self._file,))
        try:
            library = cuda_build.build_changed_emulation(
                self._folder / "build", emulated_cuda.library().parent, self._folder / "csrc", units
            )
        except SystemExit:
            return Verdict("does not compile")
        failed = what_fails(library, self._cases, self._target.collectives, self._tests)
        return Verdict("survived") if failed is None else Verdict("caught", failed)


def digest(file: str) -> str:
    """Of the source that mistakes are planted in."""
    return sha256((KERNELS / file).read_bytes()).hexdigest()[:16]


class Results:
    """Verdicts by file and name, in a JSON file that is written anew with each of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self._files = {file: entry for file, entry in known.items() if entry["source"] == digest(file)}
        for file, entry in self._files.items():
            names = {mutation.name for mutation in mutations(file)}
            entry["verdicts"] = {name: verdict for name, verdict in entry["verdicts"].items() if name in names}

    def of(self, file: str) -> dict[str, list[str]]:
        """Verdicts of a file, by the names of mutations."""
        verdicts: dict[str, list[str]] = self._files.get(file, {}).get("verdicts", {})
        return verdicts

    def add(self, mutation: Mutation, verdict: Verdict) -> None:
        """Keep a verdict."""
        entry = self._files.setdefault(mutation.file, {"source": digest(mutation.file), "verdicts": {}})
        entry["verdicts"][mutation.name] = list(verdict)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self._files, indent=1) + "\n")
        new.replace(self._path)


def without_effect() -> dict[str, str]:
    """Reasons why mutations cannot change a result, by their names; an entry that names no mutation is an error."""
    reasons = {name: why for why, names in json.loads(WITHOUT_EFFECT.read_text()).items() for name in names}
    stale = reasons.keys() - {mutation.name for file in TARGETS for mutation in mutations(file)}
    if stale:
        raise SystemExit(f"{WITHOUT_EFFECT.name}: expected names of mutations, got {sorted(stale)}")
    return reasons


def table(files: Iterable[str], results: Results, reasons: dict[str, str]) -> str:
    """What became of the mistakes of each file, with the two shares that were caught."""
    columns = ("planted", "caught", "hangs", "cannot change a result", "survived")
    lines = [f"| file | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    total: Counter[str] = Counter()
    for file in files:
        count: Counter[str] = Counter()
        for name, (outcome, _) in results.of(file).items():
            if outcome != "does not compile":
                count["planted"] += 1
                count["cannot change a result" if outcome == "survived" and name in reasons else outcome] += 1
        total += count
        lines.append(f"| `{file}` | {' | '.join(str(count[column]) for column in columns)} |")
    lines.append(f"| all | {' | '.join(str(total[column]) for column in columns)} |")
    planted, equal = total["planted"], total["cannot change a result"]
    for of, number in (("all planted", planted), ("those that can change a result", planted - equal)):
        caught, hangs = (100 * total[outcome] / max(number, 1) for outcome in ("caught", "hangs"))
        lines.append(f"of {of}, {number}: {caught:.1f} % caught, {hangs:.1f} % hang")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", action="append", choices=TARGETS)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "cuda_mutations.json")
    parser.add_argument("--sample", type=int, help="plant all that break an order, and so many others per file")
    parser.add_argument("--seed", type=int, default=0, help="of that choice")
    parser.add_argument("--cases-only", action="store_true", help="a first look, for --again survived to go on from")
    parser.add_argument("--again", action="append", default=[], help="take anew what had this outcome: survived, hangs")
    parser.add_argument("--only-table", action="store_true", help="plant nothing, print what is known")
    arguments = parser.parse_args()
    files = arguments.file or list(TARGETS)
    reasons, results = without_effect(), Results(arguments.results)
    if not arguments.only_table:
        plant(files, results, arguments)
    print(table(files, results, reasons))
    wrong = []
    for file in files:
        for name, (outcome, by) in results.of(file).items():
            if outcome == "survived" and name not in reasons:
                print("survived:", name)
            if outcome not in ("survived", "does not compile") and name in reasons:
                wrong.append(f"{name}: {outcome} {by}")
    if wrong:
        raise SystemExit(f"{WITHOUT_EFFECT.name}: expected mutations that no test catches, got {wrong}")


def some_of(chosen: list[Mutation], number: int, seed: str) -> list[Mutation]:
    """All that break an order, and so many others at random; a larger number gives more beside the same."""
    order = {rule for rule, *_ in ORDER}
    others = [mutation for mutation in chosen if mutation.rule not in order]
    random.Random(seed).shuffle(others)
    return [*(mutation for mutation in chosen if mutation.rule in order), *others[:number]]


def plant(files: list[str], results: Results, arguments: argparse.Namespace) -> None:
    """Plant what has no verdict yet, file by file, the kernels as they are before each."""
    emulated_cuda.library()
    todo: dict[str, list[Mutation]] = {}
    for file in files:
        every, known = list(mutations(file)), results.of(file)
        chosen = every if arguments.sample is None else some_of(every, arguments.sample, f"{arguments.seed} {file}")
        todo[file] = [m for m in chosen if m.name not in known]
        todo[file] += [m for m in every if m.name in known and known[m.name][0] in arguments.again]
    with tqdm(total=sum(map(len, todo.values())), unit="mistake") as bar:
        for file in (file for file in files if todo[file]):
            with tempfile.TemporaryDirectory() as temporary:
                workshop = Workshop(Path(temporary), file, arguments.cases_only)
                control = workshop.hold((KERNELS / file).read_text())
                if control.outcome != "survived":
                    raise SystemExit(f"{file} as it is: expected to pass, got {control}")
                for mutation in todo[file]:
                    bar.set_postfix_str(file)
                    results.add(mutation, workshop.hold(mutation.source()))
                    bar.update()


if __name__ == "__main__":
    main()
