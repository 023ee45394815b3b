"""A checkpoint is whole or not there, and can be read on any number of ranks."""

import contextlib
import dataclasses
import hashlib
import json
import pickle
import platform
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks import Ranks

import shardrec
from shardrec.pipeline.checkpoint.store import (
    Checkpoints,
    CheckpointState,
    DamagedCheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from shardrec.pipeline.run.config import CheckpointConfig

NUM_ROWS, WIDTH = 10, 4
ROWS = torch.arange(NUM_ROWS * WIDTH, dtype=torch.float32).reshape(NUM_ROWS, WIDTH)


def bounds(rank: int, world_size: int) -> range:
    block = -(-NUM_ROWS // world_size)
    return range(min(rank * block, NUM_ROWS), min((rank + 1) * block, NUM_ROWS))


def make_state(rows: range, step: int = 3) -> CheckpointState:
    encoder = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(encoder.weight, step)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.0)
    encoder(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return CheckpointState(
        encoder=encoder.state_dict(),
        optimizer=optimizer.state_dict(),
        table={
            "rows": ROWS[rows.start : rows.stop],
            "optimizer.sum": torch.arange(float(NUM_ROWS))[rows.start : rows.stop],
            "first_row": torch.tensor(rows.start),
            "num_rows": torch.tensor(NUM_ROWS),
            "num_steps": torch.tensor(step),
        },
        progress={"step": step},
        config={"seed": 1},
    )


def save_on_ranks(folder: str) -> None:
    rows = bounds(dist.get_rank(), dist.get_world_size())
    save_checkpoint(Path(folder), make_state(rows), dist.group.WORLD)


def save_few_rows(folder: str) -> None:
    """Two rows on three ranks."""
    rank = dist.get_rank()
    rows = range(min(rank, 2), min(rank + 1, 2))
    state = make_state(rows)
    table = dict(state.table) | {"num_rows": torch.tensor(2)}
    save_checkpoint(Path(folder), dataclasses.replace(state, table=table), dist.group.WORLD)


def load_on_ranks(folder: str) -> bool:
    rows = bounds(dist.get_rank(), dist.get_world_size())
    table = load_checkpoint(Path(folder), rows).table
    right_sum = torch.equal(table["optimizer.sum"], torch.arange(float(NUM_ROWS))[rows])
    return torch.equal(table["rows"], ROWS[rows.start : rows.stop]) and right_sum


def fail_on_the_last_rank(folder: str) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        save_on_ranks(folder)
    except OSError as error:
        return f"{error} {error.__notes__}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "saved"


def test_one_process_reads_back_what_it_wrote(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step", make_state(range(NUM_ROWS)))
    state = load_checkpoint(tmp_path / "step")
    assert torch.equal(state.table["rows"], ROWS)
    assert int(state.table["num_steps"]) == 3 and int(state.table["first_row"]) == 0
    assert (state.progress, state.config) == ({"step": 3}, {"seed": 1})
    assert torch.equal(state.encoder["weight"], torch.full((2, 2), 3.0))
    assert state.written_by == {
        "shardrec": shardrec.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    saved = make_state(range(NUM_ROWS)).optimizer
    assert torch.equal(state.optimizer["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])
    assert float(state.optimizer["state"][1]["step"]) == 1.0
    optimizer = torch.optim.Adam(torch.nn.Linear(2, 2).parameters())
    optimizer.load_state_dict(dict(state.optimizer))
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.parametrize(("writers", "readers"), [(2, 3), (3, 1), (1, 2)])
def test_any_number_of_ranks_reads_it(
    ranks: Ranks, tmp_path: Path, writers: int, readers: int
) -> None:
    ranks(writers).run(save_on_ranks, str(tmp_path / "step"))
    assert all(ranks(readers).run(load_on_ranks, str(tmp_path / "step")))


def test_rows_beyond_the_saved_table_are_left_out(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step", make_state(range(NUM_ROWS)))
    assert load_checkpoint(tmp_path / "step", range(8, 20)).table["rows"].shape == (2, WIDTH)
    assert load_checkpoint(tmp_path / "step", range(12, 20)).table["rows"].shape == (0, WIDTH)


def test_a_rank_without_rows_writes_and_reads_nothing(ranks: Ranks, tmp_path: Path) -> None:
    ranks(3).run(save_few_rows, str(tmp_path / "step"))
    assert sorted(path.name for path in (tmp_path / "step").glob("rank-*")) == [
        "rank-00000.bin",
        "rank-00001.bin",
    ]
    assert torch.equal(load_checkpoint(tmp_path / "step").table["rows"], ROWS[:2])
    assert load_checkpoint(tmp_path / "step", range(2, 2)).table["rows"].shape == (0, WIDTH)


def test_tensors_of_every_kind_come_back_bit_by_bit(tmp_path: Path) -> None:
    encoder = {
        "scalar": torch.tensor(float("nan")),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "mask": torch.tensor([[True], [False]]),
        "count": torch.tensor(2**60 + 1),
        "none": torch.zeros(0, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    state = dataclasses.replace(make_state(range(NUM_ROWS)), encoder=encoder)
    save_checkpoint(tmp_path / "step", state)
    found = load_checkpoint(tmp_path / "step").encoder
    assert found.keys() == encoder.keys()
    for name, value in encoder.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name].nan_to_num(7), value.nan_to_num(7))


def test_a_rank_that_cannot_write_stops_all_and_leaves_no_checkpoint(
    ranks: Ranks, tmp_path: Path
) -> None:
    messages = ranks(2).run(fail_on_the_last_rank, str(tmp_path / "step"))
    assert all("on rank 1 of 2" in message for message in messages), messages
    with pytest.raises(FileNotFoundError, match="not complete"):
        load_checkpoint(tmp_path / "step")


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step", make_state(range(NUM_ROWS)))
    (tmp_path / "step" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="not complete"):
        load_checkpoint(tmp_path / "step")


@pytest.mark.parametrize("name", ["rank-00000.bin", "metadata.json", "state.json"])
def test_a_truncated_or_altered_file_is_named(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path / "step", make_state(range(NUM_ROWS)))
    path = tmp_path / "step" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(DamagedCheckpointError, match=f"{name} must have bytes"):
        load_checkpoint(tmp_path / "step")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedCheckpointError, match=f"{name} must have sha256"):
        load_checkpoint(tmp_path / "step")
    path.unlink()
    with pytest.raises(DamagedCheckpointError, match="got no file"):
        load_checkpoint(tmp_path / "step")


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("is_signed", [True, False], ids=["checksums-fit", "checksums-differ"])
@pytest.mark.parametrize("target", ["rank-00000.bin", "metadata.json", "state.json", "all"])
def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path, target: str, is_signed: bool) -> None:
    """Every file in turn, and all of them, hold a pickle that would leave a trace."""
    folder, trace = tmp_path / "step", tmp_path / "trace"
    evil = pickle.dumps(Evil(str(trace)))
    pickle.loads(evil)
    assert trace.exists(), "the trap must work"
    trace.unlink()
    save_checkpoint(folder, make_state(range(NUM_ROWS)))
    (folder / ".metadata").write_bytes(evil)
    for path in sorted(folder.iterdir()) if target == "all" else [folder / target]:
        if path.name != "manifest.json":
            path.write_bytes((evil * 100)[: max(len(evil), path.stat().st_size)])
    if is_signed:
        sign(folder)
    if target == "all" and not is_signed:
        (folder / "manifest.json").write_bytes(evil)
    with contextlib.suppress(ValueError, FileNotFoundError):
        load_checkpoint(folder)
    with contextlib.suppress(ValueError, FileNotFoundError):
        Checkpoints(tmp_path, None).find("last")
    assert not trace.exists()


def sign(folder: Path) -> None:
    """Make the manifest fit the files, as whoever forges them would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_forged_checkpoint_reads_no_file_but_its_own(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 1000)
    save_checkpoint(tmp_path / "step", make_state(range(NUM_ROWS)))
    metadata = tmp_path / "step" / "metadata.json"
    metadata.write_text(metadata.read_text().replace("rank-00000.bin", "../secret"))
    sign(tmp_path / "step")
    with pytest.raises(DamagedCheckpointError, match="inside of their files, got .*../secret"):
        load_checkpoint(tmp_path / "step")


def test_rows_that_nobody_wrote_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step", make_state(range(NUM_ROWS)))
    path = tmp_path / "step" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["table.rows"]["chunks"][0]["rows"] = NUM_ROWS - 1
    path.write_text(json.dumps(metadata))
    sign(tmp_path / "step")
    with pytest.raises(DamagedCheckpointError, match="table.rows must cover its 10 rows once"):
        load_checkpoint(tmp_path / "step")


def test_a_checkpoint_of_an_older_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": {}}))
    for read in (lambda: load_checkpoint(folder), lambda: Checkpoints(tmp_path, None).find("last")):
        with pytest.raises(ValueError, match="format must be 2, got 1 .* train again"):
            read()


ENTRY = {"size": 1, "sha256": "0"}
MANIFESTS = {
    "cut off": '{"format": 2, "best": fal',
    "empty": "",
    "a list": '[{"format": 2}]',
    "no format": json.dumps({"best": True, "files": {}}),
    "format of another type": json.dumps({"format": "2", "best": True, "files": {}}),
    "no files": json.dumps({"format": 2, "best": True}),
    "files in a list": json.dumps({"format": 2, "best": True, "files": ["state.json"]}),
    "best of another type": json.dumps({"format": 2, "best": "yes", "files": {}}),
    "bytes for size": json.dumps(
        {"format": 2, "best": True, "files": {"state.json": {"bytes": 1, "sha256": "0"}}}
    ),
    "size of another type": json.dumps(
        {"format": 2, "best": True, "files": {"state.json": ENTRY | {"size": "1"}}}
    ),
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_malformed_manifest_is_named_and_the_checkpoint_before_it_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    for step in (1, 2):
        checkpoints.save(step, make_state(range(NUM_ROWS), step), best=step == 2)
    path = tmp_path / "step-00000002" / "manifest.json"
    path.write_text(text)
    with pytest.raises(DamagedCheckpointError, match="step-00000002/manifest.json .*use another"):
        load_checkpoint(tmp_path / "step-00000002")
    for which in ("last", "best"):
        caplog.clear()
        found = checkpoints.find(which)
        assert found.name == "step-00000001"
        assert "a checkpoint is skipped" in caplog.text and str(path) in caplog.text
    loaded = checkpoints.load_last(range(NUM_ROWS))
    assert loaded is not None and loaded[0].name == "step-00000001"


def test_a_state_of_another_version_is_damaged_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    changes: list[dict[str, Any]] = [
        {"table": {}},
        {"optimizer": {}},
        {"progress": None},
        {"versions": "2.13"},
    ]
    for change in changes:
        save_checkpoint(folder, make_state(range(NUM_ROWS)))
        numbers = json.loads((folder / "state.json").read_text()) | change
        (folder / "state.json").write_text(json.dumps(numbers))
        sign(folder)
        with pytest.raises(DamagedCheckpointError, match="step/state.json must be .*use another"):
            load_checkpoint(folder)


def test_a_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    state = dataclasses.replace(make_state(range(NUM_ROWS)), encoder={"_extra_state": "words"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="encoder._extra_state must be a tensor"):
        save_checkpoint(tmp_path / "step", state)


def test_the_last_few_and_the_best_are_kept_and_the_rest_deleted(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, None, keep=2)
    with pytest.raises(FileNotFoundError, match="must hold a complete checkpoint"):
        checkpoints.find("last")
    for step, best in ((1, True), (2, True), (3, False), (4, False), (5, False)):
        checkpoints.save(step, make_state(range(NUM_ROWS), step), best=best)
    assert names_in(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    assert load_checkpoint(checkpoints.find("best")).progress == {"step": 2}
    assert load_checkpoint(checkpoints.find("last")).progress == {"step": 5}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_without_a_best_one_the_last_is_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    checkpoints.save(1, make_state(range(NUM_ROWS), 1), best=False)
    assert checkpoints.find("best").name == "step-00000001"


def test_a_damaged_last_one_falls_back_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, None, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(range(NUM_ROWS), step), best=step == 2)
    (tmp_path / "step-00000003" / "state.json").unlink()
    path = tmp_path / "step-00000002" / "rank-00000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert checkpoints.find("last").name == "step-00000002"  # its sizes are right
    assert "step-00000003/state.json must have" in caplog.text
    found = checkpoints.load_last(range(NUM_ROWS))
    assert found is not None and found[1].progress == {"step": 1}
    assert "step-00000002/rank-00000.bin must have sha256" in caplog.text
    path.unlink()
    with pytest.raises(DamagedCheckpointError, match="step-00000002/rank-00000.bin"):
        checkpoints.find("best")


def test_what_comes_after_the_step_that_is_saved_was_given_up(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, None, keep=2)
    for step in (4, 6, 5):
        checkpoints.save(step, make_state(range(NUM_ROWS), step), best=False)
    assert names_in(tmp_path) == ["step-00000004", "step-00000005"]


def test_a_beginning_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    checkpoints.save(1, make_state(range(NUM_ROWS), 1), best=False)
    checkpoints.save(2, make_state(range(NUM_ROWS), 2), best=False)
    manifest = tmp_path / "step-00000002" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:50])  # killed while writing
    assert checkpoints.find("last").name == "step-00000001"
    checkpoints.save(3, make_state(range(NUM_ROWS), 3), best=False)
    assert names_in(tmp_path) == ["step-00000001", "step-00000003"]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="checkpoints.keep must be at least 1"):
        CheckpointConfig(keep=0)
    with pytest.raises(ValueError, match="checkpoints.every_steps must be above 0"):
        CheckpointConfig(every_steps=0)
