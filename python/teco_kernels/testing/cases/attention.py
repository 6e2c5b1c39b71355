"""Cases of `paged_attention` and `merge_attention_states`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from teco_kernels.ops import attention
from teco_kernels.ops.cache import ELEMENT_MAX
from teco_kernels.testing.case import TOLERANCE, Case, Inputs


@dataclass(frozen=True)
class Setup:
    """One call: ``spans`` holds (query tokens, keys) per sequence; ``options`` what is passed on."""

    name: str
    spans: Sequence[tuple[int, int]]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    block_size: int = 16
    cache_dtype: torch.dtype | None = None  # the activations'
    layout: str = "NHD"
    options: dict[str, Any] = field(default_factory=dict)
    benchmark: bool = False


DECODE = [(1, 1), (1, 17), (1, 256), (1, 300)]
MIXED = [(1, 513), (40, 40), (0, 7), (5, 90), (1, 64)]

# Each option and head layout once; then shapes worth timing: decode and prefill of an 8B and of a 135M model.
SETUPS = [
    Setup("decode", DECODE),
    Setup("mixed", MIXED),
    Setup("empty", []),
    Setup("mha", MIXED, heads=(3, 3), head_dim=80),
    Setup("mqa", MIXED, heads=(7, 1), head_dim=128),
    Setup("odd", MIXED, heads=(6, 2), head_dim=37, block_size=5),
    Setup("window", MIXED, options={"sliding_window": 33}),
    Setup("bidirectional", MIXED, options={"causal": False}),
    Setup("bidirectional-window", MIXED, options={"causal": False, "sliding_window": 20}),
    Setup("soft-cap", MIXED, options={"soft_cap": 2.0, "scale": 0.3}),
    Setup("alibi", MIXED, options={"alibi_slopes": "random"}),
    Setup("sinks", [*MIXED, (1, 0)], options={"sinks": "random", "return_lse": True}),
    Setup("no-keys", [(1, 20), (2, 0), (1, 0)], options={"return_lse": True}),
    Setup("hnd", MIXED, layout="HND", block_size=32),
    Setup("float32-cache", MIXED, cache_dtype=torch.float32, heads=(9, 3)),
    Setup("bfloat16-cache", MIXED, cache_dtype=torch.bfloat16, heads=(9, 3)),
    Setup("int8-cache", MIXED, cache_dtype=torch.int8),
    Setup("int8-cache-hnd", MIXED, cache_dtype=torch.int8, heads=(2, 2), layout="HND", head_dim=36),
    Setup("int8-cache-one-scale", MIXED, cache_dtype=torch.int8, heads=(9, 3)),
    Setup("fp8-cache", MIXED, cache_dtype=torch.float8_e4m3fn),
    Setup("fp8-cache-one-scale", MIXED, cache_dtype=torch.float8_e4m3fn, heads=(3, 3)),
    Setup("decode-8b", [(1, 2048)] * 4, heads=(32, 8), head_dim=128, benchmark=True),
    Setup("decode-135m", [(1, 500)] * 8, heads=(9, 3), benchmark=True),
    Setup("prefill-135m", [(512, 512)], heads=(9, 3), benchmark=True),
    Setup("prefill-8b", [(700, 700)], heads=(8, 2), head_dim=128, benchmark=True),
]


def _paged(
    setup: Setup, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, caches, block table, lengths and starts; blocks in random order, unused slots NaN where there is one."""
    (num_heads, num_kv_heads), head_dim, block_size = setup.heads, setup.head_dim, setup.block_size
    counts = [-(-length // block_size) for _, length in setup.spans]
    num_blocks = sum(counts) + 1
    order = torch.randperm(num_blocks, generator=generator, dtype=torch.int32)
    table = torch.full((len(counts), max(counts, default=0)), -1, dtype=torch.int32)
    used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for s, ((_, length), count) in enumerate(zip(setup.spans, counts, strict=True)):
        table[s, :count], order = order[:count], order[count:]
        used[table[s, :count].long()] = (torch.arange(count * block_size) < length).view(count, block_size)

    def cache() -> Tensor:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        values = torch.randn(shape, generator=generator).masked_fill_(~used[:, :, None, None], torch.nan)
        if setup.cache_dtype == torch.int8:
            values = (values.nan_to_num() * 40).round().clamp(-127, 127)
        stored = values.to(setup.cache_dtype or dtype)
        return stored.transpose(1, 2).contiguous().transpose(1, 2) if setup.layout == "HND" else stored

    starts = torch.tensor([0, *(tokens for tokens, _ in setup.spans)]).cumsum(0).int()
    query = torch.randn(int(starts[-1]), num_heads, head_dim, generator=generator).to(dtype)
    seq_lens = torch.tensor([length for _, length in setup.spans], dtype=torch.int32)
    return query, cache(), cache(), table, seq_lens, starts


def _inputs(setup: Setup, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    query, key_cache, value_cache, table, seq_lens, starts = _paged(setup, dtype, generator)
    decode = all(tokens == 1 for tokens, _ in setup.spans)
    inputs: Inputs = {
        "query": query,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_table": table,
        "seq_lens": seq_lens,
        "query_start_loc": None if decode else starts,
        **setup.options,
    }
    for name in ("alibi_slopes", "sinks"):
        if setup.options.get(name) == "random":
            inputs[name] = torch.rand(setup.heads[0], generator=generator)
    if key_cache.dtype in ELEMENT_MAX:
        for name in ("key_scale", "value_scale"):
            size = 0.5 if key_cache.dtype == torch.float8_e4m3fn else 0.02
            inputs[name] = size * (1 + torch.rand(key_cache.shape[:3], generator=generator))
            if setup.name.endswith("one-scale"):
                inputs[name] = torch.tensor(size)
    return inputs


def _pairs(setup: Setup) -> int:
    """(query, key) pairs that are attended to, without regard to a window."""
    causal = setup.options.get("causal", True)
    return sum(tokens * keys - (tokens * (tokens - 1) // 2 if causal and keys else 0) for tokens, keys in setup.spans)


def _merge_inputs(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    def state() -> tuple[Tensor, Tensor]:
        out = torch.randn(tokens, 3, 37, generator=generator).to(dtype)
        lse = 4 * torch.randn(tokens, 3, generator=generator)
        empty = torch.rand(tokens, 3, generator=generator) < 0.3
        return out.masked_fill_(empty.unsqueeze(-1), torch.nan), lse.masked_fill_(empty, -torch.inf)

    (out_a, lse_a), (out_b, lse_b) = state(), state()
    return {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}


def cases() -> Iterator[Case]:
    """Every setup, each dtype where it matters."""
    for dtype in TOLERANCE:
        for setup in SETUPS:
            if setup.options and dtype != torch.float32:
                continue  # what acts on scores sees fp32 in every dtype
            num_heads, num_kv_heads = setup.heads
            cache_size = (setup.cache_dtype or dtype).itemsize
            keys = sum(keys for tokens, keys in setup.spans if tokens)
            tokens = sum(tokens for tokens, _ in setup.spans)
            params = {"setup": setup.name, "heads": setup.heads, "head_dim": setup.head_dim}
            # What `supports` is asked with.
            if setup.cache_dtype is not None:
                params["cache_dtype"] = str(setup.cache_dtype).removeprefix("torch.")
            params |= {name: True if value == "random" else value for name, value in setup.options.items()}
            yield Case(
                operator="paged_attention",
                params=params,
                dtype=dtype,
                make_inputs=partial(_inputs, setup, dtype),
                function=attention.paged_attention,
                reference=attention.paged_attention_reference,
                max_error=TOLERANCE[dtype],
                bytes_moved=2
                * setup.head_dim
                * (keys * num_kv_heads * cache_size + tokens * num_heads * dtype.itemsize),
                flops=4 * _pairs(setup) * num_heads * setup.head_dim,
                benchmark=setup.benchmark,
            )
        for tokens in (0, 50):
            yield Case(
                operator="merge_attention_states",
                params={"tokens": tokens},
                dtype=dtype,
                make_inputs=partial(_merge_inputs, tokens, dtype),
                function=attention.merge_attention_states,
                reference=attention.merge_attention_states_reference,
                max_error=TOLERANCE[dtype],
                bytes_moved=3 * tokens * 3 * (37 * dtype.itemsize + 4),
                flops=3 * tokens * 3 * 37,
            )
