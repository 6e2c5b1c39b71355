"""The process of a rank that `LLM` has started: told on standard input what to load, and by messages what to run."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch

from teco_kernels._host import CommunicatorError
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.rank import RankOptions, serve
from teco_kernels.decoder.ranks import Ranks


def main() -> None:
    """Serve until rank 0 has no more to do, or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: rank 0 decides what becomes of it
    settings = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    torch.set_num_threads(settings["num_threads"])
    try:
        ranks = Ranks.join(settings["segments"], settings["pids"], settings["rank"], settings["timeout"])
        source = load_source(Path(settings["path"]))
        serve(source, RankOptions.from_dict(settings["options"]), ranks.comm, ranks.messages, ranks.meet)
    except CommunicatorError:
        # Rank 0 has closed, or tells its caller what happened.
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: the others are told that this rank has ended


def _end_with_rank_0() -> None:
    """While a model is loaded nobody looks whether rank 0 still lives; but its end of the pipe closes with it."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)
