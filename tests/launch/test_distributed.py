import pytest
import torch

from shardrec.launch.distributed import Place, check_restarts, choose_device

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29500",
}


def test_the_place_is_what_the_launcher_says() -> None:
    assert Place.read(TORCHRUN) == Place(rank=5, local_rank=1, world_size=8)


def test_without_a_launcher_there_is_no_place() -> None:
    assert Place.read({"MASTER_PORT": "29500"}) is None


def test_half_a_launcher_is_refused_before_anything_waits() -> None:
    without = {name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"}
    with pytest.raises(ValueError, match=r"got none for MASTER_ADDR; start workers with"):
        Place.read(without)


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"at most its 1 GPU\(s\), got worker 1"):
        choose_device(Place(rank=1, local_rank=1, world_size=2))


def test_workers_that_are_started_again_must_be_able_to_go_on() -> None:
    check_restarts("no", {})
    check_restarts("no", {"TORCHELASTIC_MAX_RESTARTS": "0"})
    check_restarts("auto", {"TORCHELASTIC_MAX_RESTARTS": "3"})
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        shared = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        check_restarts("auto", shared)
    with pytest.raises(ValueError, match="--resume must be auto .* with 3 restarts"):
        check_restarts("no", {"TORCHELASTIC_MAX_RESTARTS": "3"})
