import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks import Ranks

from shardrec.launch.rendezvous import Place
from shardrec.launch.workers import check_restarts, choose_device, workers


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"at most its 1 GPU\(s\), got worker 1"):
        choose_device(Place(rank=1, local_rank=1, world_size=2))


def fake_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Lets torch say that there are GPUs; the numbers of those that are made the current one."""
    chosen = list[int]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_each_worker_of_a_node_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = fake_gpus(monkeypatch, 8)
    place = Place(rank=13, local_rank=5, world_size=16)
    assert choose_device(place) == torch.device("cuda", 5)
    assert choose_device(None) == torch.device("cuda", 0)
    assert chosen == [5, 0]


def test_without_gpus_workers_take_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = fake_gpus(monkeypatch, 0)
    place = Place(rank=13, local_rank=5, world_size=16)
    assert choose_device(place) == choose_device(None) == torch.device("cpu")
    assert chosen == []


def talk(num_gpus: int) -> tuple[torch.device, list[str]]:
    """The device of a worker, and the backends that it asked for; gloo stands in for them."""
    dist.destroy_process_group()
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    asked, start = list[str](), dist.init_process_group

    def start_over_gloo(backend: str, **options: Any) -> None:
        asked.append(backend)
        start("gloo", **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_gpus(monkeypatch, num_gpus)
        for name, value in (alone | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(dist, "init_process_group", start_over_gloo)
        with workers() as found:
            assert found.group is dist.group.WORLD
    assert not dist.is_initialized()
    return found.device, asked


def test_workers_talk_over_nccl_where_they_have_gpus_and_over_gloo_elsewhere(ranks: Ranks) -> None:
    # Not in this process: a catalog of another test may have made its default group.
    assert ranks(1).run(talk, 2) == [(torch.device("cuda", 1), ["cpu:gloo,cuda:nccl"])]
    assert ranks(1).run(talk, 0) == [(torch.device("cpu"), ["gloo"])]


def test_workers_that_are_started_again_must_be_able_to_go_on() -> None:
    check_restarts("no", {})
    check_restarts("no", {"TORCHELASTIC_MAX_RESTARTS": "0"})
    check_restarts("auto", {"TORCHELASTIC_MAX_RESTARTS": "3"})
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        shared = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        check_restarts("auto", shared)
    with pytest.raises(ValueError, match="--resume must be auto .* with 3 restarts"):
        check_restarts("no", {"TORCHELASTIC_MAX_RESTARTS": "3"})
