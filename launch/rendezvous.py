"""The rank of this worker, and the rendezvous of all workers at a shared store.

The variables are those of torchrun (or of a script that starts workers by hand). A missing worker,
a port in use and a host without an address are reported before torch waits for them.
"""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["Place", "connect", "own_machine", "require_reachable"]

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
START = "start workers with `shardrec launch` or torchrun"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Rank and world size of this process, from the environment that ``torchrun`` sets.

    Attributes:
        rank: rank of the process, in [0, world_size).
        local_rank: rank among the workers of this node, and index of its GPU.
        world_size: number of workers on all nodes.
        host: name or address of the machine that hosts the store.
        port: port of the store.
        node_size: number of workers on this node; None if the launcher does not say.
    """

    rank: int
    local_rank: int
    world_size: int
    host: str = "localhost"
    port: int = 29500
    node_size: int | None = None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Place | None":
        """The ranks in an environment; None without a launcher.

        Raises:
            ValueError: only some of the variables are set, or one has an invalid value.
        """
        missing = [name for name in NAMES if name not in environment]
        if "RANK" in missing and "WORLD_SIZE" in missing:
            return None
        if missing:
            raise ValueError(
                f"the launcher must set {', '.join(NAMES)}, got none for {', '.join(missing)}; "
                f"{START}"
            )
        if not environment["MASTER_ADDR"]:
            raise ValueError(f"MASTER_ADDR must be a host name, got ''; {START}")
        world_size = _whole(environment, "WORLD_SIZE", 1, 2**31)
        return cls(
            rank=_whole(environment, "RANK", 0, world_size - 1),
            local_rank=_whole(environment, "LOCAL_RANK", 0, 2**31),
            world_size=world_size,
            host=environment["MASTER_ADDR"],
            port=_whole(environment, "MASTER_PORT", 1, 65535),
            node_size=(
                _whole(environment, "LOCAL_WORLD_SIZE", 1, world_size)
                if "LOCAL_WORLD_SIZE" in environment
                else None
            ),
        )


def connect(place: Place, timeout_s: float, *, is_host: bool) -> Any:
    """The store that all workers share, after all of them have joined.

    Args:
        place: ranks of this worker.
        timeout_s: seconds to wait for the other workers.
        is_host: whether this worker creates the store, rather than torchrun or another worker.

    Raises:
        TimeoutError: a worker has not joined; the message names it.
        ValueError: the host has no address, the port is in use, or there are several machines, of
            which the name of one leads to itself.
    """
    at, timeout = f"{place.host}:{place.port}", timedelta(seconds=timeout_s)
    _require_address(place.host)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            place.host,
            place.port,
            place.world_size,
            is_master=is_host,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise _unreachable(error, at, timeout_s, is_host=is_host) from error
    keys = [f"here/{rank}" for rank in range(place.world_size)]
    store.set(keys[place.rank], json.dumps(own_machine(os.environ)))
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        ranks = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise TimeoutError(
            f"all {place.world_size} ranks must come to {at} within {timeout_s:g} s, got none of "
            f"rank {', '.join(ranks)}; look for its last lines and start all of them again"
        ) from error
    machines = [json.loads(machine) for machine in store.multi_get(keys)]
    read = [f"read/{rank}" for rank in range(place.world_size)]
    store.set(read[place.rank], "")
    if is_host:  # the store ends with this process, and the others must know why
        store.wait(read, timeout)
    require_reachable(machines)
    return store


def own_machine(environment: Mapping[str, str]) -> tuple[str, str]:
    """The name of this machine, and the address at which gloo will listen; "" if that is named."""
    name = socket.gethostname()
    if "GLOO_SOCKET_IFNAME" in environment:
        return name, ""
    try:
        return name, socket.gethostbyname(name)
    except OSError:
        return name, "no address"


def require_reachable(machines: Sequence[tuple[str, str]]) -> None:
    """Refuse names that lead a machine to itself where there are several; by rank."""
    lost = {
        name: f"{address} for {name} (rank {rank})"
        for rank, (name, address) in reversed(list(enumerate(machines)))
        if address == "no address" or address.startswith("127.")
    }
    if lost and len({name for name, _ in machines}) > 1:
        raise ValueError(
            "the name of each machine must lead to an address that the others reach, got "
            f"{', '.join(reversed(lost.values()))}; correct /etc/hosts there, or name the network "
            "interface: --env GLOO_SOCKET_IFNAME=eth0"
        )


def _whole(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = environment[name]
    if not text.isdecimal() or not least <= int(text) <= most:
        of = f" (WORLD_SIZE={environment['WORLD_SIZE']})" if name == "RANK" else ""
        raise ValueError(
            f"{name} must be a whole number from {least} to {most}{of}, got {text!r}; {START}"
        )
    return int(text)


def _require_address(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"MASTER_ADDR must be a host name with an address, got {host!r} ({error}); give the "
            "name or address of the machine of rank 0"
        ) from None


def _unreachable(error: RuntimeError, at: str, timeout_s: float, *, is_host: bool) -> Exception:
    if "EADDRINUSE" in str(error):
        return ValueError(
            f"MASTER_PORT must be free on the machine of rank 0, got {at}, which another process "
            "uses; choose another port for all ranks"
        )
    if is_host:
        return ValueError(
            f"MASTER_ADDR must be of the machine of rank 0, got {at}, where rank 0 cannot listen "
            f"({str(error).partition(chr(10))[0]}); start rank 0 on that machine"
        )
    return TimeoutError(
        f"rank 0 must answer at {at} within {timeout_s:g} s, got nothing; start it, or check the "
        "address, the port and the firewall between the machines"
    )
