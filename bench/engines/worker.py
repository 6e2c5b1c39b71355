"""What every engine's process does: say what it is, then time one run per line of stdin."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable

_TOKEN_IDS = range(1000, 40000)


def serve(description: str, generate: Callable[[list[list[int]], int], object]) -> None:
    """Answer until stdin ends: `generate(prompts, tokens)` gives each prompt (token ids) so many more.

    Prompts are random and never the same twice, so that no engine finds a prefix that it knows.
    """
    print(json.dumps({"description": description}), flush=True)
    source = random.Random(0)
    for line in sys.stdin:
        batch, prompt, tokens = map(int, line.split())
        prompts = [source.choices(_TOKEN_IDS, k=prompt) for _ in range(batch)]
        start = time.perf_counter()
        generate(prompts, tokens)
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
