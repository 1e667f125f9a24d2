"""Result memory that is used again (csrc/cpu/pool.h)."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading

import torch

from frog_cuda import ops

LARGE = 1 << 15  # elements: results of this size come from the pool


def result(n: int, step: int) -> torch.Tensor:
    return ops.sample_tangents(torch.tensor([1, step]), 1, n)


def test_memory_comes_back_and_is_aligned():
    code = f"""
a = result({LARGE})
address = a.data_ptr()
del a
b = result({LARGE})
c = result({LARGE})  # while b is alive
print(address % 64 == 0, b.data_ptr() == address, c.data_ptr() == address)
"""
    assert run(code) == ["True", "True", "False"]


def run(code: str) -> list[str]:
    """Words that the code prints in a fresh process, where nothing else waits."""
    start = """
import torch
from frog_cuda import ops
def result(n): return ops.sample_tangents(torch.tensor([1, 2]), 1, n)
"""
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=True).stdout.split()


def test_small_results_share_the_place_of_a_large_one():
    code = f"""
whole = result(3 * {LARGE})
start = whole.data_ptr()
del whole
parts = [result({LARGE}) for _ in range(3)]
print(*(part.data_ptr() - start for part in parts))
del parts[1], parts[1], parts[0]  # neighbours on both sides, in another order than they were taken
print(result(3 * {LARGE}).data_ptr() - start)
"""
    assert run(code) == [str(4 * LARGE * i) for i in range(3)] + ["0"]


def test_what_waits_makes_room_for_what_is_larger():
    """Each result is freed before the next, twice as large, is made: memory is that of the last, not of all."""
    code = """
from pathlib import Path
def most():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
result(1 << 15)
before = most()
for doubled in range(19, 25):
    result(1 << doubled)  # 2 to 64 MiB
print(most() - before)
"""
    grown = int(run(code)[0]) / 1024
    assert 60 < grown < 64 + 64 / 32 + 0.5 + 8


def test_free_neighbours_serve_a_larger_result():
    """They were three results of their own, and what lies behind them is in use."""
    code = f"""
parts = [result({LARGE}) for _ in range(3)]
start = parts[0].data_ptr()
behind = result({LARGE})
del parts[0], parts[1], parts[0]
print(result(3 * {LARGE}).data_ptr() - start, behind.data_ptr() - start)
"""
    assert run(code) == ["0", str(4 * LARGE * 3)]


def test_memory_goes_back_around_what_is_alive():
    """A small result in the place of a large one holds its own pages, not the others: 64 MiB are not resident beside 96."""
    code = """
from pathlib import Path
def resident(field):
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if field in line).split()[1])
before = resident("VmRSS")
whole = result(1 << 24)
del whole
alive = result(1 << 15)
expected = alive.clone()
larger = result(3 << 23)
print(resident("VmHWM") - before, torch.equal(alive, expected))
"""
    grown, unharmed = run(code)
    assert 96 < int(grown) / 1024 < 96 + 96 / 32 + 0.5 + 4 and unharmed == "True"


def test_where_addresses_are_few():
    """The C library has what there is, and what is freed is there again; what does not fit says how large it is."""
    code = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
for j in range(12):  # 12 times 160 to 188 MiB
    a = result((40 << 20) + (j % 4 << 20))
    small = [result(1 << 15) for _ in range(3)]
    assert torch.equal(a[:, : 1 << 15], small[0]) and torch.equal(small[1], small[2])
    del a
try:
    result(200 << 20)
except RuntimeError as error:
    print("cannot allocate 838860800 bytes" in str(error))
print(torch.equal(result(1 << 15), small[0]))
"""
    assert run(code) == ["True", "True"]


def test_a_limit_leaves_most_addresses_to_others_and_results_are_kept():
    """Of 8 GiB and what is in use, the range takes a quarter: a result finds its 16384 pages there, and torch gets 4 GiB."""
    code = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 30),) * 2)
result(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
result(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, torch.empty(1 << 30).numel() == 1 << 30)
"""
    faults, others = run(code)
    assert int(faults) < 1000 and others == "True"


def test_what_is_alive_is_never_overwritten():
    rng = random.Random(0)
    alive: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(300):
        kept = result(LARGE + rng.randrange(4000) * (1 if step % 3 else 100), step)
        alive.append((kept, kept.clone()))
        if len(alive) > 8:
            alive.pop(rng.randrange(len(alive)))
        if step % 50 == 0:
            gc.collect()
    assert all(torch.equal(a, copy) for a, copy in alive)


def test_parts_keep_the_whole_alive():
    x, dx, w = torch.randn(64, 256), torch.randn(3, 64, 256), torch.randn(256, 256)
    y, dy, _ = ops.linear_jvp(x, dx, w, k=3)
    expected = dy.clone()
    del y
    for _ in range(20):
        ops.linear_jvp(x, 2 * dx, w, k=3)
    assert torch.equal(dy, expected)


def test_several_threads():
    wrong = []

    def work(seed: int) -> None:
        for step in range(50):
            a = result(LARGE + 64 * (step % 5), 100 * seed + step)
            copy = a.clone()
            b = result(LARGE, 10_000 + 100 * seed + step)
            if not torch.equal(a, copy) or torch.equal(a[:LARGE], b):
                wrong.append((seed, step))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_what_waits_is_bounded():
    """Results of ever new sizes, 6 GB in all, leave little more behind than may wait."""
    code = """
import resource, sys, torch
from frog_cuda import ops
torch.set_num_threads(1)
state = torch.tensor([1, 2, 3])
for j in range(int(sys.argv[1])):
    ops.sample_tangents(state, 1, 10_000_000 + 3_000_000 * (j % 7) + 1000 * j, distribution="standard_basis")
print(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize())
"""

    def resident(rounds: int) -> int:
        call = [sys.executable, "-c", code, str(rounds)]
        return int(subprocess.run(call, capture_output=True, text=True, check=True).stdout)

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    waiting = min(max(memory // 16, 128 << 20), 512 << 20)
    assert resident(80) - resident(1) < waiting + 200e6
