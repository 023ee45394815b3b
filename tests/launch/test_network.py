"""Two machines with a network between them that is cut: network namespaces on a bridge (root)."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks import Ranks

from shardrec.launch.heartbeat import LostRankError
from shardrec.launch.workers import workers

IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
NEW_UTS, NEW_NET = 0x04000000, 0x40000000  # of linux/sched.h
PORT = 29500  # free in a namespace of its own


def can_make_networks() -> bool:
    return IP is not None and not os.getuid() and not ip("netns", "list", check=False).returncode


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    assert IP is not None
    return subprocess.run([IP, *words], check=check, capture_output=True)


# Runs of several processes: seconds each.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_networks(), reason="needs root and ip (iproute2)"),
]


class Network:
    """Namespaces of two machines, and one with the bridge between them."""

    def __init__(self) -> None:
        name = f"shardrec{os.getpid()}"
        self.bridge, self.machines = f"{name}-bridge", [f"{name}-{index}" for index in range(2)]
        for one in (self.bridge, *self.machines):
            ip("netns", "add", one)
        ip("-n", self.bridge, "link", "add", "between", "type", "bridge")
        ip("-n", self.bridge, "link", "set", "between", "up")
        for index, one in enumerate(self.machines):
            port = ("peer", "name", f"port{index}", "netns", self.bridge)
            ip("link", "add", "eth0", "netns", one, "type", "veth", *port)
            ip("-n", one, "addr", "add", f"10.77.0.{index + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", one, "link", "set", device, "up")
            ip("-n", self.bridge, "link", "set", f"port{index}", "master", "between", "up")

    def cut(self) -> None:
        """From here on packets vanish, and no machine is told."""
        ip("-n", self.bridge, "link", "set", "port1", "nomaster")

    def mend(self) -> None:
        ip("-n", self.bridge, "link", "set", "port1", "master", "between")

    def remove(self) -> None:
        for one in (*self.machines, self.bridge):
            ip("netns", "del", one, check=False)


def enter(namespace: str, name: str) -> None:
    """Makes this process one on a machine of that network and name."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.setns(os.open(f"/run/netns/{namespace}", os.O_RDONLY), NEW_NET) == 0
    assert libc.unshare(NEW_UTS) == 0
    socket.sethostname(name)


def take_part(
    rank: int, namespace: str, timeout_s: float, interface: str | None, told: Connection
) -> None:
    """Adds numbers up until it is told to stop; tells what it found or raised."""
    enter(namespace, f"machine-{rank}.invalid")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(PORT)}
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        with workers(timeout_s):
            told.send("ready")
            total = torch.zeros(2)
            while not total[1]:
                total = torch.tensor([rank + 1.0, float(told.poll())])
                dist.all_reduce(total)
                assert total[0] == 3
                time.sleep(0.01)
        told.send("it has ended")
    except Exception as error:
        told.send(f"{type(error).__name__}: {error}")


@contextmanager
def two_machines(
    timeout_s: float, interface: str | None = "eth0"
) -> Iterator[tuple[Network, list[Connection]]]:
    """The network, and what the workers of the two machines tell."""
    if dist.is_initialized():  # forked processes would inherit it
        dist.destroy_process_group()
    context, network = multiprocessing.get_context("fork"), Network()
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(
            target=take_part,
            args=(rank, network.machines[rank], timeout_s, interface, pipes[rank][1]),
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.start()
        yield network, [ours for ours, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
        network.remove()


def hear(one: Connection, seconds: float) -> Any:
    assert one.poll(seconds), f"silent for {seconds} s"
    return one.recv()


def cut_for_good(timeout_s: float) -> list[str]:
    with two_machines(timeout_s) as (network, told):
        assert [hear(one, 30) for one in told] == ["ready"] * 2
        time.sleep(1)  # a few heartbeats
        network.cut()
        return [hear(one, 8 * timeout_s) for one in told]


def cut_for_a_while(timeout_s: float, seconds: float) -> list[str]:
    with two_machines(timeout_s) as (network, told):
        assert [hear(one, 30) for one in told] == ["ready"] * 2
        for _ in range(2):
            network.cut()
            time.sleep(seconds)
            network.mend()
            time.sleep(seconds)
        told[0].send("stop")
        return [hear(one, 30) for one in told]


def without_an_address() -> list[str]:
    with two_machines(20.0, interface=None) as (_, told):
        return [hear(one, 30) for one in told]


def test_a_cut_ends_the_workers_on_both_sides_with_the_name_of_the_other_machine(
    ranks: Ranks,
) -> None:
    ((one, other),) = ranks(1).run(cut_for_good, 3.0)
    assert one.startswith(LostRankError.__name__) and other.startswith(LostRankError.__name__)
    assert "got rank 1 (process " in one and "on machine-1.invalid) sends no heartbeat" in one
    assert "got rank 0 (process " in other and "on machine-0.invalid) sends no heartbeat" in other
    assert "the store that it hosts does not answer" in other


def test_packets_lost_for_less_than_the_timeout_change_nothing(ranks: Ranks) -> None:
    assert ranks(1).run(cut_for_a_while, 20.0, 1.0) == [["it has ended"] * 2]


def test_names_that_lead_nowhere_are_told_at_the_start(ranks: Ranks) -> None:
    ((one, other),) = ranks(1).run(without_an_address)
    assert one == other and one.startswith("ValueError: the name of each machine must lead to")
    assert "got no address for machine-0.invalid (rank 0), no address for machine-1.invalid" in one
