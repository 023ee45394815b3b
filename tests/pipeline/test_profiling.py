"""A profiled run leaves a trace of every rank and says in words where the time goes."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.pipeline.small_data import prepare_small, small_config
from tests.ranks import Ranks
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from shardrec.kernels.device.matmul import times_transposed
from shardrec.launch.commands import read_train
from shardrec.pipeline.model.profile_ranges import PART, Part
from shardrec.pipeline.run.config import LimitConfig, ProfileConfig, TrainConfig, ValidationConfig
from shardrec.pipeline.run.profiler import OPERATORS, summary
from shardrec.pipeline.train import train


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("profiled")
    return small_config(
        prepare_small(folder),
        folder / "run",
        limits=LimitConfig(max_steps=5),
        validation=ValidationConfig(every_epochs=None),
        profile=ProfileConfig(steps=2, warmup=2),
    )


def run_on_rank(config: TrainConfig) -> None:
    train(config)


def shares(text: str) -> dict[str, float]:
    """The table of a summary: percent of the time by name."""
    rows = re.findall(r"^ *(\S.*?) +[\d.]+ +([\d.]+)%$", text, re.M)
    return {name: float(percent) for name, percent in rows}


@pytest.mark.slow
def test_every_rank_writes_a_trace_and_a_summary(ranks: Ranks, config: TrainConfig) -> None:
    ranks(2).run(run_on_rank, config)
    folder = Path(config.output) / "profile"
    names = {path.name for path in folder.iterdir()}
    assert names == {"rank0.json.gz", "rank1.json.gz", "rank0.txt", "rank1.txt"}
    for rank in (0, 1):
        with gzip.open(folder / f"rank{rank}.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        for name in get_args(Part):
            found = [event for event in events if event["name"] == PART + name]
            assert len(found) == 2, f"{name} must be in both profiled steps"
        assert any(event["name"].startswith("gloo:") for event in events)
        text = (folder / f"rank{rank}.txt").read_text()
        assert text.startswith("2 steps, ")
        percent = shares(text)
        parts = {name: percent[name] for name in (*get_args(Part), "between steps")}
        assert sum(parts.values()) == pytest.approx(100, abs=1)
        assert all(value > 0 for value in parts.values())
        assert 0 < percent["collectives in flight"] <= 100
        assert 0 <= percent["during other work"] <= percent["collectives in flight"]


@pytest.mark.slow
def test_the_ids_of_the_next_batch_travel_before_backward(
    ranks: Ranks, config: TrainConfig
) -> None:
    run = dataclasses.replace(config, output=config.output + "-ids")
    ranks(2).run(run_on_rank, run)
    for rank in (0, 1):
        with gzip.open(Path(run.output) / "profile" / f"rank{rank}.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        looked_up, sent = starts(events, PART + "look-up"), starts(events, PART + "next ids")
        travel = starts(events, "gloo:all_to_all")
        # Counts, lengths and ids of the next step, then the gradients of this one.
        assert sum(sent[0] < start < looked_up[1] for start in travel) == 4
        # What the next step still waits for are the vectors.
        assert sum(looked_up[1] < start < sent[1] for start in travel) == 1


def starts(events: list[dict[str, Any]], name: str) -> list[float]:
    return sorted(float(event["ts"]) for event in events if event["name"] == name)


@pytest.mark.slow
def test_a_profile_changes_no_step_and_is_off_by_default(config: TrainConfig) -> None:
    alone = dataclasses.replace(config, output=config.output + "-alone")
    plain = dataclasses.replace(config, output=config.output + "-plain", profile=ProfileConfig())
    losses = []
    for each in (alone, plain):
        train(each)
        lines = (Path(each.output) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
    assert losses[0] == losses[1]
    assert (Path(alone.output) / "profile" / "rank0.json.gz").exists()
    assert not (Path(plain.output) / "profile").exists()


def event(name: str, start: float, end: float, *, thread: int = 1, on: str = "CPU") -> Any:
    """An event of a profile, in microseconds."""
    made = FunctionEvent(id=0, name=name, thread=thread, start_us=start, end_us=end)
    made.device_type = getattr(DeviceType, on)
    return made


def test_on_a_gpu_backward_has_the_time_of_its_kernels() -> None:
    """They are launched by autograd's thread, and run after the range of the main thread ended."""
    launches = event("shardrec::cce_backward", 25, 28, thread=7)
    launches.append_kernel("full_rows_backward", 0, 300)
    before = event("shardrec::cce", 5, 9)
    before.append_kernel("full_forward", 0, 100)
    late = event("aten::add_", 95, 96)
    late.append_kernel("add", 0, 40)
    events = [
        *(event(PART + "loss", 0, 10), event(PART + "loss backward", 20, 30)),
        *(before, launches, late),
        event("full_forward", 50, 150, on="CUDA"),
        event("full_rows_backward", 150, 450, on="CUDA"),
        event("add", 460, 500, on="CUDA"),
        event(PART + "loss", 50, 150, on="CUDA"),
    ]
    percent = shares(summary(events, 1000e-6, 1))
    expected = {"loss": 10.0, "loss backward": 30.0, "outside of parts": 4.0, "idle": 56.0}
    assert {name: percent[name] for name in expected} == expected
    assert "between steps" not in percent


def test_products_of_both_libraries_count_as_work() -> None:
    names = set[str]()
    for width in (64, 65):
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as recorded:
            times_transposed(torch.ones(64, 64), torch.ones(width, 64))
        names |= {event.name for event in recorded.events() or [] if "::" in event.name}
    assert names and all(name.startswith(OPERATORS) for name in names)
    assert {name.partition("::")[0] for name in names} == {"aten", "mkldnn"}


def test_a_run_that_ends_in_the_warm_up_says_so(config: TrainConfig) -> None:
    short = dataclasses.replace(
        config, output=config.output + "-short", profile=ProfileConfig(steps=1, warmup=9)
    )
    with pytest.warns(UserWarning, match="nothing was profiled"):
        train(short)


def test_the_option_of_the_command_sets_the_steps() -> None:
    words = ["--prepared", "data", "--run", "run"]
    for more, steps in (([], 0), (["--profile"], 5), (["--profile", "7"], 7)):
        _, config = read_train([*words, *more])
        assert config.profile.steps == steps
    with pytest.raises(ValueError, match=r"profile.steps must be at least 0"):
        ProfileConfig(steps=-1)
