"""Runs with attributes, from prepare to serving: resumed, warm-started, exported, at any W."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tests.pipeline.attribute_files import ITEMS, attribute_table, write_attributes
from tests.pipeline.recorder import Recorder
from tests.pipeline.small_data import prepare_small, small_config
from tests.ranks import Ranks

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.losses import CCE, CCEMinus, Loss
from shardrec.pipeline.checkpoint.store import Checkpoints, load_checkpoint
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.prepared.attributes import read_columns
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.recommend import RecommendConfig, recommend
from shardrec.pipeline.run.config import (
    InitConfig,
    LimitConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from shardrec.pipeline.run.trained import Source
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.train import build, train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

OFF = ValidationConfig(every_epochs=None)
ADD = CatalogConfig(optimizer="adam", learning_rate=1e-2, attributes="add", id_dropout=0.3)
ONLY = CatalogConfig(attributes="only")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Split by time, so that some targets have no training events; items 56 to 59 have no event."""
    folder = tmp_path_factory.mktemp("data")
    path = write_attributes(folder / "attributes.parquet")
    options: dict[str, Any] = {"split": "temporal", "test_quantile": 0.6, "targets": "all"}
    return prepare_small(folder, item_attributes=path, **options)


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(config_of(data, folder, ADD))
    return str(folder)


def config_of(
    data: str, output: Path | str, catalog: CatalogConfig, loss: Loss | None = None, **more: Any
) -> TrainConfig:
    settings: dict[str, Any] = {
        "catalog": catalog,
        "limits": LimitConfig(max_steps=6),
        "validation": OFF,
        "loss": loss or CCE(),
    }
    return small_config(data, output, **(settings | more))


def losses_of(config: TrainConfig, resume: Any = "no") -> list[float]:
    recorder = Recorder()
    train(config, callbacks=[recorder], resume=resume)
    return [one.loss for one in recorder.steps]


def weights_of(run: Path | str) -> dict[str, torch.Tensor]:
    state = load_checkpoint(Checkpoints(Path(run) / "checkpoints", None).find("last"))
    whole, rows = state.tensors()
    return whole | rows


@pytest.mark.parametrize("catalog", [ADD, ONLY], ids=["add", "only"])
@pytest.mark.parametrize("loss", [CCE(), CCEMinus(num_negatives=20)], ids=["cce", "cce_minus"])
def test_losses_and_weights_are_the_same_on_any_number_of_ranks(
    ranks: Ranks, data: str, tmp_path: Path, loss: Loss, catalog: CatalogConfig
) -> None:
    expected = losses_of(config_of(data, tmp_path / "alone", catalog, loss))
    weights = weights_of(tmp_path / "alone")
    for num_ranks in (2, 3):
        output = tmp_path / f"{num_ranks}"
        for losses in ranks(num_ranks).run(losses_of, config_of(data, output, catalog, loss)):
            assert losses == pytest.approx(expected, rel=1e-4)
        found = weights_of(output)
        assert found.keys() == weights.keys()
        for name in ("attributes.values", "attributes.projection"):
            torch.testing.assert_close(found[name], weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("catalog", [ADD, ONLY], ids=["add", "only"])
def test_a_resumed_run_is_bit_by_bit_the_same(
    data: str, tmp_path: Path, catalog: CatalogConfig
) -> None:
    losses = losses_of(config_of(data, tmp_path / "whole", catalog))
    first = config_of(data, tmp_path / "parts", catalog, limits=LimitConfig(max_steps=3))
    parts = losses_of(first)
    rest = dataclasses.replace(first, limits=LimitConfig(max_steps=6))
    assert parts + losses_of(rest, "yes") == losses
    whole, parted = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert whole.keys() == parted.keys() and "attributes.values" in whole
    assert all(torch.equal(parted[name], value) for name, value in whole.items())


def test_a_run_goes_on_with_another_number_of_ranks(
    ranks: Ranks, data: str, tmp_path: Path
) -> None:
    losses = losses_of(config_of(data, tmp_path / "whole", ADD))
    first = config_of(data, tmp_path / "parts", ADD, limits=LimitConfig(max_steps=3))
    ranks(3).run(losses_of, first)
    rest = dataclasses.replace(first, limits=LimitConfig(max_steps=6))
    for found in ranks(2).run(losses_of, rest, "yes"):
        assert found == pytest.approx(losses[3:], rel=1e-4)


@pytest.mark.parametrize("catalog", [ADD, ONLY], ids=["add", "only"])
def test_the_composed_rows_of_a_run_with_averages_are_those_of_averaged_vectors(
    data: str, tmp_path: Path, catalog: CatalogConfig
) -> None:
    average = OptimizerConfig(ema_decay=0.5, ema_every=1)
    validation = ValidationConfig(every_epochs=None, every_steps=6)
    config = config_of(data, tmp_path, catalog, optimizer=average, validation=validation)
    recorder = Recorder()
    train(config, callbacks=[recorder])
    found = evaluate(str(tmp_path), data, validation.measure, split="validation")["metrics"]
    for name, value in recorder.validations[-1].metrics.items():
        assert found[name] == pytest.approx(value, nan_ok=True), name


def test_metrics_of_new_targets_are_told_apart(run: str, data: str) -> None:
    config = MeasureConfig(ks=(20,), min_count=0)
    metrics = evaluate(run, data, config, output=str(Path(run) / "new.json"))["metrics"]
    assert 0 < metrics["new_target_share"] < 1
    names = [f"{kind}@20" for kind in ("NDCG", "Recall", "HitRate", "MRR")]
    assert all(0 <= metrics[f"{name}/new"] <= 1 for name in names)
    assert any(not math.isclose(metrics[f"{n}/new"], metrics[f"{n}/known"]) for n in names)
    assert not any("/tail/new" in name or name.startswith("Coverage@20/") for name in metrics)


def test_attributes_need_prepared_attributes(plain_data: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--item-attributes"):
        train(config_of(plain_data, tmp_path / "run", ADD))


def rows_of(run: str, data: str) -> torch.Tensor:
    prepared = Prepared.open(data)
    return Source.find(run, prepared, "last").load(prepared).catalog.shard.rows.detach().clone()


def exported(folder: Path) -> tuple[list[Any], torch.Tensor]:
    table = pq.read_table(folder / "items")
    return table["item_id"].to_pylist(), torch.tensor(table["vector"].to_pylist())


def run_export(config: ExportConfig) -> None:
    export(config)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_export_holds_the_composed_rows_and_those_of_new_items(
    ranks: Ranks, run: str, data: str, tmp_path: Path, num_ranks: int
) -> None:
    # Items 0 to 59 are in the catalog; 60 and 77 are new and 77 is like 57 in all its attributes.
    table = attribute_table([60, 5, 77])
    like = attribute_table([57]).set_column(0, "item_id", [[77]])
    table = table.slice(0, 2)
    pq.write_table(table, tmp_path / "newer-1.parquet")
    pq.write_table(like.cast(table.schema), tmp_path / "newer-2.parquet")
    config = ExportConfig(
        run=run,
        prepared=data,
        output=str(tmp_path / "export"),
        items=str(tmp_path / "newer-*.parquet"),
        checkpoint="last",
    )
    ranks(num_ranks).run(run_export, config)
    with pytest.raises(FileExistsError, match="differs in items"):
        export(dataclasses.replace(config, items=None))
    ids, vectors = exported(tmp_path / "export")
    prepared = Prepared.open(data)
    known = prepared.item_ids().to_pylist()
    assert ids == [*known, 60, 77]
    torch.testing.assert_close(vectors[:60], rows_of(run, data), rtol=0, atol=0)
    # An item without training events has attributes alone, so its twin has the same vector.
    torch.testing.assert_close(vectors[ids.index(77)], vectors[ids.index(57)])
    assert (vectors[60] != 0).any()
    served = Recommender.open(tmp_path / "export", min_count=0)
    (lists,) = served.recommend([[1, 77, 60]], k=62, filter_seen=False)
    assert {item for item, _ in lists} == set(ids)
    (lists,) = Recommender.open(tmp_path / "export").recommend([[1, 77, 60]], k=62)
    assert not {item for item, _ in lists} & {57, 60, 77}


def test_serving_equals_the_live_model(run: str, data: str, tmp_path: Path) -> None:
    export(ExportConfig(run=run, prepared=data, output=str(tmp_path / "export"), checkpoint="last"))
    config = RecommendConfig(
        run=run,
        prepared=data,
        output=str(tmp_path / "lists"),
        checkpoint="last",
        split="test",
        min_count=0,
        k=5,
    )
    recommend(config)
    (part,) = (tmp_path / "lists").glob("part-*.parquet")
    live = pq.read_table(part).to_pylist()
    users = pq.read_table(Path(data) / "test.parquet").to_pylist()
    ids = Prepared.open(data).item_ids().to_pylist()
    served = Recommender.open(tmp_path / "export", min_count=0)
    histories = [[ids[item] for item in user["items"]] for user in users]
    lists = served.recommend(histories, k=5, filter_seen=config.filter_seen)
    for ours, theirs in zip(lists, live, strict=True):
        assert [item for item, _ in ours] == theirs["item_ids"]
        assert [score for _, score in ours] == pytest.approx(theirs["scores"], rel=1e-4, abs=1e-5)


def test_new_items_need_attributes(plain_data: str, run: str, data: str, tmp_path: Path) -> None:
    train(config_of(plain_data, tmp_path / "plain", CatalogConfig()))
    path = write_attributes(tmp_path / "newer.parquet", [60])
    options: dict[str, Any] = {"output": str(tmp_path / "export"), "items": path}
    with pytest.raises(ValueError, match=r"train with catalog\.attributes=add"):
        export(ExportConfig(run=str(tmp_path / "plain"), prepared=plain_data, **options))
    table = attribute_table([60])
    pq.write_table(table.set_column(1, "brand", [[1]]), path)
    with pytest.raises(ValueError, match="'brand' of items must be a category of string"):
        export(ExportConfig(run=run, prepared=data, **options))
    assert not (tmp_path / "export").exists()


@pytest.fixture(scope="module")
def newer(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prepared the next day: more items, and brands that the first day did not have."""
    folder = tmp_path_factory.mktemp("newer")
    table = attribute_table([*ITEMS, 60, 61])
    names = table["brand"].to_pylist()
    table = table.set_column(1, "brand", [["a new brand", *names[1:]]])
    pq.write_table(table, folder / "attributes.parquet")
    return prepare_small(
        folder,
        item_attributes=str(folder / "attributes.parquet"),
        items=str(Path(data) / "items.parquet"),
    )


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("optimizer", ["keep", "reset"])
def test_a_warm_start_keeps_what_each_value_has_learned(
    ranks: Ranks, run: str, newer: str, tmp_path: Path, num_ranks: int, optimizer: Any
) -> None:
    init = InitConfig(run=run, checkpoint="last", optimizer=optimizer)
    config = config_of(newer, tmp_path / "run", ADD, init_from=init)
    source = weights_of(run)
    before, after = read_columns(Path(run)), read_columns(Path(newer))
    assert before[0].values == after[0].values[:-1] and after[0].values[-1] == "a new brand"
    num_brands = after[0].num_codes
    for found in ranks(num_ranks).run(start_of, config):
        values, former = found["values"], source["attributes.values"]
        assert torch.equal(values[: num_brands - 1], former[: num_brands - 1])
        assert torch.equal(values[num_brands:], former[num_brands - 1 :])
        assert torch.equal(found["projection"], source["attributes.projection"])
        assert values[num_brands - 1].any()
        index = found["first"]
        if optimizer == "reset":
            assert not found["memory"]
            continue
        memory = found["memory"][index]["exp_avg_sq"]
        kept = source[f"optimizer.{index}.exp_avg_sq"]
        assert torch.equal(memory[num_brands:], kept[num_brands - 1 :]) and kept.any()
        assert not memory[num_brands - 1].any()


def start_of(config: TrainConfig) -> dict[str, Any]:
    """What a run starts with, on this rank."""
    built = build(config)
    vectors = built.stepper.model.catalog.attributes
    found = {name: value.detach().clone() for name, value in vectors.named_parameters()}
    first = len(built.stepper.parameters) - len(found)
    return found | {"first": first, "memory": built.stepper.optimizer.state_dict()["state"]}


def test_a_warm_start_with_another_use_of_attributes_is_refused(
    run: str, data: str, tmp_path: Path
) -> None:
    init = InitConfig(run=run, optimizer="reset")
    with pytest.raises(ValueError, match=r"catalog\.attributes must be add"):
        train(config_of(data, tmp_path / "run", ONLY, init_from=init))
