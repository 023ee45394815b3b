"""A memory beside a run: its counts, its scale, and that every stage ranks by both."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from tests.pipeline.small_data import prepare_small, small_config
from tests.ranks import Ranks

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.losses import CCE
from shardrec.modules.ranking import tie_keys
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.gate import measure_export
from shardrec.pipeline.memorize import MemorizeConfig, memorize
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.recommend import RecommendConfig, recommend
from shardrec.pipeline.run.config import LimitConfig, ValidationConfig
from shardrec.pipeline.run.trained import Source
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.train import train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

Numbers = npt.NDArray[Any]
SCALES = (0.0, 1.0, 4.0, 16.0)
MEASURE = MeasureConfig(ks=(10,), batch_size=9)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two thirds of the users end training before their last events: there is much to remember."""
    return prepare_small(tmp_path_factory.mktemp("log"), split="leave_one_out")


@pytest.fixture(scope="module", params=["inner product", "cosine"])
def trained(request: pytest.FixtureRequest, log: str, tmp_path_factory: Any) -> str:
    """A run of one epoch: it has learned little."""
    folder = tmp_path_factory.mktemp("run") / "run"
    loss = CCE(normalize=True, temperature=0.1) if request.param == "cosine" else CCE()
    catalog = CatalogConfig(optimizer="adam", learning_rate=1e-2)
    train(small_config(log, folder, catalog=catalog, loss=loss))
    return str(folder)


@pytest.fixture(scope="module")
def memorized(trained: str, log: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("memorized") / "run"
    shutil.copytree(trained, folder)
    assert memorize(configured(str(folder), log)).is_new
    return str(folder)


def configured(run: str, data: str, **options: Any) -> MemorizeConfig:
    small: dict[str, Any] = {"neighbors": 4, "scales": SCALES, "batch_size": 9, "block_rows": 7}
    return MemorizeConfig(run=run, prepared=data, **(small | options))


def by_numpy(data: str, most: int) -> Numbers:
    """(V, V) sum over lags of counts / lag, over the root of the events; the best of each row."""
    prepared = Prepared.open(data)
    counts = np.zeros((prepared.num_items, prepared.num_items))
    for path in prepared.train_files:
        for items in pq.read_table(path)["items"].to_pylist():
            for lag in (1, 2, 3):
                np.add.at(counts, (items[:-lag], items[lag:]), 1 / lag)
    for row in counts:
        order = np.lexsort((np.arange(len(row)), -row.round(6)))
        row[order[most:]] = 0
    strengths: Numbers = counts / np.sqrt(np.maximum(1, prepared.item_counts().numpy()))[:, None]
    return strengths


def stored_matrix(run: str, data: str) -> Numbers:
    table = pq.read_table(Path(run) / "memory" / "successors.parquet")
    size = Prepared.open(data).num_items
    matrix = np.zeros((size, size))
    matrix[table["item"].to_numpy(), table["successor"].to_numpy()] = table["strength"].to_numpy()
    return matrix


def manifest_of(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run) / "memory" / "manifest.json").read_text())
    return found


@pytest.mark.parametrize("most", [2, 100])
def test_strengths_are_those_of_numpy(trained: str, log: str, tmp_path: Path, most: int) -> None:
    folder = str(shutil.copytree(trained, tmp_path / "run"))
    memorize(configured(folder, log, neighbors=most, scales=(1.0,)))
    np.testing.assert_allclose(stored_matrix(folder, log), by_numpy(log, most), rtol=1e-6)
    table = pq.read_table(Path(folder) / "memory" / "successors.parquet")
    assert table["item"].to_pylist() == sorted(table["item"].to_pylist())
    assert (np.bincount(table["item"].to_numpy()) <= most).all() and table.num_rows > 90


def expected_lists(run: str, data: str, scale: float, k: int) -> list[list[int]]:
    """In float64, one user at a time: the model's scores and scale * sum .7**a M[h_a]."""
    prepared, matrix = Prepared.open(data), torch.from_numpy(by_numpy(data, 4))
    source = Source.find(run, prepared, "best", with_memory=False)
    model, temperature = source.load(prepared), source.config.loss.temperature
    rows, ids = model.scored_shard().rows.double(), prepared.item_ids().to_pylist()
    keys, counts = tie_keys(torch.arange(len(ids))).tolist(), prepared.item_counts().tolist()
    lists = []
    for user in pq.read_table(Path(data) / "test.parquet")["items"].to_pylist():
        items = torch.tensor([user[-source.config.encoder.max_length :]])
        with torch.no_grad():
            state = model.last_states(items, torch.tensor([items.shape[1]]))[0].double()
        state = F.normalize(state, dim=0) if model.normalize else state
        scores = rows @ state / temperature
        for age, item in enumerate(reversed(user[-3:])):
            scores += scale * 0.7**age * matrix[item]
        left = [i for i in range(len(ids)) if counts[i] and i not in user]
        ordered = sorted(left, key=lambda i: (-float(scores[i]), keys[i]))
        gaps = -scores[ordered[: k + 1]].diff()
        assert gaps.min() > 1e-6, "float32 orders these items too"
        lists.append([ids[i] for i in ordered[:k]])
    return lists


def lists_of(run: str, data: str, output: Path, **options: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {"k": 5, "batch_size": 4, "block_rows": 7, "force": True} | options
    recommend(RecommendConfig(run=run, prepared=data, output=str(output), **given))
    parts = sorted(output.glob("part-*"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def test_recommend_ranks_by_model_and_memory(memorized: str, log: str, tmp_path: Path) -> None:
    tried = {row["scale"]: row["NDCG@10"] for row in manifest_of(memorized)["tried"]}
    best = max(tried, key=lambda scale: (tried[scale], -scale))
    assert best > 0 and set(tried) == set(SCALES)
    found = [row["item_ids"] for row in lists_of(memorized, log, tmp_path / "lists")]
    assert found == expected_lists(memorized, log, best, 5)
    alone = expected_lists(memorized, log, 0, 5)
    assert sum(a != b for a, b in zip(found, alone, strict=True)) > 20


def test_the_scale_is_the_best_of_the_validation_users(
    trained: str, memorized: str, log: str, tmp_path: Path
) -> None:
    tried = {row["scale"]: row["NDCG@10"] for row in manifest_of(memorized)["tried"]}
    for folder, value in ((trained, tried[0.0]), (memorized, max(tried.values()))):
        output = str(tmp_path / f"{value}.json")
        report = evaluate(folder, log, MEASURE, split="validation", output=output)
        assert report["metrics"]["NDCG@10"] == pytest.approx(value)
    assert max(tried.values()) > 1.1 * tried[0.0]
    alone, both = (
        evaluate(folder, log, MEASURE, output=str(tmp_path / f"{name}.json"))
        for name, folder in (("alone", trained), ("both", memorized))
    )
    assert both["metrics"]["NDCG@10"] > alone["metrics"]["NDCG@10"]
    assert "memory" in both["request"]["source"] and "memory" not in alone["request"]["source"]


def run_all(run: str, data: str, folder: Path, force: bool) -> tuple[Any, Any, Any]:
    """Few batches of several blocks on every rank: each costs all ranks collectives."""
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    few: dict[str, Any] = {"batch_size": 25, "block_rows": 15}
    manifest = memorize(configured(run, data, force=force, **few)).manifest
    measure = dataclasses.replace(MEASURE, batch_size=25)
    metrics = evaluate(run, data, measure, output=str(folder / f"{size}.json"))["metrics"]
    return manifest["tried"], metrics, len(lists_of(run, data, folder / str(size), **few))


def test_the_number_of_ranks_changes_nothing(
    ranks: Ranks, trained: str, log: str, tmp_path: Path
) -> None:
    folder = str(shutil.copytree(trained, tmp_path / "run"))
    (tmp_path / "1").mkdir()
    tried, metrics, _ = run_all(folder, log, tmp_path, False)
    matrix, rows = stored_matrix(folder, log), rows_in(tmp_path / "1")
    for size in (2, 3):
        for found, others, _ in ranks(size).run(run_all, folder, log, tmp_path, True):
            assert [r["scale"] for r in found] == [r["scale"] for r in tried]
            for ours, theirs in zip(tried, found, strict=True):
                assert ours["NDCG@10"] == pytest.approx(theirs["NDCG@10"])
            assert others == pytest.approx(metrics, nan_ok=True)
        assert np.array_equal(stored_matrix(folder, log), matrix)
        for row, other in zip(rows, rows_in(tmp_path / str(size)), strict=True):
            assert row["item_ids"] == other["item_ids"]
            assert row["scores"] == pytest.approx(other["scores"], abs=1e-5)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    parts = sorted(folder.glob("part-*"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def test_an_export_serves_what_recommend_writes(memorized: str, log: str, tmp_path: Path) -> None:
    config = ExportConfig(run=memorized, prepared=log, output=str(tmp_path / "export"))
    manifest = export(config).manifest
    assert manifest["memory"]["scale"] == manifest_of(memorized)["scale"]
    served = Recommender.open(tmp_path / "export")
    rows = lists_of(memorized, log, tmp_path / "lists")
    ids = served.ids.ids.to_pylist()
    users = pq.read_table(Path(log) / "test.parquet")["items"].to_pylist()
    found = served.recommend([[ids[item] for item in user] for user in users], k=5)
    for row, pairs in zip(rows, found, strict=True):
        assert [item for item, _ in pairs] == row["item_ids"]
        assert [score for _, score in pairs] == pytest.approx(row["scores"], abs=1e-5)
    assert served.recommend([[], [10**9]], k=3)[0] == served.recommend([[10**9]], k=3)[0]


def test_an_index_finds_what_exact_search_finds(memorized: str, log: str, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    options: dict[str, Any] = {"output": str(tmp_path / "export"), "faiss": "Flat"}
    export(ExportConfig(run=memorized, prepared=log, **options))
    exact = Recommender.open(tmp_path / "export")
    approximate = Recommender.open(tmp_path / "export", approximate=True, trust_code=True)
    ids = exact.ids.ids.to_pylist()
    users = pq.read_table(Path(log) / "test.parquet")["items"].to_pylist()
    histories = [[ids[item] for item in user] for user in users]
    for filter_seen in (True, False):
        wanted = exact.recommend(histories, k=5, filter_seen=filter_seen)
        found = approximate.recommend(histories, k=5, filter_seen=filter_seen)
        for one, other in zip(wanted, found, strict=True):
            assert [item for item, _ in one] == [item for item, _ in other]
            assert [s for _, s in one] == pytest.approx([s for _, s in other], abs=1e-5)


def test_the_gate_measures_an_export_as_evaluate_measures_the_run(
    memorized: str, log: str, tmp_path: Path
) -> None:
    export(ExportConfig(run=memorized, prepared=log, output=str(tmp_path / "export")))
    expected = evaluate(memorized, log, MEASURE, output=str(tmp_path / "e.json"))["metrics"]
    found = measure_export(tmp_path / "export", Prepared.open(log), MEASURE, "test")
    assert found["NDCG@10"] == pytest.approx(expected["NDCG@10"])


def test_a_scale_of_zero_is_the_model_alone(trained: str, log: str, tmp_path: Path) -> None:
    folder = str(shutil.copytree(trained, tmp_path / "run"))
    before = lists_of(folder, log, tmp_path / "before")
    memorize(configured(folder, log, scales=(0.0,)))
    assert lists_of(folder, log, tmp_path / "after") == before
    export(ExportConfig(run=folder, prepared=log, output=str(tmp_path / "export")))
    assert not (tmp_path / "export" / "successors.parquet").exists()


def test_a_memory_of_other_weights_is_refused(memorized: str, log: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(memorized, tmp_path / "run"))
    assert not memorize(configured(str(folder), log)).is_new
    with pytest.raises(FileExistsError, match="which differs in neighbors"):
        memorize(configured(str(folder), log, neighbors=5))
    manifest = manifest_of(str(folder))
    manifest["request"]["source"]["weights"] = "0" * 16
    (folder / "memory" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="the memory must be of the weights that are loaded, got"):
        evaluate(str(folder), log, MEASURE)
    assert memorize(configured(str(folder), log, force=True)).is_new
    shutil.rmtree(folder / "memory")
    assert Source.find(str(folder), Prepared.open(log), "best").memory is None


def test_a_damaged_memory_is_refused(memorized: str, log: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(memorized, tmp_path / "run"))
    path = folder / "memory" / "successors.parquet"
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(20)
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="successors.parquet"):
        evaluate(str(folder), log, MEASURE, output=str(tmp_path / "e.json"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="successors.parquet"):
        evaluate(str(folder), log, MEASURE, output=str(tmp_path / "e.json"))


def test_without_validation_users_one_scale_must_be_given(
    trained: str, log: str, tmp_path: Path
) -> None:
    data = prepare_small(tmp_path, validation="none")
    with pytest.raises(ValueError, match="must have validation users to choose a scale by"):
        memorize(configured(trained, data))
    off = ValidationConfig(every_epochs=None)
    config = small_config(data, tmp_path / "run", limits=LimitConfig(max_steps=1), validation=off)
    train(config)
    memorize(configured(config.output, data, scales=(2.0,)))
    manifest = manifest_of(config.output)
    assert (manifest["scale"], manifest["tried"]) == (2.0, [])
    assert evaluate(config.output, data, MEASURE)["metrics"]["users"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbors": 0}, "neighbors must be at least 1"),
        ({"scales": ()}, "scales must be numbers of at least 0"),
        ({"scales": (1.0, -1.0)}, "scales must be numbers of at least 0"),
        ({"scales": (float("nan"),)}, "scales must be numbers of at least 0"),
        ({"metric": "NDCG@11"}, "metric"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemorizeConfig(run="run", prepared="data", **options)
