"""Tomorrow's run starts from today's: every item finds its own row, or the run says why not."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from tests.pipeline.small_data import Running, small_config, write_log
from tests.ranks import Ranks
from torch import Tensor

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.encoder import EncoderConfig
from shardrec.modules.losses import CCEMinus
from shardrec.pipeline.checkpoint.manifest import Manifest
from shardrec.pipeline.checkpoint.store import Checkpoints, StoredCheckpoint, load_checkpoint
from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.run import warm_start as init_from
from shardrec.pipeline.run.config import InitConfig, LimitConfig, TrainConfig, ValidationConfig
from shardrec.pipeline.train import build, train

OFF = ValidationConfig(every_epochs=None)
MATCHES = {"former items": "second", "item map": "balanced", "item ids": "alone"}
MEMORY = {
    "sgd": [],
    "rowwise_adagrad": ["sum"],
    "adagrad": ["sum"],
    "adam": ["exp_avg", "exp_avg_sq"],
    "sparse_adam": ["exp_avg", "exp_avg_sq"],
}


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared folders: ``first``, then three of a second day whose log lacks some old items."""
    folder = tmp_path_factory.mktemp("days")
    log = pq.read_table(write_log(folder / "log.parquet"))
    day = {
        "first": log.filter(pc.less(log["item_id"], 41)),
        "second": log.filter(pc.greater(log["item_id"], 4)),
    }
    options: dict[str, Any] = {"split": "leave_one_out", "threads": 1}
    prepared_from(folder / "first", day["first"], **options)
    options["items"] = str(folder / "first" / "items.parquet")
    prepared_from(folder / "second", day["second"], **options)
    prepared_from(folder / "balanced", day["second"], rebalance=True, **options)
    prepared_from(folder / "alone", day["second"], split="leave_one_out", threads=1)
    return folder


def prepared_from(folder: Path, log: pa.Table, **options: Any) -> None:
    path = folder.with_suffix(".parquet")
    pq.write_table(log, path)
    prepare(PrepareConfig(events=str(path), output=str(folder), **options))


def config_of(data: Path, output: Path, **options: Any) -> TrainConfig:
    settings: dict[str, Any] = {"limits": LimitConfig(max_steps=3), "validation": OFF}
    return small_config(str(data), output, **(settings | options))


def ids_of(folder: Path) -> list[int]:
    ids: list[int] = pq.read_table(folder / "items.parquet")["item_id"].to_pylist()
    return ids


def run_train(config: TrainConfig) -> None:
    train(config)


def state_after_build(config: TrainConfig) -> dict[str, Any]:
    """What a run starts with, on this rank."""
    run = build(config)
    table = run.stepper.model.catalog.state_dict()
    return {
        "table": {name: value.clone() for name, value in table.items()},
        "encoder": run.stepper.model.encoder.state_dict(),
        "optimizer": run.stepper.optimizer.state_dict()["state"],
        "rates": [group["lr"] for group in run.stepper.optimizer.param_groups],
    }


def joined(parts: list[dict[str, Any]], name: str) -> Tensor:
    return torch.cat([part["table"][name] for part in parts])


def source_state(run: Path) -> Any:
    return load_checkpoint(Checkpoints(run / "checkpoints", None).find("last"))


def assert_items_kept_their_rows(
    parts: list[dict[str, Any]], run: Path, first: Path, second: Path, names: list[str]
) -> tuple[list[int], list[int]]:
    """Compare by item id; returns which rows are carried over and which are new."""
    source, old = source_state(run).table, ids_of(first)
    now = ids_of(second)
    carried = [row for row, item in enumerate(now) if item in set(old)]
    former = [old.index(now[row]) for row in carried]
    assert 0 < len(carried) < len(now)
    for name in names:
        assert torch.equal(joined(parts, name)[carried], source[name][former]), name
    return carried, sorted(set(range(len(now))) - set(carried))


@pytest.mark.parametrize(
    ("optimizer", "match", "writers", "readers"),
    [
        ("adam", "former items", 2, 3),
        ("rowwise_adagrad", "item map", 3, 2),
        ("sparse_adam", "item ids", 1, 2),
        ("adagrad", "item map", 2, 1),
        ("sgd", "item ids", 2, 1),
    ],
)
@pytest.mark.slow
def test_rows_and_their_memory_follow_the_items(
    ranks: Ranks, days: Path, tmp_path: Path, optimizer: str, match: str, writers: int, readers: int
) -> None:
    table = CatalogConfig(optimizer=optimizer)
    run, second = tmp_path / "run", days / MATCHES[match]
    loss = CCEMinus(num_negatives=16, share=8)
    first = config_of(days / "first", run, catalog=table, loss=loss)
    ranks(writers).run(run_train, first)
    warm = config_of(
        second, tmp_path / "warm", catalog=table, loss=loss, init_from=InitConfig(run=str(run))
    )
    parts = ranks(readers).run(state_after_build, warm)
    names = ["rows", *(f"optimizer.{name}" for name in MEMORY[optimizer])]
    carried, new = assert_items_kept_their_rows(parts, run, days / "first", second, names)
    for name in names[1:]:
        assert joined(parts, name)[carried].any()
        assert not joined(parts, name)[new].any()
    source = source_state(run)
    assert all(int(part["table"]["num_steps"]) == 3 for part in parts)
    for part in parts:
        torch.testing.assert_close(part["encoder"], dict(source.encoder), rtol=0, atol=0)
        torch.testing.assert_close(part["optimizer"], source.optimizer["state"], rtol=0, atol=0)
    report = json.loads((tmp_path / "warm" / "run.json").read_text())["init_from"]
    assert report["matched_by"] == match and report["step"] == 3
    assert report["items_carried_over"] == len(carried) and report["items_new"] == len(new)
    assert report["items_left_out"] == len(ids_of(days / "first")) - len(carried)


@pytest.fixture(scope="module")
def run(days: Path) -> Path:
    """A run on the first day, in one process."""
    train(config_of(days / "first", days / "run", catalog=CatalogConfig(optimizer="adam")))
    return days / "run"


def warm_config(days: Path, output: Path, data: str = "second", **init: Any) -> TrainConfig:
    return config_of(
        days / data,
        output,
        catalog=CatalogConfig(optimizer="adam"),
        init_from=InitConfig(**({"run": str(days / "run")} | init)),
    )


def test_few_rows_of_the_former_table_are_in_memory_at_a_time(
    days: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, checked = [], []
    load_rows, check = StoredCheckpoint.load_rows, Manifest.check

    def noting_rows(stored: StoredCheckpoint, rows: range, names: Any) -> dict[str, Tensor]:
        pieces.append(rows)
        return load_rows(stored, rows, names)

    def noting_file(manifest: Manifest, name: str) -> None:
        checked.append(name)
        check(manifest, name)

    monkeypatch.setattr(init_from, "BLOCK_ROWS", 4)
    monkeypatch.setattr(StoredCheckpoint, "load_rows", noting_rows)
    monkeypatch.setattr(Manifest, "check", noting_file)
    state = state_after_build(warm_config(days, tmp_path / "warm", "balanced"))
    assert sorted(checked) == ["metadata.json", "rank-00000.bin", "state.json"]
    names = ["rows", "optimizer.exp_avg", "optimizer.exp_avg_sq"]
    assert_items_kept_their_rows([state], run, days / "first", days / "balanced", names)
    assert len(pieces) > 5 and max(map(len, pieces)) <= 4
    assert len({row for piece in pieces for row in piece}) == sum(map(len, pieces))


def test_new_rows_are_those_of_a_new_table(days: Path, run: Path, tmp_path: Path) -> None:
    warm = [state_after_build(warm_config(days, tmp_path / "warm"))]
    names = ["rows"]
    _, new = assert_items_kept_their_rows(warm, run, days / "first", days / "second", names)
    cold = dataclasses.replace(warm_config(days, tmp_path / "cold"), init_from=InitConfig())
    assert torch.equal(joined(warm, "rows")[new], joined([state_after_build(cold)], "rows")[new])


def test_new_rows_can_be_the_mean_of_the_others(
    ranks: Ranks, days: Path, run: Path, tmp_path: Path
) -> None:
    config = warm_config(days, tmp_path / "warm", "alone", new_rows="mean")
    parts = ranks(3).run(state_after_build, config)
    carried, new = assert_items_kept_their_rows(
        parts, run, days / "first", days / "alone", ["rows"]
    )
    rows = joined(parts, "rows")
    expected = rows[carried].double().mean(0).float().expand(len(new), -1)
    torch.testing.assert_close(rows[new], expected)


def test_the_optimizers_can_be_reset(days: Path, run: Path, tmp_path: Path) -> None:
    state = state_after_build(warm_config(days, tmp_path / "warm", optimizer="reset"))
    assert_items_kept_their_rows([state], run, days / "first", days / "second", ["rows"])
    assert not state["table"]["optimizer.exp_avg"].any()
    assert int(state["table"]["num_steps"]) == 0 and state["optimizer"] == {}


def test_the_learning_rates_are_those_of_the_new_run(days: Path, run: Path, tmp_path: Path) -> None:
    config = warm_config(days, tmp_path / "warm")
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.125)
    state = state_after_build(dataclasses.replace(config, optimizer=optimizer))
    assert state["rates"] == [0.125]


def test_the_former_folder_is_not_needed_where_indices_were_kept(
    days: Path, run: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(days / "run", moved)
    (days / "first").rename(tmp_path / "first")
    try:
        for data in ("second", "balanced"):
            state_after_build(warm_config(days, tmp_path / data, data, run=str(moved)))
        with pytest.raises(FileNotFoundError, match="must be there to match items by their ids"):
            build(warm_config(days, tmp_path / "alone", "alone", run=str(moved)))
        init = {"run": str(moved), "prepared": str(tmp_path / "first")}
        state = state_after_build(warm_config(days, tmp_path / "alone", "alone", **init))
        first, alone = tmp_path / "first", days / "alone"
        assert_items_kept_their_rows([state], moved, first, alone, ["rows"])
    finally:
        (tmp_path / "first").rename(days / "first")


def test_a_run_on_the_same_data_is_carried_over_whole(
    days: Path, run: Path, tmp_path: Path
) -> None:
    state = state_after_build(warm_config(days, tmp_path / "warm", "first"))
    assert torch.equal(state["table"]["rows"], source_state(run).table["rows"])
    report = json.loads((tmp_path / "warm" / "run.json").read_text())["init_from"]
    assert (report["matched_by"], report["items_new"]) == ("same data", 0)


def test_what_was_taken_over_is_said(
    days: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dataclasses.replace(warm_config(days, tmp_path / "warm"), show_progress=True))
    said = capsys.readouterr().err
    assert f"starts from {run}, step 3: " in said
    assert "items carried over (matched by former items), " in said
    assert "optimizer memory kept" in said


def test_an_encoder_that_is_not_ours_is_carried_over(days: Path, tmp_path: Path) -> None:
    first = config_of(days / "first", tmp_path / "run")
    train(first, encoder=Running())
    warm = config_of(
        days / "second", tmp_path / "warm", init_from=InitConfig(run=str(tmp_path / "run"))
    )
    model = build(warm, encoder=Running()).stepper.model
    expected = dict(source_state(tmp_path / "run").encoder)
    torch.testing.assert_close(dict(model.encoder.state_dict()), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="the encoder must be of the kind"):
        build(dataclasses.replace(warm, output=str(tmp_path / "other")))


def change_items(folder: Path) -> None:
    """Other ids under the same indices, in a file of the same size."""
    path = folder / "items.parquet"
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    data[start + 60] ^= 1
    path.write_bytes(bytes(data))


def other_data(folder: Path) -> None:
    shutil.rmtree(folder)
    prepared_from(folder, pq.read_table(folder.with_suffix(".parquet")), threads=1)


@pytest.mark.parametrize(
    ("data", "spoil", "message"),
    [
        ("balanced", lambda days: change_items_map(days), "SHA-256 of '.*item_map.parquet'"),
        ("alone", lambda days: change_items(days / "alone"), "SHA-256 of '.*items.parquet'"),
        ("alone", lambda days: change_items(days / "first"), "SHA-256 of '.*items.parquet'"),
        ("alone", lambda days: other_data(days / "first"), "with another fingerprint"),
    ],
    ids=["map", "new ids", "old ids", "old folder"],
)
def test_a_match_that_cannot_be_trusted_is_refused(
    ranks: Ranks,
    days: Path,
    run: Path,
    tmp_path: Path,
    data: str,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    copy = tmp_path / "days"
    shutil.copytree(days, copy)
    spoil(copy)
    init = {"run": str(copy / "run")}
    if data == "alone":
        init["prepared"] = str(copy / "first")
    config = warm_config(copy, tmp_path / "warm", data, **init)
    with pytest.raises(ValueError, match=message):
        build(config)
    assert not (tmp_path / "warm").exists()


def change_items_map(days: Path) -> None:
    path = days / "balanced" / "item_map.parquet"
    table = pq.read_table(path)
    swapped = table.set_column(
        1, "item", table["item"].take(pa.array([1, 0, *range(2, len(table))]))
    )
    size = path.stat().st_size
    pq.write_table(swapped, path, compression="none")
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"catalog": CatalogConfig(optimizer="adagrad")}, "catalog.optimizer must be adam"),
        (
            {"encoder": EncoderConfig(width=16, max_length=9, dropout=0.0)},
            "encoder.max_length must be 8",
        ),
        (
            {"encoder": EncoderConfig(width=16, max_length=8, num_heads=2, dropout=0.0)},
            "encoder.num_heads must be 1",
        ),
    ],
    ids=["table optimizer", "length", "heads"],
)
def test_a_model_of_another_kind_is_refused_on_all_ranks(
    ranks: Ranks, days: Path, run: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    config = dataclasses.replace(warm_config(days, tmp_path / "warm"), **options)
    for said in ranks(2).run(refusal, config):
        assert message in said
    assert not (tmp_path / "warm").exists()


def refusal(config: TrainConfig) -> str:
    with pytest.raises(ValueError) as caught:
        build(config)
    return str(caught.value)


def test_a_run_of_another_log_is_refused(days: Path, run: Path, tmp_path: Path) -> None:
    log = pq.read_table(days / "log.parquet")
    ids = pc.add(log["item_id"], 1000)
    for name, column in (("others", ids), ("texts", pc.cast(ids, pa.string()))):
        table = log.set_column(log.schema.get_field_index("item_id"), "item_id", column)
        prepared_from(tmp_path / name, table, threads=1)
    for name, message in (
        ("others", "must know some of the items"),
        ("texts", "item ids must be int64 as in the catalog, got string"),
    ):
        config = warm_config(tmp_path, tmp_path / "warm", name, run=str(run))
        with pytest.raises(ValueError, match=message):
            build(config)
    with pytest.raises(FileNotFoundError, match="run must be a folder that train wrote"):
        build(warm_config(days, tmp_path / "warm", run=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "reset"}, "init_from.optimizer must come with init_from.run"),
        ({"run": "r", "new_rows": "zero"}, "init_from.new_rows must be one of random, mean"),
    ],
)
def test_options_that_cannot_hold_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InitConfig(**options)
