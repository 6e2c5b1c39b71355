"""What `bench/compare_peers.py` is made of: the plan, the rounds, the results, the tables and the picture."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "peers"))  # problems.py, which both sides share
