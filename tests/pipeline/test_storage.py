"""The same on a local disk and in an object store, from single files to a training run."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.pipeline.event_logs import make_events, prepare_events, write_log
from tests.pipeline.interrupted import InterruptionError, Recorder
from tests.pipeline.object_store import inside, object_store
from tests.pipeline.small_data import prepare_small, small_config
from tests.pipeline.test_checkpoint import NUM_ROWS, ROWS, bounds, make_state
from tests.ranks import Ranks

from shardrec.pipeline.checkpoint.store import (
    Checkpoints,
    DamagedCheckpointError,
    load_checkpoint,
)
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.outputs.storage import Folder, open_folder
from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.run.config import (
    CheckpointConfig,
    LimitConfig,
    TrainConfig,
    ValidationConfig,
)
from shardrec.pipeline.train import train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with object_store() as address:
        yield address


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> Folder:
    where = inside(bucket, tmp_path.name) if request.param == "s3" else tmp_path / "new" / "er"
    return open_folder(where)


def test_files_and_folders_are_written_listed_read_and_removed(folder: Folder) -> None:
    assert folder.folders() == [] and folder.size("none") is None
    (folder / "b").write("one", b"first")
    (folder / "a").write("one", b"")
    (folder / "b").write("one", b"second")  # replaced
    with (folder / "b").create("two") as file:
        for _ in range(3):
            file.write(memoryview(bytes(range(256))))
    assert folder.folders() == ["a", "b"] and (folder / "b").name == "b"
    assert (folder / "b").read("one") == b"second" and (folder / "a").size("one") == 0
    with (folder / "b").open("two") as file:
        file.seek(258)
        part = bytearray(3)
        assert file.readinto(memoryview(part)) == 3 and part == bytes([2, 3, 4])
    with pytest.raises(FileNotFoundError):
        folder.read("none")
    (folder / "b").remove("one")
    (folder / "none").remove("one")
    assert folder.folders() == ["a"]


def test_an_address_shows_no_keys(bucket: str) -> None:
    assert str(open_folder(inside(bucket, "a/b"))) == "s3://runs/a/b"
    assert str(open_folder(Path("/data/run"))) == "/data/run"


def test_an_address_that_nothing_opens_is_refused() -> None:
    with pytest.raises(ValueError, match="folder must be a path or an address that pyarrow opens"):
        open_folder("nowhere://bucket/prefix")


@pytest.mark.parametrize("form", ["file", "folder", "glob"])
def test_a_log_in_an_object_store_is_prepared_as_a_local_one(
    tmp_path: Path, bucket: str, form: str
) -> None:
    events = make_events(600)
    local, _ = prepare_events(tmp_path, events)
    halves = {"day=1/a.parquet": events[:300], "day=2/b.parquet": events[300:]}
    if form == "file":
        halves = {"all.parquet": events}
    folder = open_folder(inside(bucket, f"logs-{form}"))
    for name, half in halves.items():
        log = Path(write_log(tmp_path / "part.parquet", half))
        folder.write(name, log.read_bytes())
    folder.write("day=3/other.txt", b"no events")
    named = {"file": "/all.parquet", "folder": "", "glob": "/day=?/*.parquet"}[form]
    source = inside(bucket, f"logs-{form}{named}")
    manifest = prepare(PrepareConfig(events=source, output=str(tmp_path / "from_s3")))
    assert manifest.files == local.files and manifest.counts == local.counts
    assert [file["path"] for file in manifest.source["files"]] == [
        f"runs/logs-{form}/{name}" for name in halves
    ]
    stored = (tmp_path / "from_s3" / "manifest.json").read_text()
    assert "secret" not in stored, "what opens the store is not written down"


def save_on_ranks(where: str) -> None:
    rows = bounds(dist.get_rank(), dist.get_world_size())
    checkpoints = Checkpoints(where, dist.group.WORLD, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(rows, step), best=step == 1)


def test_checkpoints_in_an_object_store_are_kept_found_and_checked(
    ranks: Ranks, bucket: str
) -> None:
    where = inside(bucket, "kept")
    ranks(2).run(save_on_ranks, where)
    checkpoints = Checkpoints(where, None)
    assert open_folder(where).folders() == ["step-00000001", "step-00000003"]
    assert checkpoints.find("best").name == "step-00000001"
    last = checkpoints.find("last")
    assert torch.equal(load_checkpoint(last, range(3, 8)).table["rows"], ROWS[3:8])
    content = last.read("rank-00001.bin")
    last.write("rank-00001.bin", content[:-1] + b"?")
    with pytest.raises(DamagedCheckpointError, match="s3://runs/kept/step-00000003/rank-00001.bin"):
        load_checkpoint(last)
    found = checkpoints.load_last(range(NUM_ROWS))
    assert found is not None and found[1].progress == {"step": 1}


def train_until(config: TrainConfig, step: int) -> None:
    with pytest.raises(InterruptionError):
        train(config, callbacks=[Recorder(step)])


def test_a_run_with_its_checkpoints_in_an_object_store_resumes_and_is_evaluated(
    ranks: Ranks, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepare_small(tmp_path / "data")
    options: dict[str, Any] = {
        "limits": LimitConfig(max_steps=6),
        "validation": ValidationConfig(every_epochs=None, every_steps=3),
    }
    settings = CheckpointConfig(folder=inside(bucket, "run"), every_steps=1)
    config = small_config(data, tmp_path / "run", checkpoints=settings, **options)
    ranks(2).run(train_until, config, 4)
    assert train(config, resume="yes").step == 6
    assert not (tmp_path / "run" / "checkpoints").exists()
    local = dataclasses.replace(
        config, output=str(tmp_path / "local"), checkpoints=CheckpointConfig()
    )
    # The run's config holds its address without keys.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert train(local).best_metrics == pytest.approx(
        evaluate(config.output, data, config.validation.measure, split="validation")["metrics"],
        rel=1e-3,
        nan_ok=True,
    )
