"""What once gave a wrong result without a word: now it is refused, or said."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.pipeline.small_data import small_config, write_log

from shardrec.launch.cli import main
from shardrec.modules.catalog_config import CatalogConfig
from shardrec.pipeline.checkpoint.store import load_checkpoint
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.log.columns import EventColumns
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.run.config import (
    CheckpointConfig,
    LimitConfig,
    OptimizerConfig,
    ValidationConfig,
)
from shardrec.pipeline.run.trained import Source
from shardrec.pipeline.train import train

OFF = ValidationConfig(every_epochs=None)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 5])
def test_a_run_that_diverged_is_not_finished_and_leaves_no_broken_checkpoint(
    data: str, tmp_path: Path, steps: int
) -> None:
    config = small_config(
        data,
        tmp_path / "run",
        optimizer=OptimizerConfig(learning_rate=1e30),
        catalog=CatalogConfig(learning_rate=1e30),
        validation=OFF,
        limits=LimitConfig(max_epochs=None, max_steps=steps),
        checkpoints=CheckpointConfig(every_steps=1),
    )
    with pytest.raises(
        FloatingPointError, match="weights must be finite to be saved, got NaN or infinity"
    ):
        train(config)
    assert not (tmp_path / "run" / "end.json").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*/manifest.json"))


@pytest.mark.slow
def test_a_run_that_diverges_later_keeps_what_was_good(data: str, tmp_path: Path) -> None:
    limits = LimitConfig(max_epochs=None, max_steps=2)
    checkpoints = CheckpointConfig(every_steps=1, keep=1)
    good = small_config(
        data, tmp_path / "run", validation=OFF, limits=limits, checkpoints=checkpoints
    )
    train(good)
    config_file = tmp_path / "run" / "config.json"
    stored = json.loads(config_file.read_text())
    stored["optimizer"]["learning_rate"] = stored["catalog"]["learning_rate"] = 1e30
    config_file.write_text(json.dumps(stored))
    bad = dataclasses.replace(
        good,
        optimizer=OptimizerConfig(learning_rate=1e30),
        catalog=CatalogConfig(learning_rate=1e30),
        limits=LimitConfig(max_epochs=None, max_steps=6),
    )
    with pytest.raises(FloatingPointError, match="checkpoints written before are complete"):
        train(bad, resume="yes")
    (left,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert left.name == "step-00000002"
    assert all(one.isfinite().all() for one in load_checkpoint(left).encoder.values())


@pytest.mark.slow
def test_checkpoints_of_another_run_or_name_are_refused(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = LimitConfig(max_epochs=None, max_steps=4)
    often = ValidationConfig(every_epochs=None, every_steps=2)
    ours, other = (
        small_config(data, tmp_path / str(seed), seed=seed, limits=limits, validation=often)
        for seed in (1, 2)
    )
    train(ours)
    train(other)
    folder = tmp_path / "1" / "checkpoints"
    evaluate(ours.output, data, output=str(tmp_path / "a.json"))

    shutil.copytree(tmp_path / "2" / "checkpoints" / "step-00000004", folder / "step-00000009")
    with pytest.raises(ValueError, match=r"step-00000009 must be of this run, \w+, got one of run"):
        evaluate(ours.output, data, output=str(tmp_path / "b.json"))
    with pytest.raises(ValueError, match="must be of this run"):
        longer = LimitConfig(max_epochs=None, max_steps=5)
        train(dataclasses.replace(ours, limits=longer), resume="yes")
    shutil.rmtree(folder / "step-00000009")

    shutil.copytree(folder / "step-00000004", folder / "step-99999999")
    with pytest.raises(ValueError, match=r"got step-00000004 as step-99999999"):
        evaluate(ours.output, data, output=str(tmp_path / "c.json"))
    shutil.rmtree(folder / "step-99999999")

    end = json.loads((tmp_path / "1" / "end.json").read_text())
    best = folder / f"step-{end['best_step']:08d}"
    (best / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        Source.find(ours.output, Prepared.open(data), "best")
    assert f"of step {end['best_step']}, is gone or damaged" in caplog.text


def test_equal_runs_have_equal_ids_and_others_do_not(data: str, tmp_path: Path) -> None:
    from shardrec.pipeline.run.folder import run_id, start_run

    prepared = Prepared.open(data)
    first, again = (small_config(data, tmp_path / name) for name in ("a", "b"))
    other = small_config(data, tmp_path / "c", seed=7)
    ids = [run_id(start_run(config, prepared)) for config in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert run_id(start_run(other, prepared, "Custom")) != ids[2]
    assert run_id(tmp_path / "no such run") is None


def test_data_without_training_sequences_is_refused(data: str, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = [e for e in manifest["files"] if not e["path"].startswith("train/")]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="data must have training sequences, got none"):
        train(small_config(str(tmp_path / "data"), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("weight", "is_told"), [(1e31, True), (1e29, False)])
def test_weights_that_float32_cannot_add_up_are_refused(
    tmp_path: Path, weight: float, is_told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_log(tmp_path / "log.parquet")
    table = pq.read_table(log)
    weights = np.ones(len(table), dtype=np.float64)
    weights[5] = weight
    pq.write_table(table.set_column(3, "weight", pa.array(weights)), log)
    words = ["prepare", "--events", str(log), "--output", str(tmp_path / "p"), "--weight-column"]
    assert main([*words, "weight"]) == (2 if is_told else 0)
    assert ("at most 1e+30, got 9.99" in capsys.readouterr().err) == is_told


def open_log(path: Path) -> EventLog:
    return EventLog.open(str(path), EventColumns(user="user_id", item="item_id", time="timestamp"))


def test_page_checksums_of_the_log_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    table = pa.table({n: np.arange(9000) % 977 for n in ("user_id", "item_id", "timestamp")})
    plain = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, path, **plain)
    assert sum(part.num_rows for part in open_log(path).tables()) == 9000
    content = bytearray(path.read_bytes())
    content[30_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="row group 0, column .* must be valid Parquet data"):
        list(open_log(path).tables())


@pytest.mark.parametrize("change", ["replaced", "truncated", "removed", "rewritten"])
def test_a_log_that_changes_while_it_is_read_is_noticed(tmp_path: Path, change: str) -> None:
    paths = [tmp_path / f"log/{name}.parquet" for name in "ab"]
    paths[0].parent.mkdir()
    for path in paths:
        write_log(path)
    log = open_log(tmp_path / "log")
    if change == "replaced":
        write_log(paths[1], seed=2)
    elif change == "truncated":
        paths[1].write_bytes(paths[1].read_bytes()[:-100])
    elif change == "removed":
        paths[1].unlink()
    else:
        content = bytearray(paths[0].read_bytes())
        content[-1:] = b"!"
        paths[0].write_bytes(content)
    with pytest.raises(ValueError, match=r"(a|b).parquet' must stay as it is while it is read"):
        list(log.tables())


@pytest.mark.parametrize("name", ["what?", "back\\slash"])
def test_a_path_that_duckdb_cannot_use_is_refused_in_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_log(tmp_path / "log.parquet")
    (tmp_path / name).mkdir()
    output = tmp_path / name / "prepared"
    assert main(["prepare", "--events", str(log), "--output", str(output)]) == 2
    assert "output must be in a folder without ? and \\, got" in capsys.readouterr().err
    assert not list((tmp_path / name).iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["encoder.width=2000000000"], "encoder must be of sizes that a machine can hold"),
        (["encoder.max_length=4000000000"], "most of it for encoder"),
        (["encoder.num_blocks=1000000000"], "most of it for encoder"),
        (["loss=cce_minus", "loss.num_negatives=10000000"], "must"),
        (["loss=sce", "loss.num_buckets=1000000"], "must"),
        (["loss=rece", "loss.num_rounds=1000000"], "must"),
        (["loss=bce", "loss.num_negatives=100000000"], "must"),
        (["optimizer.learning_rate=1e38"], "optimizer.learning_rate must be in"),
        (["catalog.learning_rate=1e38"], "catalog.learning_rate must be in"),
    ],
    ids=str,
)
def test_options_beyond_reason_are_refused_before_the_start(
    data: str, tmp_path: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--prepared", data, "--run", str(tmp_path / "run"), "--recipe", "tiny_cpu"]
    assert main([*command, *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_is_fine(data: str, tmp_path: Path) -> None:
    limits = ["limits.max_steps=1", "validation.every_epochs=none", f"batches.batch_size={10**12}"]
    words = ["train", "--prepared", data, "--run", str(tmp_path / "run"), "--recipe", "tiny_cpu"]
    assert main([*words, *limits]) == 0
