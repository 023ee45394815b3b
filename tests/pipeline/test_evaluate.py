"""Evaluation: the numbers of brute force, on any number of ranks, with the protocol beside them."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.pipeline.small_data import Running, prepare_small, small_config
from tests.ranks import Ranks
from torch import Tensor
from torch.nn.functional import normalize

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.shard import RowShard
from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.losses import CCE
from shardrec.modules.ranking import Blocks, tie_keys
from shardrec.pipeline.evaluate import evaluate, evaluate_popularity
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.model.measure import measure, open_users
from shardrec.pipeline.model.ranker import StateRanker
from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.prepared.loader import EvaluationBatches, Prepared
from shardrec.pipeline.ranks import default_group
from shardrec.pipeline.run.trained import Source
from shardrec.pipeline.train import train


def rank_by_brute_force(scores: Tensor, hidden: set[int], target: int) -> int:
    """Items that stand before the target: a higher score, or an equal one and a lower key."""
    if target in hidden:
        return len(scores)
    keys = tie_keys(torch.arange(len(scores))).tolist()
    ours = float(scores[target]), -keys[target]
    others = zip(scores.tolist(), keys, strict=True)
    return sum(
        (score, -key) > ours for item, (score, key) in enumerate(others) if item not in hidden
    )


def metrics_by_brute_force(
    data: str, score: Callable[[list[int]], Tensor], *, filter_seen: bool, min_count: int = 1
) -> dict[str, float]:
    """The metrics at 5 of (V,) scores that are a function of the history, written out by hand."""
    users = pq.read_table(Path(data) / "test.parquet").to_pylist()
    counts = Prepared.open(data).item_counts().tolist()
    keys = tie_keys(torch.arange(len(counts))).tolist()
    rare = {item for item, count in enumerate(counts) if count < min_count}
    ndcg, hits, recall, known, new, listed = [], [], [], [], [], set[int]()
    tally = Counter[str]()
    for user in users:
        targets, seen, scores = user["targets"], set(user["items"]), score(user["items"])
        hidden = rare | (seen if filter_seen else set())
        ranks = [rank_by_brute_force(scores, hidden, target) for target in targets]
        gains = [1 / math.log2(rank + 2) for rank in ranks if rank < 5]
        perfect = sum(1 / math.log2(place + 2) for place in range(min(5, len(targets))))
        ndcg.append(sum(gains) / perfect)
        hits.append(float(bool(gains)))
        recall.append(len(gains) / len(targets))
        kept = [rank < 5 for rank, item in zip(ranks, targets, strict=True) if counts[item]]
        known += [sum(kept) / len(kept)] if kept else []
        left = [rank < 5 for rank, item in zip(ranks, targets, strict=True) if not counts[item]]
        new += [sum(left) / len(left)] if left else []
        candidates = [item for item in range(len(scores)) if item not in hidden]
        listed |= set(sorted(candidates, key=lambda item: (-float(scores[item]), keys[item]))[:5])
        tally["targets"] += len(targets)
        tally["new"] += sum(counts[item] == 0 for item in targets)
        tally["repeated"] += sum(item in seen for item in targets)
    return {
        "NDCG@5": sum(ndcg) / len(users),
        "HitRate@5": sum(hits) / len(users),
        "Recall@5": sum(recall) / len(users),
        "Recall@5/known": sum(known) / len(known),
        "Recall@5/new": sum(new) / len(new),
        "Coverage@5": len(listed) / len(counts),
        "users": len(users),
        "targets": tally["targets"],
        "new_target_share": tally["new"] / tally["targets"],
        "repeated_target_share": tally["repeated"] / tally["targets"],
    }


@pytest.mark.parametrize("min_count", [0, 1, 4])
@pytest.mark.parametrize("filter_seen", [False, True], ids=["all-items", "seen-hidden"])
def test_popularity_gets_the_metrics_of_brute_force(
    data: str, filter_seen: bool, min_count: int
) -> None:
    candidates: dict[str, Any] = {"filter_seen": filter_seen, "min_count": min_count}
    found = evaluate_popularity(data, MeasureConfig(ks=(5,), **candidates))["metrics"]
    counts = Prepared.open(data).item_counts().float()
    expected = metrics_by_brute_force(data, lambda _: counts, **candidates)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert 0 < expected["repeated_target_share"] < 1
    assert 0 < expected["new_target_share"] < 1
    assert expected["targets"] > expected["users"] > 40


def measure_equal_scores(data: str, config: MeasureConfig) -> dict[str, float]:
    """The metrics of a model that gives the same score to every item, on the default group."""
    prepared, group = Prepared.open(data), default_group()
    edges = [prepared.num_items * rank // 3 for rank in range(4)]  # uneven, and 3 ranks at most
    rank, size = Communicator(group).rank, Communicator(group).size
    low, high = edges[rank], edges[rank + 1] if rank < size - 1 else prepared.num_items
    shard = RowShard(torch.zeros(high - low, 1), low, prepared.num_items, group)
    batches = open_users(prepared, "test", config, 4, group)
    scorer = lambda items, _: torch.ones(len(items), 1)  # noqa: E731
    ranker = StateRanker(scorer, shard, 4, Blocks())
    return measure(ranker, batches, config, prepared).metrics


def test_equal_scores_rank_by_a_hash_of_the_item_on_every_number_of_ranks(
    ranks: Ranks, data: str
) -> None:
    config, zeros = MeasureConfig(ks=(5,)), torch.zeros(Prepared.open(data).num_items)
    expected = metrics_by_brute_force(data, lambda _: zeros, filter_seen=True)
    alone = measure_equal_scores(data, config)
    assert {name: alone[name] for name in expected} == pytest.approx(expected)
    for num_ranks in (2, 3):
        for found in ranks(num_ranks).run(measure_equal_scores, data, config):
            assert found == pytest.approx(alone, nan_ok=True)


def test_equal_scores_do_no_better_than_chance(tmp_path: Path) -> None:
    # One item has a seventh of the events, and the lowest index.
    num_items, num_users, k = 400, 3000, 10
    generator = np.random.default_rng(0)
    share = 1 / (np.arange(num_items) + 1.0)
    bought = generator.choice(num_items, (num_users, 6), p=share / share.sum())
    columns = {"user_id": np.repeat(np.arange(num_users), 6), "item_id": bought.ravel()}
    columns["timestamp"] = np.tile(np.arange(6), num_users)
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    data = str(tmp_path / "prepared")
    options: dict[str, Any] = {"split": "leave_one_out", "threads": 1}
    prepare(PrepareConfig(events=str(tmp_path / "log.parquet"), output=data, **options))
    config = MeasureConfig(ks=(k,), filter_seen=False, min_count=0)
    hits = measure_equal_scores(data, config)["HitRate@10"]
    targets = pq.read_table(Path(data) / "test.parquet")["targets"].combine_chunks().flatten()
    share = np.bincount(targets.to_numpy(), minlength=num_items) / num_users
    # All users get the same k items, drawn by the hash: k draws from the targets' shares, without
    # replacement. Their sum has this variance; the share of hits of the users is that sum.
    variance = k * share.var() * (1 - k / num_items)
    assert abs(hits - k / num_items) < 3 * variance**0.5
    assert share[:k].sum() > k / num_items + 3 * variance**0.5, "ranked by index it would"
    popular = evaluate_popularity(data, config)["metrics"]["HitRate@10"]
    assert popular == pytest.approx(np.sort(share)[-k:].sum(), rel=0.1)


def measure_on_ranks(run: str, data: str) -> tuple[dict[str, float], dict[str, float]]:
    config = MeasureConfig(ks=(5, 10), filter_seen=True, batch_size=25, block_rows=15)
    popularity = evaluate_popularity(data, config)
    return evaluate(run, data, config, force=True)["metrics"], popularity["metrics"]


@pytest.mark.slow
def test_the_number_of_ranks_changes_no_metric(ranks: Ranks, run: str, data: str) -> None:
    alone = measure_on_ranks(run, data)
    for num_ranks in (2, 3):
        for found in ranks(num_ranks).run(measure_on_ranks, run, data):
            assert found[0] == pytest.approx(alone[0], nan_ok=True)
            assert found[1] == pytest.approx(alone[1], nan_ok=True)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_sample_is_the_first_users_at_any_number_of_ranks(data: str, world_size: int) -> None:
    stored = pq.read_table(Path(data) / "test.parquet").slice(0, 19)["targets"].to_pylist()
    found = []
    for rank in range(world_size):
        for batch in EvaluationBatches(
            Prepared.open(data),
            "test",
            batch_size=4,
            max_length=4,
            sample_users=19,
            rank=rank,
            world_size=world_size,
        ):
            found += [part.tolist() for part in batch.targets[0].split(batch.targets[1].tolist())]
    assert sorted(found) == sorted(stored)


def test_a_sample_is_said_in_the_report_and_another_is_another_report(
    data: str, tmp_path: Path
) -> None:
    output, config = str(tmp_path / "metrics.json"), MeasureConfig(ks=(5,), sample_users=19)
    assert evaluate_popularity(data, config, output=output)["metrics"]["users"] == 19
    users = pq.read_metadata(Path(data) / "test.parquet").num_rows
    said = json.loads(Path(output).read_text())["protocol"]["users"]
    assert said == f"19 of {users}, the first in the order by a hash of user and seed"
    with pytest.raises(FileExistsError, match="which differs in sample_users"):
        evaluate_popularity(data, MeasureConfig(ks=(5,)), output=output)
    every = MeasureConfig(ks=(5,), sample_users=10**6)
    assert evaluate_popularity(data, every)["metrics"]["users"] == users


def ranks_on_ranks(run: str, data: str, folder: str) -> list[list[int]]:
    """The ranks of all targets that evaluation writes, user by user."""
    size = Communicator(default_group()).size
    config = MeasureConfig(ks=(5,), batch_size=25)
    evaluate(run, data, config, output=f"{folder}/{size}.json")
    lists: list[list[int]] = pq.read_table(f"{folder}/{size}.users.parquet")["ranks"].to_pylist()
    return lists


@pytest.mark.slow
def test_the_ranks_of_all_targets_are_written_in_the_order_of_the_users(
    ranks: Ranks, run: str, data: str, tmp_path: Path
) -> None:
    alone = ranks_on_ranks(run, data, str(tmp_path))
    users = pq.read_table(Path(data) / "test.parquet").to_pylist()
    assert [len(one) for one in alone] == [len(user["targets"]) for user in users]
    hits = [any(0 <= rank < 5 for rank in one) for one in alone]
    stored = json.loads((tmp_path / "1.json").read_text())
    assert np.mean(hits) == pytest.approx(stored["metrics"]["HitRate@5"])
    for user, own in zip(users, alone, strict=True):
        for item, rank in zip(user["targets"], own, strict=True):
            assert rank == -1 or item not in user["items"]
    assert len({tuple(one) for one in alone}) > 10
    for num_ranks in (2, 3):
        for found in ranks(num_ranks).run(ranks_on_ranks, run, data, str(tmp_path)):
            assert found == alone


def test_metrics_and_protocol_are_written(run: str, data: str) -> None:
    report = evaluate(
        run, data, MeasureConfig(ks=(5,), filter_seen=True), checkpoint="last", force=True
    )
    stored = json.loads((Path(run) / "metrics.json").read_text())
    assert stored["metrics"]["NDCG@5"] == report["metrics"]["NDCG@5"] > 0
    assert stored["protocol"]["split"] == "test"
    assert stored["protocol"]["seen_items"] == "removed"
    assert stored["protocol"]["data"]["kind"] == "temporal"
    assert 0 < stored["standard_errors"]["NDCG@5"] < stored["metrics"]["NDCG@5"]
    assert stored["baselines"]["popularity"]["NDCG@5"] == pytest.approx(
        evaluate_popularity(data, MeasureConfig(ks=(5,)))["metrics"]["NDCG@5"]
    )
    assert stored["checkpoint"]["which"] == "last" and stored["checkpoint"]["step"] > 0
    assert not list(Path(run).glob(".metrics*"))


def test_a_trained_model_beats_popularity_and_validates_as_it_evaluates(
    run: str, data: str
) -> None:
    config = MeasureConfig(ks=(10,))
    best = evaluate(run, data, config, split="validation", force=True)["metrics"]["NDCG@10"]
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").open()]
    validations = [line["metrics"]["NDCG@10"] for line in lines if line["event"] == "validation"]
    assert best == pytest.approx(max(validations))
    assert best > evaluate_popularity(data, config, split="validation")["metrics"]["NDCG@10"]


@pytest.mark.slow
def test_normalised_losses_are_ranked_by_angle(data: str, tmp_path: Path) -> None:
    # Rows that start so far apart in length that the longest would win by inner products.
    catalog = CatalogConfig(optimizer="adam", learning_rate=1e-2, init_std=1.0)
    loss = CCE(normalize=True, temperature=0.1)
    config = small_config(data, tmp_path / "run", loss=loss, catalog=catalog)
    train(config)
    prepared = Prepared.open(data)
    model = Source.find(config.output, prepared, "best").load(prepared)
    table = model.catalog.shard.rows.detach()

    def inner_products(history: list[int], rows: Tensor = table) -> Tensor:
        last = torch.tensor([history[-config.encoder.max_length :]])
        with torch.no_grad():
            return (model.last_states(last, torch.tensor([last.shape[1]])) @ rows.T)[0]

    def cosines(history: list[int]) -> Tensor:
        return inner_products(history, normalize(table))

    found = evaluate(config.output, data, MeasureConfig(ks=(5,)))["metrics"]
    expected = metrics_by_brute_force(data, cosines, filter_seen=True)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    others = metrics_by_brute_force(data, inner_products, filter_seen=True)
    assert others["NDCG@5"] != pytest.approx(expected["NDCG@5"], rel=0.01)


def test_a_run_of_other_data_is_refused(run: str, tmp_path: Path) -> None:
    other = prepare_small(tmp_path / "other")
    with pytest.raises(ValueError, match="the run must belong to the prepared data"):
        evaluate(run, other)


def test_a_folder_that_is_no_run_is_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run must be a folder that train wrote"):
        evaluate(str(tmp_path), data)


def test_a_run_without_checkpoint_is_refused(run: str, data: str, tmp_path: Path) -> None:
    for name in ("run.json", "config.json"):
        (tmp_path / name).write_text((Path(run) / name).read_text())
    with pytest.raises(FileNotFoundError, match="must hold a complete checkpoint"):
        evaluate(str(tmp_path), data)


def test_run_of_a_user_supplied_encoder_needs_that_encoder(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run")
    train(config, encoder=Running())
    with pytest.raises(ValueError, match="encoder must be given for a run that trained Running"):
        evaluate(config.output, data)
    found = evaluate(config.output, data, split="validation", encoder=Running())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert found["metrics"]["NDCG@10"] == pytest.approx(lines[-1]["best_metrics"]["NDCG@10"])


def test_bad_measures_are_refused() -> None:
    options: list[tuple[dict[str, Any], str]] = [
        ({"ks": ()}, "ks must be list lengths"),
        ({"ks": (0, 5)}, "ks must be list lengths"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"sample_users": 0}, "sample_users must be at least 1"),
        ({"min_count": -1}, "min_count must be at least 0"),
    ]
    for changes, message in options:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(MeasureConfig(), **changes)


def test_lists_may_be_longer_than_the_catalog(run: str, data: str) -> None:
    config = MeasureConfig(ks=(100,), filter_seen=False, min_count=0)
    found = evaluate(run, data, config, force=True)["metrics"]
    assert found["Recall@100"] == 1.0
    with pytest.raises(ValueError, match="ks must be list lengths of at most 10,000 for this cat"):
        evaluate(run, data, MeasureConfig(ks=(10, 10**9)), force=True)


def test_evaluate_is_idempotent_and_refuses_another_report(
    run: str, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, output = MeasureConfig(ks=(5,)), tmp_path / "deep" / "metrics.json"
    first = evaluate(run, data, config, output=str(output))
    written = output.stat().st_mtime_ns
    assert str(evaluate(run, data, config, output=str(output))) == str(first)
    assert "nothing to do" in caplog.text and output.stat().st_mtime_ns == written
    with pytest.raises(FileExistsError, match="which differs in filter_seen"):
        changed = dataclasses.replace(config, filter_seen=False)
        evaluate(run, data, changed, output=str(output))
    evaluate(run, data, config, output=str(output), force=True)
    assert output.stat().st_mtime_ns > written
    output.write_text("[]")
    with pytest.raises(FileExistsError, match="which is another file"):
        evaluate(run, data, config, output=str(output))
