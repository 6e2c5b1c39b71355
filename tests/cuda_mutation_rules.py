"""Small mistakes that could be made in a CUDA kernel, as changes of one line of its source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda"

_PARENTHESES = r"\((?:[^()]|\([^()]*\))*\)"

# What is replaced, by what, in code that runs on the GPU; each occurrence is a mutation of its own. First what keeps
# threads, copies and ranks in step.
ORDER = [
    ("drop a barrier", r"__sync(threads|warp)\(\);", ";"),
    ("drop a barrier", r"__syncthreads_or\((\w+)\)", r"(\1)"),
    ("drop a wait", r"ptx::wait_for_copies<\d+>\(\);", ";"),
    ("wait for one copy less", r"ptx::wait_for_copies<0>", "ptx::wait_for_copies<1>"),
    ("drop a commit", r"ptx::commit_copies\(\);", ";"),
    ("other buffer", r"\[\(b \+ 1\) % 2\]", "[b % 2]"),
    ("other buffer", r"\[b % 2\]", "[(b + 1) % 2]"),
    ("one buffer", r"step % 2", "0"),
    ("other stage", r"(first_(?:row|column)), 0(?=[,)])", r"\1, 1"),
    ("other stage", r", b \+ 1(?=[,)])", ", b"),
    ("the step before", r"step_ \+ 1\b", "step_"),
    ("the step before", r"behind <= 0", "behind <= 1"),
    ("drop a step", r"if \(!(?:sum|steps|steps_)\.take\(.*\)\) return.*;", ";"),
    ("plain store", r"ptx::store_release\(&(.*?), (.*)\);", r"\1 = \2;"),
    ("plain load", r"ptx::load_acquire\(&(.*)\);", r"\1;"),
]
RULES = [
    *ORDER,
    ("drop an exit", r"^ +if \(.*\) (?:return|break|continue)\b.*;$", ";"),
    ("one too far", r"(?<=[\w)\]]) < (?=[\w(])", " <= "),
    ("one too few", r"(?<=[\w)\]]) <= (?=[\w(-])", " < "),
    ("one too few", r"(?<=[\w)\]]) >= (?=[\w(-])", " > "),
    ("one too few", r"(for \(.*; )(\w+) < (?![Nk\d])", r"\1\2 + 1 < "),
    ("one too few", r"distance > 0", "distance > 1"),
    ("first lane for all", r"\blane_id\(\)(?= \*| %| /|\])", "0"),
    ("other distance", r"(?<=, )(kPanel|distance)(?=\);)", r"(\1 / 2)"),
    ("lanes left out", r"\bkAllLanes(?=, )", "(kAllLanes >> 1)"),
    ("smaller for larger", r"\blarger\b(?=[<(])", "smaller"),
    ("larger for smaller", r"\bsmaller\b(?=[<(])", "larger"),
    ("maximum for minimum", r"\bfminf\b", "fmaxf"),
    ("minimum for maximum", r"\bfmaxf\b", "fminf"),
    ("other sign", r"(?<=\w) \+ (?=\w+ \* \w)", " - "),
    ("other shift", r"(<<|>>) (\d+)(?![\w.])", r"\1 (\2 - 1)"),
    ("other shift", rf"(<<|>>) ({_PARENTHESES}|[a-z_]\w*\b(?!\())", r"\1 (\2 + 1)"),
    ("other mask", r"(?<= & )(0x[0-9a-f]+u?|\d+u?|kMask)\b(?!\.)", r"(\1 >> 1)"),
    ("other mask", r"(?<=, )255u", "127u"),
]
# The same in code that runs on either side.
EVERYWHERE = [
    ("or for and", r" && ", " || "),
    ("and for or", r" \|\| ", " && "),
    ("down for up", r"ceil_div(?:<int64_t>)?\(((?:[^(),]|\([^()]*\))+), ([^(),]+)\)", r"((\1) / (\2))"),
]


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes
    ----------
    file : str
        Such as "rms_norm.cu".
    line : int
        Counted from 1.
    rule : str
        What kind of mistake it is.
    text : str
        What the line then is.
    name : str
        File, the line as it is, and as it then is; the same wherever in the file the line stands.
    """

    file: str
    line: int
    rule: str
    text: str
    name: str

    def source(self) -> str:
        """The whole file with the mistake in it."""
        lines = (KERNELS / self.file).read_text().splitlines()
        lines[self.line - 1] = self.text
        return "\n".join(lines) + "\n"


def mutations(file: str) -> Iterator[Mutation]:
    """Every mutation of a file, outside of comments and of what the emulation does not run."""
    names: dict[str, int] = {}
    on_host = only_nvcc = False
    for number, text in enumerate((KERNELS / file).read_text().splitlines(), 1):
        if text.startswith("#"):
            only_nvcc = text == "#ifdef __CUDACC__" or (only_nvcc and not text.startswith(("#else", "#endif")))
            continue
        begins = text.startswith(("Status ", "inline ", "int64_t ", "bool ", "dim3 ")) and not text.endswith(";")
        on_host = (on_host and text != "}") or begins
        code = text.split("//")[0].rstrip()
        if only_nvcc or not code or code.startswith(("template", "static_assert")):
            continue
        changes: dict[str, str] = {}
        for rule, pattern, replacement in [*(() if on_host else RULES), *EVERYWHERE]:
            for match in re.finditer(pattern, code):
                changes.setdefault(code[: match.start()] + match.expand(replacement) + code[match.end() :], rule)
        for changed, rule in changes.items():
            name = f"{file}: {code.strip()} -> {changed.strip()}"
            names[name] = names.get(name, 0) + 1
            if names[name] > 1:
                name += f" ({names[name]})"
            yield Mutation(file, number, rule, changed, name)
