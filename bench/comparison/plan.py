"""Who is compared, and on what."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from problems import Attention, Matmul, Problem

OWN = "teco_kernels"
#: "memory": copies of the operand take turns and fill the cache several times over. "L3": they take half of it. "once":
#: one copy, where arithmetic decides.
Residence = Literal["memory", "L3", "once"]
_ANY = 1 << 50


@dataclass(frozen=True)
class Peer:
    """A kernel in a process of its own.

    Attributes
    ----------
    name : str
        As the tables show it.
    script, variant : str
        ``peers/<script>_peer.py`` and its argument.
    kind : {"matmul", "attention"}
    home : {"own", "peers", "vllm"}
        The environment that it is installed in.
    openmp : bool
        Whether its threads are OpenMP's, which must be told to stay on a core each: they may else share one.
    half : str
        The dtype that it is asked for where others are asked for bf16.
    """

    name: str
    script: str
    variant: str
    kind: Literal["matmul", "attention"]
    home: Literal["own", "peers", "vllm"] = "peers"
    openmp: bool = False
    half: str = "bfloat16"

    @property
    def own(self) -> bool:
        """Whether it is this package."""
        return self.home == "own"


PEERS = [
    Peer(f"{OWN}, int8 activations", "teco", "int8", "matmul", "own"),
    Peer(f"{OWN}, exact", "teco", "exact", "matmul", "own"),
    Peer("ONNX Runtime MatMulNBits (level 4)", "onnxruntime", "", "matmul"),
    Peer("OpenVINO", "openvino", "", "matmul"),
    Peer("llama.cpp Q4_0", "ggml", "Q4_0", "matmul", openmp=True),
    Peer("llama.cpp Q4_1", "ggml", "Q4_1", "matmul", openmp=True),
    Peer("llama.cpp Q4_K", "ggml", "Q4_K", "matmul", openmp=True),
    Peer("torch int4pack, bf16", "torch_int4", "bfloat16", "matmul", openmp=True),
    Peer("torch linear, fp32 weight", "torch_dense", "float32", "matmul", openmp=True),
    Peer("torch linear, bf16 weight", "torch_dense", "bfloat16", "matmul", openmp=True),
    Peer(f"{OWN}, paged", "teco", "attention", "attention", "own"),
    Peer("vLLM, paged", "vllm", "attention", "attention", "vllm", openmp=True),
    Peer("torch SDPA", "torch_attention", "attention", "attention", openmp=True),
    Peer("llama.cpp flash attention", "ggml", "attention", "attention", openmp=True, half="float16"),
]


@dataclass(frozen=True)
class Task:
    """A problem, where its operand lies, and the numbers of rows (of query tokens) to time."""

    problem: Problem
    residence: Residence
    rows: tuple[int, ...]

    @property
    def name(self) -> str:
        """In a few words, for a progress bar."""
        if isinstance(self.problem, Attention):
            return f"{self.problem.batch} x {self.problem.context} {self.problem.dtype}"
        return f"{self.problem.in_features} x {self.problem.out_features}, {self.residence}"

    def request(self, peer: Peer, l3_bytes: int) -> dict[str, Any]:
        """What the peer's process is asked to prepare."""
        fields = {"kind": self.problem.kind, **asdict(self.problem)}
        if fields.get("dtype") == "bfloat16":
            fields["dtype"] = peer.half
        between = {"memory": (4 * l3_bytes, _ANY), "L3": (l3_bytes // 2, l3_bytes // 2), "once": (0, _ANY)}
        return {"prepare": fields, "between": between[self.residence]}


#: SmolLM2's gate (or up) and down projections.
_SMALL = Matmul(576, 1536, 32), Matmul(1536, 576, 32)
_SQUARE, _WIDE = Matmul(4096, 4096, 128), Matmul(4096, 14336, 128)

FULL = [
    *(Task(shape, "memory", (1, 2, 4, 16)) for shape in (_SQUARE, _WIDE)),
    *(Task(shape, "once", (512,)) for shape in (_SQUARE, _WIDE)),
    Task(_SQUARE, "L3", (1, 2, 4)),
    *(Task(shape, "L3", (1, 2, 4, 16)) for shape in _SMALL),
    *(Task(shape, "once", (512,)) for shape in _SMALL),
    *(
        Task(Attention(batch, context, dtype), "memory", (1,))
        for dtype in ("float32", "bfloat16")
        for context in (2048, 8192)
        for batch in (1, 8, 32)
    ),
    *(Task(Attention(1, 2048, dtype), "once", (2048,)) for dtype in ("float32", "bfloat16")),
]
QUICK = [
    Task(_SQUARE, "memory", (1, 16)),
    Task(_SMALL[0], "L3", (1,)),
    Task(Attention(1, 2048, "float32"), "memory", (1,)),
]
