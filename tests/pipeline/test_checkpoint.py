"""A checkpoint is whole or not there, and can be read on any number of ranks."""

import json
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.ranks import Ranks

from shardrec.pipeline.checkpoint import (
    Checkpoints,
    CheckpointState,
    load_checkpoint,
    save_checkpoint,
)

NUM_ROWS, WIDTH = 10, 4
ROWS = torch.arange(NUM_ROWS * WIDTH, dtype=torch.float32).reshape(NUM_ROWS, WIDTH)


def bounds(rank: int, world_size: int) -> range:
    block = -(-NUM_ROWS // world_size)
    return range(min(rank * block, NUM_ROWS), min((rank + 1) * block, NUM_ROWS))


def make_state(rows: range, step: int = 3) -> CheckpointState:
    encoder = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(encoder.weight, step)
    return CheckpointState(
        encoder=encoder.state_dict(),
        optimizer=torch.optim.Adam(encoder.parameters()).state_dict(),
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


def load_on_ranks(folder: str) -> bool:
    rows = bounds(dist.get_rank(), dist.get_world_size())
    table = load_checkpoint(Path(folder), rows).table
    right_sum = torch.equal(table["optimizer.sum"], torch.arange(float(NUM_ROWS))[rows])
    return torch.equal(table["rows"], ROWS[rows.start : rows.stop]) and right_sum


def fail_on_the_last_rank(folder: str) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        save_on_ranks(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns the one into the other
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


def test_a_rank_that_cannot_write_stops_all_and_leaves_no_checkpoint(
    ranks: Ranks, tmp_path: Path
) -> None:
    messages = ranks(2).run(fail_on_the_last_rank, str(tmp_path / "step"))
    assert all("on rank 1 of 2" in message for message in messages), messages
    assert not (tmp_path / "step").exists()


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step", make_state(range(NUM_ROWS)))
    (tmp_path / "step" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="not complete"):
        load_checkpoint(tmp_path / "step")


def test_a_truncated_or_altered_file_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step", make_state(range(NUM_ROWS)))
    path = tmp_path / "step" / "table-00000-of-00001.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="table-00000-of-00001.pt must have bytes"):
        load_checkpoint(tmp_path / "step")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="must have sha256"):
        load_checkpoint(tmp_path / "step")


def test_last_and_best_are_kept_and_the_rest_deleted(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    with pytest.raises(FileNotFoundError, match="must hold a complete checkpoint"):
        checkpoints.find("last")
    for step, best in ((1, False), (2, True), (3, False), (4, False)):
        checkpoints.save(step, make_state(range(NUM_ROWS), step), best=best)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000002",
        "step-00000004",
    ]
    assert load_checkpoint(checkpoints.find("best")).progress == {"step": 2}
    assert load_checkpoint(checkpoints.find("last")).progress == {"step": 4}
    assert json.loads((tmp_path / "index.json").read_text())["best"] == "step-00000002"
