"""Ranks that were started with other options, data or code are named before they train."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tests.pipeline.small_data import prepare_small, small_config, write_log
from tests.ranks import Ranks

from shardrec.pipeline.ranks import default_group, on_all_ranks
from shardrec.pipeline.run import agreement
from shardrec.pipeline.run.agreement import code_facts, require_same
from shardrec.pipeline.run.config import TrainConfig
from shardrec.pipeline.run.resume import Resume
from shardrec.pipeline.train import train


def agree(facts: list[dict[str, Any]]) -> str:
    try:
        require_same(facts[dist.get_rank()], default_group())
    except ValueError as error:
        return str(error)
    return ""


def test_the_rank_and_its_facts_are_named_on_all_ranks(ranks: Ranks) -> None:
    facts = {"seed": 1, "loss": "cce"}
    assert ranks(3).run(agree, [facts, facts, facts]) == ["", "", ""]
    said = ranks(3).run(agree, [facts, facts, {"seed": 9, "ks": (1,)}])
    assert said[0] == said[1] == said[2]
    assert "got ks=(1,) for nothing, loss=nothing for cce, seed=9 for 1 on rank 2;" in said[0]


def train_differently(
    config: TrainConfig, other: TrainConfig, resumes: tuple[Resume, Resume] = ("auto", "auto")
) -> str:
    rank = dist.get_rank()
    try:
        train(other if rank else config, resume=resumes[rank])
    except ValueError as error:
        return str(error)
    return ""


def test_two_ranks_with_different_options_do_not_train(ranks: Ranks, tmp_path: Path) -> None:
    config = small_config(prepare_small(tmp_path), str(tmp_path / "run"))
    faster = dataclasses.replace(config.optimizer, learning_rate=0.5)
    others = {
        "seed=9 for 1": dataclasses.replace(config, seed=9),
        "optimizer.learning_rate=0.5 for": dataclasses.replace(config, optimizer=faster),
    }
    for words, other in others.items():
        assert all(f"{words}" in said for said in ranks(2).run(train_differently, config, other))
    said = ranks(2).run(train_differently, config, config, ("auto", "no"))
    assert all("resume=no for auto on rank 1" in one for one in said)
    assert not (tmp_path / "run").exists(), "nothing was written"
    ranks(2).run(train_differently, config, config)
    assert (tmp_path / "run" / "end.json").exists()


@pytest.mark.slow
def test_two_ranks_that_were_started_by_hand_are_refused_alike(tmp_path: Path) -> None:
    """Two real commands with the environment of a launcher, as from two scripts that drifted."""
    data, run = prepare_small(tmp_path), tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    words = [sys.executable, "-P", "-m", "shardrec.launch.cli", "train", "--prepared", data]
    words += ["--run", str(run), "--recipe", "tiny_cpu", "--timeout", "60"]
    others = [[], ["optimizer.learning_rate=0.5", "batches.batch_size=7", "seed=9"]]
    started = []
    for rank, other in enumerate(others):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        started.append(
            subprocess.Popen(
                [*words, *other],
                env=os.environ | place | own | sizes,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [2, 2], said
    for one in said:
        (line,) = [line for line in one.splitlines() if "must be started with the same" in line]
        assert "batches.batch_size=7 for" in line and "on rank 1" in line
        assert "seed=9 for" in line and "learning_rate=0.5 for" in line
        assert "Traceback" not in one
    assert not run.exists()


def test_two_ranks_with_different_data_do_not_train(ranks: Ranks, tmp_path: Path) -> None:
    config = small_config(prepare_small(tmp_path / "a"), str(tmp_path / "run"))
    log = write_log(tmp_path / "log.parquet", seed=1)
    other = prepare_small(tmp_path / "b", events=str(log))
    said = ranks(2).run(train_differently, config, dataclasses.replace(config, data=other))
    assert all("fingerprint of the data=" in one and "on rank 1" in one for one in said)
    # A copy in another place is the same data.
    shutil.copytree(config.data, tmp_path / "copy")
    copy = dataclasses.replace(config, data=str(tmp_path / "copy"))
    assert ranks(2).run(train_differently, config, copy) == ["", ""]


def other_code() -> str:
    with pytest.MonkeyPatch.context() as patched:
        if dist.get_rank() == 1:
            patched.setattr(agreement, "_code_digest", lambda: "changed")
        return agree([code_facts()] * 2)


def agree_with_another_command() -> str:
    if dist.get_rank() == 0:  # its first collective is another one
        on_all_ranks(lambda: None, default_group())
        return ""
    return agree([{"stage": "evaluate"}] * 2)


def test_a_rank_of_another_command_is_told_so(ranks: Ranks) -> None:
    _, said = ranks(2).run(agree_with_another_command)
    assert said.startswith("all ranks must be started with the same command, got another")


def test_ranks_of_another_version_are_named(ranks: Ranks) -> None:
    said = ranks(2).run(other_code)
    assert all("code=changed for" in one for one in said)
