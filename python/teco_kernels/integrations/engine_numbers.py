"""What the numbers of `AsyncEngine.metrics` are, in words, for the servers that tell them."""

from __future__ import annotations

#: Those that only grow.
COUNTERS = {
    "steps": "Steps of the engine",
    "prompt_tokens": "Tokens of prompts",
    "generated_tokens": "Tokens of answers",
    "guessed_tokens": "Tokens that were guessed ahead (recycled decoding)",
    "accepted_tokens": "Guesses that the model agreed with",
    "preemptions": "Requests that gave up their blocks to others",
    "prefix_cache_queried_tokens": "Tokens of prompts that were looked up in the prefix cache",
    "prefix_cache_hit_tokens": "Tokens of prompts that the prefix cache had",
    "requests_refused": "Requests that found the queue full",
}
#: As it is at the moment.
GAUGES = {
    "requests_running": "Sequences in the batch",
    "requests_waiting": "Sequences that wait for room",
    "requests_open": "Requests that have not ended",
    "kv_blocks": "Blocks of the KV cache",
    "kv_blocks_used": "Blocks that requests hold",
    "kv_blocks_cached": "Blocks that only the prefix cache holds",
    "kv_cache_bytes": "Size of the KV cache",
    "weight_bytes": "Size of the weights",
}
