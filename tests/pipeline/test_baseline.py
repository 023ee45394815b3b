"""Baselines equal ten lines of numpy, and go where a run goes, on any number of ranks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from tests.pipeline.small_data import prepare_small
from tests.ranks import Ranks

from shardrec.modules.ranking import by_popularity
from shardrec.pipeline.baseline import BaselineConfig, Kind, baseline, open_baseline
from shardrec.pipeline.evaluate import evaluate, evaluate_popularity
from shardrec.pipeline.gate import GateConfig, gate
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.recommend import RecommendConfig, recommend
from shardrec.pipeline.report import report

Numbers = npt.NDArray[Any]
MEASURE = MeasureConfig(ks=(5, 10), batch_size=9)
FEW_BATCHES = MeasureConfig(ks=(5, 10), batch_size=40)  # each costs all ranks collectives
KINDS: tuple[Kind, ...] = get_args(Kind)


def sequences_of(data: str) -> list[list[int]]:
    files = Prepared.open(data).train_files
    return [row for path in files for row in pq.read_table(path)["items"].to_pylist()]


def matrix_by_numpy(data: str, kind: str, most: int, last_events: int) -> Numbers:
    """(V, V): knn is X'X over the lengths of X's columns, next counts the transitions."""
    sequences, num_items = sequences_of(data), Prepared.open(data).num_items
    has, steps = np.zeros((len(sequences), num_items)), np.zeros((num_items, num_items))
    for row, items in enumerate(sequences):
        has[row, items[-last_events:]] = 1
        np.add.at(steps, (items[:-1], items[1:]), 1)
    counts = has.sum(0)
    lengths = np.sqrt(np.maximum(1, counts[:, None] * counts))
    cosine = np.where(np.eye(num_items) > 0, 0, has.T @ has / lengths)
    place = np.argsort(by_popularity(Prepared.open(data).item_counts()).numpy())
    knn, step = {"knn": (1, 0), "next": (0, 1), "knn_next": (1, 3)}.get(kind, (0, 0))
    scores = knn * best(cosine, place, most) + step * best(steps, place, most)
    return np.asarray(scores, dtype=np.float32)


def best(scores: Numbers, place: Numbers, most: int) -> Numbers:
    """The ``most`` largest of each row, as float32; of equal ones the more popular."""
    kept = np.zeros_like(scores, dtype=np.float64)
    for row, line in enumerate(scores.astype(np.float32)):
        chosen = np.lexsort((place, -line))[:most]
        kept[row, chosen] = line[chosen]
    return kept


def order_by_numpy(data: str, kind: str) -> list[int]:
    """Items from the most popular on; for "recent", by the number of sequences they end."""
    order = by_popularity(Prepared.open(data).item_counts()).tolist()
    last = [items[-1] for items in sequences_of(data)]
    return sorted(order, key=lambda item: -last.count(item)) if kind == "recent" else order


def list_by_numpy(matrix: Numbers, order: list[int], history: list[int], k: int) -> list[int]:
    """The best unseen items: by the sum of 0.7**age times the score, then by the order."""
    scores = np.zeros(len(order))
    for age, item in enumerate(reversed(history[-50:])):
        scores += 0.7**age * matrix[item].astype(np.float64)
    place = {item: at for at, item in enumerate(order)}
    left = [item for item in order if item not in history]
    return sorted(left, key=lambda item: (-scores[item], place[item]))[:k]


def built(data: str, folder: Path, kind: Kind, **options: Any) -> str:
    """The folder of a baseline."""
    output = str(folder / kind)
    baseline(BaselineConfig(prepared=data, kind=kind, output=output, **options))
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_lists_are_those_of_numpy(data: str, tmp_path: Path, kind: Kind) -> None:
    prepared, k = Prepared.open(data), 12
    users = pq.read_table(Path(data) / "test.parquet").to_pylist()
    for most, last_events in ((100, 200), (3, 200), (100, 2)):
        options = {"neighbors": most} if kind in ("knn", "next", "knn_next") else {}
        options |= {"last_events": last_events} if kind in ("knn", "knn_next") else {}
        folder = Path(built(data, tmp_path / f"{most}-{last_events}", kind, **options))
        ranker = open_baseline(folder, prepared, None)
        matrix = matrix_by_numpy(data, kind, most, last_events)
        order = order_by_numpy(data, kind)
        histories = [user["items"] for user in users]
        recent = [torch.tensor(items[-ranker.max_length :]) for items in histories]
        lengths = torch.tensor([len(items) for items in recent])
        seen = torch.tensor(sum(histories, [])), torch.tensor([len(one) for one in histories])
        padded = torch.nn.utils.rnn.pad_sequence(recent, batch_first=True)
        _, lists = ranker.top(padded, lengths, k, seen, None)
        expected = [list_by_numpy(matrix, order, items, k) for items in histories]
        assert lists.tolist() == expected
        assert len({tuple(items) for items in expected}) > 20
    assert any(len(set(items)) < len(items) for items in histories), "the log repeats items"


def test_scores_are_above_zero_where_there_is_evidence_and_places_below(
    data: str, tmp_path: Path
) -> None:
    folder = Path(built(data, tmp_path, "next", neighbors=1))
    ranker = open_baseline(folder, Prepared.open(data), None)
    matrix = matrix_by_numpy(data, "next", 1, 200)
    allowed = torch.ones(len(matrix), dtype=torch.bool)
    allowed[order_by_numpy(data, "next")[0]] = False
    scores, lists = ranker.top(torch.tensor([[4]]), torch.tensor([1]), 60, None, allowed)
    follower = int(matrix[4].argmax())
    assert lists[0, 0] == follower and scores[0, 0] == matrix[4, follower] > 0
    places = scores[0, 1 : len(matrix) - 1]
    assert (places.diff() < 0).all() and places[0] in (-1, -2)
    assert lists[0].tolist().count(-1) == 60 - (len(matrix) - 1)
    assert (scores[0, len(matrix) - 1 :] == -torch.inf).all()


def evaluate_all(data: str, folders: Mapping[Any, str]) -> dict[str, dict[str, float]]:
    return {
        kind: evaluate(folder, data, FEW_BATCHES, force=True)["metrics"]
        for kind, folder in folders.items()
    }


@pytest.mark.slow
def test_the_number_of_ranks_changes_no_metric(ranks: Ranks, data: str, tmp_path: Path) -> None:
    folders = {kind: built(data, tmp_path, kind) for kind in KINDS}
    alone = evaluate_all(data, folders)
    popularity = evaluate_popularity(data, MEASURE)["metrics"]
    assert alone["popularity"] == pytest.approx(popularity, nan_ok=True)
    assert alone["knn_next"]["NDCG@10"] > 1.5 * popularity["NDCG@10"]
    for num_ranks in (2, 3):
        for found in ranks(num_ranks).run(evaluate_all, data, folders):
            for kind in KINDS:
                assert found[kind] == pytest.approx(alone[kind], nan_ok=True), kind


def test_a_baseline_goes_where_a_run_goes(run: str, tmp_path: Path, data: str) -> None:
    folder = built(data, tmp_path, "knn_next")
    stored = evaluate(folder, data, MEASURE)
    assert json.loads((Path(folder) / "metrics.json").read_text())["baselines"]["popularity"]
    options: dict[str, Any] = {"k": 10, "batch_size": 7}
    lists = RecommendConfig(run=folder, prepared=data, output=str(tmp_path / "lists"), **options)
    assert "sum of item-to-item scores" in recommend(lists).manifest["scores"]
    ids = Prepared.open(data).item_ids().to_pylist()
    users = pq.read_table(Path(data) / "test.parquet").to_pylist()
    rows = pq.read_table(tmp_path / "lists" / "part-00000-of-00001.parquet").to_pylist()
    hits = [
        bool({ids[item] for item in user["targets"]} & set(row["item_ids"]))
        for user, row in zip(users, rows, strict=True)
    ]
    assert np.mean(hits) == pytest.approx(stored["metrics"]["HitRate@10"])
    page = report([run, folder], tmp_path / "page.html").read_text()
    assert f"{stored['metrics']['NDCG@10']:.4f}" in page and "baseline.kind" in page


def test_the_gate_wants_what_the_baseline_reaches(run: str, data: str, tmp_path: Path) -> None:
    strong, weak = (built(data, tmp_path, kind) for kind in ("knn_next", "popularity"))
    reports = {name: str(tmp_path / f"{name}.json") for name in ("run", "other")}
    values = {
        folder: evaluate(folder, data, MEASURE)["metrics"]["NDCG@10"] for folder in (strong, weak)
    }
    ours = evaluate(run, data, MEASURE, output=reports["run"])["metrics"]["NDCG@10"]
    for folder, value in values.items():
        asked: dict[str, Any] = {"published": str(tmp_path / "none.json"), "at_least": folder}
        output = f"{tmp_path / Path(folder).name}-gate.json"
        config = GateConfig(run=run, prepared=data, metrics=reports["run"], output=output, **asked)
        verdict = gate(config)
        assert verdict.passed == (ours >= value)
        assert not gate(config).is_new
        assert verdict.passed or f"is below the baseline's {value:.4f}" in verdict.reason
    assert min(values.values()) < ours, "the run passes one of the two"
    evaluate(run, data, MeasureConfig(ks=(10,), filter_seen=False), output=reports["other"])
    config = GateConfig(run=run, prepared=data, metrics=reports["other"], output=output, **asked)
    with pytest.raises(ValueError, match="at_least must be measured as the run was, got .*ks, fil"):
        gate(config)


def test_evaluate_shows_the_baselines_of_the_data_by_the_same_protocol(
    run: str, data: str, tmp_path: Path
) -> None:
    config = BaselineConfig(prepared=data, kind="next")
    baseline(config)
    assert config.folder == Path(data) / "baselines" / "next"
    found = evaluate(str(config.folder), data, MEASURE)["metrics"]
    beside = evaluate(run, data, MEASURE, output=str(tmp_path / "a.json"))["baselines"]
    assert set(beside) == {"popularity", "next"}
    assert beside["next"]["NDCG@10"] == pytest.approx(found["NDCG@10"])
    other = MeasureConfig(ks=(5,))
    beside = evaluate(run, data, other, output=str(tmp_path / "b.json"))["baselines"]
    assert set(beside) == {"popularity"}


def test_a_baseline_is_counted_once_and_belongs_to_its_data(data: str, tmp_path: Path) -> None:
    config = BaselineConfig(prepared=data, kind="knn", output=str(tmp_path / "knn"))
    assert baseline(config).is_new and not baseline(config).is_new
    with pytest.raises(FileExistsError, match="which differs in neighbors"):
        baseline(
            BaselineConfig(prepared=data, kind="knn", output=str(tmp_path / "knn"), neighbors=9)
        )
    other = prepare_small(tmp_path / "other")
    with pytest.raises(ValueError, match="the baseline must belong to the prepared data"):
        evaluate(str(tmp_path / "knn"), other)
    with pytest.raises(ValueError, match="checkpoint must come with a run, got last"):
        evaluate(str(tmp_path / "knn"), data, checkpoint="last")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "svd"}, "kind must be one of popularity, recent, knn, next, knn_next"),
        ({"neighbors": 0}, "neighbors must be at least 1, got 0"),
        ({"kind": "recent", "neighbors": 5}, "neighbors must come with kind knn or next or knn_ne"),
        ({"kind": "next", "last_events": 5}, "last_events must come with kind knn or knn_next"),
    ],
)
def test_options_that_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BaselineConfig(prepared="data", **options)


def test_chunks_of_items_change_nothing(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pq.read_table(Path(built(data, tmp_path / "a", "knn_next")) / "neighbors.parquet")
    monkeypatch.setattr("shardrec.pipeline.prepared.neighbors._PAIRS_AT_ONCE", 50)
    path = Path(built(data, tmp_path / "b", "knn_next")) / "neighbors.parquet"
    assert pq.read_metadata(path).num_row_groups > 10
    assert pq.read_table(path).equals(whole)
