"""Workers that cannot connect are told why, in one line, before torch has waited in vain."""

import socket
from collections.abc import Iterator

import pytest

from shardrec.launch.rendezvous import Place, connect, own_machine, require_reachable

IFNAME = "GLOO_SOCKET_IFNAME"
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29500",
}


def test_the_place_is_what_the_launcher_says() -> None:
    place = Place(rank=5, local_rank=1, world_size=8, host="first", port=29500)
    assert Place.read(TORCHRUN) == place
    node = Place.read(TORCHRUN | {"LOCAL_WORLD_SIZE": "4"})
    assert node is not None and node.node_size == 4


def test_without_a_launcher_there_is_no_place() -> None:
    assert Place.read({"MASTER_PORT": "29500"}) is None


def test_half_a_launcher_is_refused_before_anything_waits() -> None:
    without = {name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"}
    with pytest.raises(ValueError, match=r"got none for MASTER_ADDR; start workers with"):
        Place.read(without)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "abc", r"RANK must be a whole number from 0 to 7 \(WORLD_SIZE=8\), got 'abc'"),
        ("RANK", "-1", "RANK must be a whole number from 0 to 7 .*, got '-1'"),
        ("RANK", "8", "RANK must be a whole number from 0 to 7 .*, got '8'"),
        ("RANK", "", "RANK must be a whole number from 0 to 7 .*, got ''"),
        ("LOCAL_RANK", "1.5", "LOCAL_RANK must be a whole number .*, got '1.5'"),
        ("WORLD_SIZE", "0", "WORLD_SIZE must be a whole number from 1 to .*, got '0'"),
        ("WORLD_SIZE", "two", "WORLD_SIZE must be a whole number from 1 to .*, got 'two'"),
        ("MASTER_PORT", "70000", "MASTER_PORT must be a whole number from 1 to 65535, got '70000'"),
        ("MASTER_PORT", "abc", "MASTER_PORT must be a whole number from 1 to 65535, got 'abc'"),
        ("MASTER_ADDR", "", "MASTER_ADDR must be a host name, got ''"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Place.read(TORCHRUN | {name: value})


def at(port: int, rank: int = 0, host: str = "localhost") -> Place:
    return Place(rank=rank, local_rank=rank, world_size=3, host=host, port=port)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another process listens at."""
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(("::", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.fixture
def free() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def test_the_ranks_that_do_not_come_are_named(free: int) -> None:
    with pytest.raises(TimeoutError, match=f"ranks must come to localhost:{free} .* of rank 1, 2;"):
        connect(at(free), 0.5, is_host=True)


def test_a_rank_0_that_is_not_there_is_named(free: int) -> None:
    with pytest.raises(TimeoutError, match=f"rank 0 must answer at localhost:{free} within 0.5 s"):
        connect(at(free, rank=1), 0.5, is_host=False)


def test_a_port_in_use_is_named(taken: int) -> None:
    with pytest.raises(ValueError, match=f"MASTER_PORT must be free .* got localhost:{taken}"):
        connect(at(taken), 0.5, is_host=True)


def test_a_host_without_an_address_is_named(free: int) -> None:
    with pytest.raises(
        ValueError, match="MASTER_ADDR must be a host name .* 'no-such-host.invalid'"
    ):
        connect(at(free, host="no-such-host.invalid"), 0.5, is_host=True)


@pytest.mark.parametrize("address", ["127.0.1.1", "no address"])
def test_a_machine_whose_name_leads_to_itself_is_named_where_there_are_others(address: str) -> None:
    machines = [("one", "10.0.0.1"), ("two", address), ("two", address), ("three", "10.0.0.3")]
    with pytest.raises(ValueError, match=rf"got {address} for two \(rank 1\); correct /etc/hosts"):
        require_reachable(machines)
    require_reachable([("two", address)] * 4)  # it finds itself
    require_reachable([("one", "10.0.0.1"), ("two", "")])  # by its interface


@pytest.mark.parametrize(("variables", "address"), [({}, "no address"), ({IFNAME: "eth0"}, "")])
def test_an_interface_that_is_named_needs_no_address(
    variables: dict[str, str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardrec.launch.rendezvous.socket.gethostname", lambda: "no-such.invalid")
    assert own_machine(variables) == ("no-such.invalid", address)
