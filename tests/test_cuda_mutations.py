"""The tool that plants mistakes in the CUDA kernels: it knows all files, its rules and its list are not stale."""

from __future__ import annotations

import re
from pathlib import Path

import cuda_mutations
import pytest
from cuda_mutation_rules import EVERYWHERE, KERNELS, RULES, mutations
from cuda_mutations import NOTHING_TO_PLANT, TARGETS, Results, Verdict, Workshop, table, without_effect
from test_cuda_emulation import OPERATORS


def test_all_kernels_are_known() -> None:
    files = {path.name for path in KERNELS.iterdir() if path.suffix in (".cu", ".h")}
    assert files == {*TARGETS, *NOTHING_TO_PLANT}
    for target in TARGETS.values():
        assert {*target.units} <= files
        assert {*target.operators} <= {*OPERATORS}


def test_every_rule_is_of_use() -> None:
    sources = [(KERNELS / file).read_text().splitlines() for file in TARGETS]
    for rule, pattern, _ in (*RULES, *EVERYWHERE):
        assert any(re.search(pattern, line) for lines in sources for line in lines), f"{rule}: {pattern}"


def test_names_are_unique() -> None:
    names = [mutation.name for file in TARGETS for mutation in mutations(file)]
    assert len({*names}) == len(names)
    assert without_effect().keys() <= {*names}


def test_a_stale_entry_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "list.json"
    stale.write_text('{"it was so once": ["rms_norm.cu: a -> b"]}')
    monkeypatch.setattr(cuda_mutations, "WITHOUT_EFFECT", stale)
    with pytest.raises(SystemExit, match=r"rms_norm\.cu: a -> b"):
        without_effect()


def test_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_mutations, "CPU_SECONDS", 1)
    workshop, source = Workshop(tmp_path, "copy_blocks.cu"), (KERNELS / "copy_blocks.cu").read_text()
    assert workshop.hold(source).outcome == "survived"
    for line, changed, outcome in (
        ("pair < p.num_pairs", "pair <= p.num_pairs", "caught"),
        ("++pair", "pair += 0", "hangs"),
        ("++pair", "++pairs", "does not compile"),
    ):
        assert line in source
        assert workshop.hold(source.replace(line, changed)).outcome == outcome


def test_results_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first, second, third = list(mutations("copy_blocks.cu"))[:3]
    Results(path).add(first, Verdict("caught", "a case"))
    Results(path).add(second, Verdict("survived"))
    results = Results(path)
    results.add(third, Verdict("does not compile"))
    assert [*results.of("copy_blocks.cu").values()] == [
        ["caught", "a case"],
        ["survived", ""],
        ["does not compile", ""],
    ]
    text = table(["copy_blocks.cu"], results, {second.name: "a reason"})
    assert "| `copy_blocks.cu` | 2 | 1 | 0 | 1 | 0 |" in text
    assert "of all planted, 2: 50.0 % caught" in text
    assert "of those that can change a result, 1: 100.0 % caught" in text
