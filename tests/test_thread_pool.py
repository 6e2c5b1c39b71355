"""The thread pool: several callers at once, forked children, and what happens when memory or threads run out."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

import teco_kernels as tk


def run(program: str) -> str:
    """Standard output of a program, in a process of its own: it may change limits, or crash."""
    prelude = "import os, resource, torch, teco_kernels as tk\n"
    done = subprocess.run([sys.executable, "-c", prelude + program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_callers_in_several_threads_do_not_disturb_each_other() -> None:
    inputs = [torch.randn(40 + i, 4096) for i in range(8)]
    expected = [tk.silu_and_mul(x) for x in inputs]

    def repeat(i: int) -> bool:
        return all(torch.equal(tk.silu_and_mul(inputs[i]), expected[i]) for _ in range(50))

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(repeat, range(8)))


def test_a_forked_child_has_workers_of_its_own() -> None:
    # The child compares with numpy: torch's own threads, unlike ours, do not survive a fork.
    out = run("""
x = torch.randn(200, 4096)
expected = tk.silu_and_mul(x).numpy().tobytes()
child = os.fork()
if child == 0:
    os._exit(0 if tk.silu_and_mul(x).numpy().tobytes() == expected else 1)
print(os.waitpid(child, 0)[1])
""")
    assert out.split() == ["0"]


def test_lack_of_scratch_memory_is_an_error_and_nothing_more() -> None:
    out = run("""
torch.set_num_threads(2)
small, large = torch.randn(4, 1000), torch.zeros(4, 1 << 22, dtype=torch.float16)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (48 << 20), resource.RLIM_INFINITY))
for _ in range(3):
    try:
        tk.sample(large, top_k=2, seed=0, offset=0)
    except MemoryError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
few = tk.sample(small, top_k=2, seed=0, offset=0)
torch.set_num_threads(1)
assert torch.equal(few, tk.sample(small, top_k=2, seed=0, offset=0))
""")
    assert out.splitlines() == ["sample: no 67108864 bytes of scratch memory"] * 3


def test_lack_of_threads_costs_time_and_nothing_more() -> None:
    out = run("""
x = torch.randn(2000, 1024)
torch.set_num_threads(1)
expected = tk.silu_and_mul(x)
pages = int(open("/proc/self/statm").read().split()[0])
torch.set_num_threads(200)
before = len(os.listdir("/proc/self/task"))
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), resource.RLIM_INFINITY))
actual = tk.silu_and_mul(x)
started = len(os.listdir("/proc/self/task")) - before
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(torch.equal(actual, expected), started < 100)
""")
    assert out.split() == ["True", "True"]


def test_workers_take_denormals_as_their_caller_does() -> None:
    """Which torch decides for the calling thread alone."""
    out = run("""
torch.set_num_threads(2)
x = torch.ones(2000, 1024)
x[:, :512] = 1e-39
for flush in (False, True, False):
    torch.set_flush_denormal(flush)
    print({int(bits == 0) for _ in range(50) for bits in tk.silu_and_mul(x).view(torch.int32).unique().tolist()})
""")
    assert out.split() == ["{0}", "{1}", "{0}"]
