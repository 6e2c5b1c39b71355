"""What every engine's process does: say what it is, then time one run per line of stdin."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

PROMPT = "The capital of France is Paris, and the capital of Germany is"


def serve(description: str, generate: Callable[[int, int], bool]) -> None:
    """Answer until stdin ends; `generate(batch, tokens)` returns whether the engine can."""
    print(json.dumps({"description": description}), flush=True)
    for line in sys.stdin:
        batch, tokens = map(int, line.split())
        start = time.perf_counter()
        possible = generate(batch, tokens)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds if possible else None}), flush=True)
