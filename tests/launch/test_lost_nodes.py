"""Nodes are killed and come back, and the run ends as an undisturbed one does."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from tests.launch.killing import assert_same_end as assert_bit_equal
from tests.launch.killing import last_step, lines, stage, train_undisturbed
from tests.launch.nodes import HOLD, nodes
from tests.pipeline.small_data import prepare_small
from tests.ranks import Ranks

from shardrec.pipeline.checkpoint.store import Checkpoints, load_checkpoint

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

# Three batches a step, of which one of two replicas takes two; five an epoch.
OPTIONS = ["optimizer.accumulate=3", "validation.every_steps=none", "optimizer.eps=1e-4"]
SLOW = "callbacks=tests.launch.nodes:Slow"
STEPS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("data"))


def options(steps: int) -> list[str]:
    return [f"limits.max_steps={steps}", "checkpoints.every_steps=5", *OPTIONS]


def lose_a_node_and_get_it_back(run: Path, words: list[str]) -> list[int | None]:
    """Two nodes, then one, then two; the exit codes."""
    with nodes(run, words, most=2, workers=1, max_restarts=1) as job:
        for index in range(2):
            job.start(index)
        for _ in job.until("step 8"):
            if last_step(run) >= 8:
                break
        job.kill(1)
        starts = job.wait_for_ranks(1, 0)
        job.start(1)
        job.wait_for_ranks(2, starts)
        (run.parent / HOLD).unlink()
        return job.end(150)  # a survivor has its grace period to notice


def kill_a_replica(run: Path, words: list[str]) -> list[int | None]:
    """One node, of whose two workers, each a replica, one is killed; the exit code."""
    with nodes(run, words, most=1, workers=2, max_restarts=1) as job:
        (run.parent / HOLD).unlink()
        job.start(0)
        for _ in job.until("step 8"):
            if last_step(run) >= 8:
                break
        psutil.Process(job.of[0].pid).children()[1].kill()
        return job.end(150)  # a survivor has its grace period to notice


def assert_same_end(run: Path, undisturbed: Path) -> None:
    """Within rounding, with every step told once and the same number of positions in each."""
    for one, other in zip(lines(run, "step"), lines(undisturbed, "step"), strict=True):
        assert (one["step"], one["positions"]) == (other["step"], other["positions"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4), one["step"]
    found, expected = (
        load_checkpoint(Checkpoints(folder / "checkpoints", None).find("last")).tensors()
        for folder in (run, undisturbed)
    )
    for mine, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=2e-3, atol=1e-4, msg=name)
    ends = [json.loads((folder / "end.json").read_text())["step"] for folder in (run, undisturbed)]
    assert ends[0] == ends[1]


def test_a_job_goes_on_without_a_node_and_with_it_again(
    ranks: Ranks, data: str, tmp_path: Path
) -> None:
    run, whole = tmp_path / "lost" / "run", tmp_path / "whole"
    run.parent.mkdir()
    words = stage(data, run, *options(STEPS), SLOW)
    assert ranks(1).run(lose_a_node_and_get_it_back, run, words, timeout=400) == [[0, 0]]
    assert [line["ranks"] for line in lines(run, "resume")] == [1, 2]
    ranks(1).run(train_undisturbed, stage(data, whole, *options(STEPS)))
    assert_same_end(run, whole)


def test_a_replica_inside_a_node_is_killed_and_the_end_is_bit_equal(
    ranks: Ranks, data: str, tmp_path: Path
) -> None:
    run, whole = tmp_path / "lost" / "run", tmp_path / "whole"
    run.parent.mkdir()
    words = [*options(STEPS), "parallel.shards=1"]
    assert ranks(1).run(kill_a_replica, run, stage(data, run, *words), timeout=400) == [[0]]
    assert [line["ranks"] for line in lines(run, "resume")] == [2]
    ranks(2).run(train_undisturbed, stage(data, whole, *words))
    assert_bit_equal(run, whole)
