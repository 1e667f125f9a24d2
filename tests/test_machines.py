"""The command for several machines, on two network namespaces joined by a cable (veth): each has an address of its own, and
neither sees the other's loopback. The rank on the second one is killed on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import SCRIPT, environment, losses, workers

STEPS, TIMEOUT = 200, 120


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[list[tuple[str, str, str]]]:
    """(namespace, network interface, address) of two."""
    if shutil.which("ip") is None:
        pytest.skip("there is no program ip, which makes network namespaces")
    own = os.getpid()
    found = [(f"frog-{own}-{i}", f"frog{own}{'ab'[i]}", f"10.77.0.{i + 1}") for i in range(2)]
    try:
        for name, _, _ in found:
            ip("netns", "add", name)
        ip("link", "add", found[0][1], "type", "veth", "peer", "name", found[1][1])
        for name, interface, address in found:
            ip("link", "set", interface, "netns", name)
            for words in (f"addr add {address}/24 dev {interface}", f"link set {interface} up", "link set lo up"):
                ip("-n", name, *words.split())
        yield found
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces can be made here: {error.stderr or error}")
    finally:
        subprocess.run(["ip", "link", "del", found[0][1]], capture_output=True, check=False)  # where it was not moved yet
        for name, _, _ in found:  # an interface goes with its namespace
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start(machine: tuple[str, str, str], first: str, folder: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    """torchrun with a rank on one of the machines; its output goes beside the folder."""
    name, interface, address = machine
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={first}:29400", "--rdzv-id=digits", "--monitor-interval=0.05"]
    # Namespaces have one host name between them: what torchrun makes of names must be told
    torchrun += [f"--local-addr={address}", f"--rdzv-conf=is_host={int(address == first)}"]
    torchrun += [str(SCRIPT), "--folder", str(folder), *arguments]
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *torchrun],
        env=environment() | {"GLOO_SOCKET_IFNAME": interface},
        stdout=(folder.parent / f"{address}.txt").open("w"),
        stderr=subprocess.STDOUT,
    )


def test_two_machines_of_which_one_loses_a_rank(tmp_path, machines, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import train_digits

    arguments = ["--steps", str(STEPS), "--width", "24", "--k", "6", "--batch", "32", "--checkpoint-every", "5"]
    arguments += ["--timeout", "10"]
    folder = tmp_path / "shared"
    agents = [start(machine, machines[0][2], folder, arguments) for machine in machines]
    said = lambda: "\n".join(path.read_text() for path in sorted(tmp_path.glob("10.*.txt")))  # noqa: E731
    try:
        deadline = time.monotonic() + TIMEOUT
        while len(losses(folder)) < 10:
            assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents), said()
            time.sleep(0.01)
        there = subprocess.run(["ip", "netns", "pids", machines[1][0]], check=True, capture_output=True, text=True).stdout
        ranks = set(map(int, there.split())) & set(workers(folder))
        assert len(ranks) == 1, said()
        os.kill(ranks.pop(), signal.SIGKILL)
        assert [agent.wait(TIMEOUT) for agent in agents] == [0, 0], said()
    finally:
        for agent in agents:
            agent.terminate()  # and with it its rank
        for agent in agents:
            try:
                agent.wait(20)
            except subprocess.TimeoutExpired:
                agent.kill()
    assert said().count("2 processes, from step") == 2, said()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_digits.main(["--folder", str(tmp_path / "alone"), *arguments])
    finally:
        torch.set_num_threads(threads)
    expected = dict(losses(tmp_path / "alone"))
    found = losses(folder)  # steps after a checkpoint were taken again
    assert {step for step, _ in found} == set(range(STEPS)) == set(expected)
    assert all(loss == expected[step] for step, loss in found)
