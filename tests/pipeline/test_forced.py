"""A forced run takes the place of a former one when it is complete, and not before."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.small_data import small_config
from tests.ranks import Ranks

from shardrec.launch import cli
from shardrec.pipeline.checkpoint.store import Checkpoints, load_checkpoint
from shardrec.pipeline.outputs import staging
from shardrec.pipeline.outputs.lock import RunLock
from shardrec.pipeline.outputs.staging import partial_of
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.run.callbacks import Callback, StepReport
from shardrec.pipeline.run.config import (
    CheckpointConfig,
    LimitConfig,
    TrainConfig,
    ValidationConfig,
)
from shardrec.pipeline.run.folder import open_run
from shardrec.pipeline.train import train

STEPS, CUT = 4, 2


@pytest.fixture(scope="module")
def data(plain_data: str) -> str:
    return plain_data


class CutError(Exception):
    """Ends a run from outside."""


class Watch(Callback):
    """Keeps the steps it is told, and what a folder holds at each; ends the run after one."""

    def __init__(self, folder: Path, last_step: int | None = None) -> None:
        self.folder, self.last_step = folder, last_step
        self.steps: list[int] = []
        self.seen: list[dict[str, bytes]] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report.step)
        self.seen.append(content(self.folder))
        if report.step == self.last_step:
            raise CutError


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which says who holds it now."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def config_of(data: str, output: Path, **options: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "limits": LimitConfig(max_epochs=None, max_steps=STEPS),
        "validation": ValidationConfig(every_epochs=None),
        "checkpoints": CheckpointConfig(every_steps=1, keep=STEPS, background=False),
    }
    return small_config(data, output, **(settings | options))


@pytest.fixture
def former(data: str, tmp_path: Path) -> dict[str, bytes]:
    """A finished run in ``tmp_path / "run"``, and what it consists of."""
    train(config_of(data, tmp_path / "run"))
    return content(tmp_path / "run")


def train_forced(config: TrainConfig) -> str:
    return train(config, force=True).output


def first_weights(run: Path) -> torch.Tensor:
    folder = Checkpoints(run / "checkpoints", None).find("last")
    return load_checkpoint(folder).table["rows"]


def assert_replaced(run: Path, data: str, seed: int) -> None:
    assert not partial_of(run).exists()
    config = open_run(run, Prepared.open(data))
    assert (config.seed, config.output) == (seed, str(run))
    assert json.loads((run / "end.json").read_text())["output"] == str(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    folders = [Path(line["folder"]) for line in lines if line["event"] == "checkpoint"]
    assert folders and all(folder.parent == run / "checkpoints" for folder in folders)
    assert all(folder.is_dir() for folder in folders)


def test_the_former_run_is_as_it_was_until_the_new_one_is_complete(
    data: str, tmp_path: Path, former: dict[str, bytes]
) -> None:
    run, watch = tmp_path / "run", Watch(tmp_path / "run")
    report = train(config_of(data, run, seed=2), callbacks=[watch], force=True)
    assert watch.steps == [1, 2, 3, 4] and all(seen == former for seen in watch.seen)
    assert report.output == str(run)
    assert_replaced(run, data, seed=2)


@pytest.mark.slow
def test_workers_replace_a_run_together(
    ranks: Ranks, data: str, tmp_path: Path, former: dict[str, bytes]
) -> None:
    run = tmp_path / "run"
    config = config_of(data, run, seed=2)
    assert ranks(2).run(train_forced, config) == [str(run)] * 2
    assert_replaced(run, data, seed=2)


@pytest.mark.slow
def test_a_forced_run_that_was_interrupted_goes_on_or_begins_again(
    data: str, tmp_path: Path, former: dict[str, bytes]
) -> None:
    run = tmp_path / "run"
    config = config_of(data, run, seed=2)
    with pytest.raises(CutError):
        train(config, callbacks=[Watch(run, CUT)], force=True)
    assert content(run) == former
    again = Watch(run, CUT)
    with pytest.raises(CutError):
        train(config, callbacks=[again], force=True)
    goes_on = Watch(run)
    train(config, callbacks=[goes_on], force=True, resume="auto")
    assert (again.steps, goes_on.steps) == ([1, 2], [2, 3, 4])
    assert_replaced(run, data, seed=2)
    train(config_of(data, tmp_path / "other", seed=2))
    assert torch.equal(first_weights(run), first_weights(tmp_path / "other"))


def test_a_kill_between_two_renames_leaves_the_new_run_to_be_found(
    data: str, tmp_path: Path, former: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rename = tmp_path / "run", Path.rename

    def die(path: Path, target: Path) -> Path:
        if target == run:
            raise KeyboardInterrupt
        return rename(path, target)

    config = config_of(data, run, seed=2)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(staging, "_rename_exchange", lambda *_: errno.ENOSYS)
        patched.setattr(Path, "rename", die)
        train(config, force=True)
    assert not run.exists()
    shutil.copytree(partial_of(run), tmp_path / "left")
    assert open_run(run, Prepared.open(data)).seed == 2  # a reader finds it
    assert_replaced(run, data, seed=2)
    shutil.rmtree(run)
    shutil.copytree(tmp_path / "left", partial_of(run))
    watch = Watch(run)
    train(config, callbacks=[watch], force=True, resume="auto")  # the next start, too
    assert watch.steps == []
    assert_replaced(run, data, seed=2)


def test_an_interrupted_run_goes_on_where_it_is(data: str, tmp_path: Path) -> None:
    config, watch = config_of(data, tmp_path / "run"), Watch(tmp_path / "run")
    with pytest.raises(CutError):
        train(config, callbacks=[Watch(tmp_path / "run", CUT)], force=True, resume="auto")
    train(config, callbacks=[watch], force=True, resume="auto")
    assert watch.steps == [2, 3, 4] and not partial_of(tmp_path / "run").exists()


def test_only_a_run_that_nobody_writes_is_replaced(
    data: str, tmp_path: Path, former: dict[str, bytes]
) -> None:
    run = tmp_path / "run"
    config = config_of(data, run, seed=2)
    lock = RunLock(run)
    lock.acquire()
    with pytest.raises(FileExistsError, match="one run at a time"):
        train(config, force=True)
    lock.release()
    (run / "model").mkdir()
    with pytest.raises(FileExistsError, match="nothing but a run to be replaced, got .* with mode"):
        train(config, force=True)
    (run / "model").rmdir()
    assert content(run) == former and not partial_of(run).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="output must be a new or empty folder"):
        train(config_of(data, tmp_path / "mine"), force=True)


def test_to_begin_again_and_to_insist_on_going_on_exclude_each_other(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--prepared", data, "--run", str(tmp_path / "run"), "--force", "--resume"]
    assert cli.main(words) == 2
    assert "--force must come alone or with --resume=auto" in capsys.readouterr().err


def test_a_run_that_is_a_link_is_replaced_where_it_leads(data: str, tmp_path: Path) -> None:
    (tmp_path / "scratch" / "real").mkdir(parents=True)
    run = tmp_path / "run"
    run.symlink_to(tmp_path / "scratch" / "real")
    one_step = LimitConfig(max_steps=1)
    train(small_config(data, run, limits=one_step))
    train(small_config(data, run, limits=one_step, seed=9), force=True)
    assert run.is_symlink()
    assert json.loads((tmp_path / "scratch" / "real" / "config.json").read_text())["seed"] == 9
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["real"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "scratch"]
