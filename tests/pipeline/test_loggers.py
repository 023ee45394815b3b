"""A tracker gets what TensorBoard gets, on rank 0, and never ends a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tests.pipeline.small_data import prepare_small, small_config
from tests.ranks import Ranks

from shardrec.pipeline.config import override
from shardrec.pipeline.run.loggers import LogTo
from shardrec.pipeline.train import train


class Recorded:
    """A tracker of the kind of W&B; fails at a step if asked."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.points: list[tuple[int, set[str]]] = []
        self.fails_at, self.is_finished = fails_at, False

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route to the server")
        self.points.append((step, set(values)))

    def finish(self) -> None:
        self.is_finished = True


def config_of(folder: Path) -> Any:
    settings = ["limits.max_steps=6", "limits.max_epochs=none"]
    settings += ["validation.every_steps=3", "validation.every_epochs=none"]
    return override(small_config(prepare_small(folder), str(folder / "run")), settings)


def test_steps_validations_and_the_end_arrive_under_their_step(tmp_path: Path) -> None:
    tracker = Recorded()
    train(config_of(tmp_path), callbacks=[LogTo(lambda: tracker, every=2)])
    assert [step for step, names in tracker.points if "train/loss" in names] == [2, 4, 6]
    assert [step for step, names in tracker.points if "validation/NDCG@10" in names] == [3, 6]
    last, names = tracker.points[-1]
    assert last == 6 and "end/seconds" in names and tracker.is_finished
    assert any("train/learning_rate" in names for _, names in tracker.points)


def test_a_tracker_that_fails_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Recorded(fails_at=4)
    end = train(config_of(tmp_path), callbacks=[LogTo(lambda: tracker, every=2)])
    assert end.step == 6 and max(step for step, _ in tracker.points) == 3
    assert caplog.text.count("gets nothing more, after ConnectionError: no route") == 1


def log_on_ranks(config: Any) -> int:
    opened = []

    def open_tracker() -> Recorded:
        opened.append(dist.get_rank())
        return Recorded()

    train(config, callbacks=[LogTo(open_tracker, every=1)])
    return len(opened)


def test_only_rank_0_opens_a_tracker(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2).run(log_on_ranks, config_of(tmp_path)) == [1, 0]
