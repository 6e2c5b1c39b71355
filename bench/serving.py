"""Puts `teco-kernels serve` under the load of guidellm, over loopback, and tells what came of it: `make bench-serving`.

Each row is a run of its own: so many clients ask one after another, with texts of random words, and read streams of
`--tokens` tokens. The last one has more clients than the server lets in, which is to turn away those, and no others.

    python bench/serving.py --guidellm .venv-guidellm/bin/guidellm
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from teco_kernels.quantization import default_quantized_model

SERVER = "from teco_kernels.cli import main; main()"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_REQUESTS = 32
ROWS = [(COMPLETIONS, 1, 8), (COMPLETIONS, 8, 48), (CHAT, 8, 48), (COMPLETIONS, 32, 128), (COMPLETIONS, 48, 192)]
"""Path, clients, requests."""


def get(url: str) -> str:
    """A page of the server."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def wait_until_healthy(server: subprocess.Popen[bytes], url: str) -> None:
    """SystemExit when the server ends before."""
    while True:
        try:
            get(f"{url}/health")
            return
        except (OSError, urllib.error.URLError):
            if server.poll() is not None:
                raise SystemExit("the server has ended") from None
            time.sleep(0.2)


def run(options: argparse.Namespace, model: Path, url: str, row: tuple[str, int, int]) -> dict[str, Any]:
    """guidellm's report of one run."""
    path, clients, requests = row
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        settings = {
            "backend": f"kind=openai_http,target={url},model=load,request_format={path}",
            "tokenizer": f"kind=huggingface_auto,model={model}",
            "data": f"kind=synthetic_text,prompt_tokens={options.prompt},output_tokens={options.tokens}",
            "profile": f"kind=concurrent,streams={clients}",
            "constraint": f"kind=max_requests,count={requests}",
            "output": f"kind=json,path={report}",
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        command = [options.guidellm, "run", *arguments, "--disable-console"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"guidellm: {done.stderr[-2000:]}")
        return json.loads(report.read_text())["benchmarks"][0]


def cells(row: tuple[str, int, int], report: dict[str, Any]) -> list[str]:
    """Of the table. Tokens per second are of the whole run, times of the requests that were answered."""
    metrics = report["metrics"]
    totals = metrics["request_totals"]
    tokens = metrics["output_token_count"]["successful"]["total_sum"]
    first, between = (
        metrics[name]["successful"]["percentiles"] for name in ("time_to_first_token_ms", "inter_token_latency_ms")
    )
    return [
        row[0],
        str(row[1]),
        str(totals["successful"]),
        str(totals["errored"]),
        f"{tokens / report['duration']:.0f}",
        f"{first['p50']:.0f}, {first['p95']:.0f}",
        f"{between['p50']:.1f}, {between['p95']:.1f}",
    ]


def check(url: str) -> None:
    """SystemExit unless the server is well, and holds nothing."""
    get(f"{url}/health")
    numbers = dict(line.rsplit(" ", 1) for line in get(f"{url}/metrics").splitlines() if not line.startswith("#"))
    for name in ("teco_kernels_requests_open", "teco_kernels_kv_blocks_used"):
        if float(numbers[name]):
            raise SystemExit(f"{name}: expected 0 after the load, got {numbers[name]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", type=Path, required=True, help="the program")
    parser.add_argument("--model", type=Path, help="that of `make demo` if not given")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    options = parser.parse_args()
    model = options.model or default_quantized_model()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    arguments = ["--port", str(port), "--served-model-name", "load", "--max-concurrent-requests", str(MAX_REQUESTS)]
    server = subprocess.Popen([sys.executable, "-c", SERVER, "serve", model, *arguments], stdout=subprocess.DEVNULL)
    try:
        wait_until_healthy(server, url)
        table = Table(
            "path", "clients", "answered", "refused", "tokens/s", "first token: p50, p95 ms", "next: p50, p95 ms"
        )
        for row in ROWS:
            report = run(options, model, url, row)
            table.add_row(*cells(row, report))
            check(url)
            if row[1] <= MAX_REQUESTS and report["metrics"]["request_totals"]["errored"]:
                raise SystemExit(f"{row}: expected no errors, got {report['metrics']['request_totals']}")
        Console(width=120).print(table)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
