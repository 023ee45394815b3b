"""Recommendations: the lists of brute force, on any number of ranks, for histories as they come."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.pipeline.small_data import NUM_ITEMS, prepare_small, small_config
from tests.ranks import Ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardrec.launch.cli import main
from shardrec.modules.encoder import EncoderConfig
from shardrec.modules.losses import CCE
from shardrec.modules.ranking import by_popularity, tie_keys
from shardrec.pipeline.baseline import BaselineConfig, baseline
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.prepared.item_ids import ItemIds
from shardrec.pipeline.prepared.loader import Prepared
from shardrec.pipeline.recommend import RecommendConfig, recommend
from shardrec.pipeline.run.config import LimitConfig
from shardrec.pipeline.run.trained import Source
from shardrec.pipeline.train import train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

UNKNOWN = 10_000


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> str:
    """String users; histories that are empty, null, unknown, repeated and longer than the model."""
    generator = torch.Generator().manual_seed(3)
    lists: list[list[int | None] | None] = [[], None, [UNKNOWN], [4, UNKNOWN, None, 4, 7]]
    for length in range(1, 38):
        lists.append(torch.randint(NUM_ITEMS, (length % 17,), generator=generator).tolist())
    users = [f"user {number % 30}" for number in range(len(lists))]
    path = tmp_path_factory.mktemp("histories") / "histories.parquet"
    pq.write_table(pa.table({"who": users, "what": lists}), path, row_group_size=9)
    return str(path)


def configured(run: str, data: str, output: Path | str, **options: Any) -> RecommendConfig:
    small = {"k": 5, "batch_size": 4, "block_rows": 7}
    return RecommendConfig(run=run, prepared=data, output=str(output), **(small | options))


def of_file(histories: str, **options: Any) -> dict[str, Any]:
    return {"histories": histories, "user_column": "who", "items_column": "what"} | options


def rows_of(output: Path | str) -> list[dict[str, Any]]:
    parts = sorted(Path(output).glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def by_brute_force(
    run: str, data: str, histories: str, k: int, hidden: set[int], filter_seen: bool
) -> list[list[int]]:
    """Scores of the whole catalog, one user at a time; the ids of the best items."""
    prepared = Prepared.open(data)
    source = Source.find(run, prepared, "best")
    model, ids = source.load(prepared), prepared.item_ids().to_pylist()
    keys = tie_keys(torch.arange(len(ids))).tolist()
    result: list[list[int]] = []
    for row in pq.read_table(histories).to_pylist():
        known = [ids.index(item) for item in row["what"] or [] if item in ids]
        if not known:
            popular = by_popularity(prepared.item_counts()).tolist()
            result.append([ids[i] for i in popular if ids[i] not in hidden][:k])
            continue
        last = torch.tensor([known[-source.config.encoder.max_length :]])
        with torch.no_grad():
            state = model.last_states(last, torch.tensor([last.shape[1]]))
        scores = (state @ model.scored_shard().rows.T)[0].tolist()
        left = [i for i in range(len(ids)) if ids[i] not in hidden]
        left = [i for i in left if not filter_seen or i not in known]
        result.append([ids[i] for i in sorted(left, key=lambda i: (-scores[i], keys[i]))[:k]])
    return result


@pytest.mark.parametrize("size", [1, 2, 3])
def test_vectors_are_the_states_whose_products_are_the_scores(
    ranks: Ranks, run: str, data: str, histories: str, tmp_path: Path, size: int
) -> None:
    config = configured(run, data, tmp_path / "out", **of_file(histories, vectors=True))
    ranks(size).run(recommend, config)
    plain = configured(run, data, tmp_path / "plain", **of_file(histories))
    recommend(plain)
    prepared = Prepared.open(data)
    rows, ids = Source.find(run, prepared, "best").load(prepared), prepared.item_ids().to_pylist()
    table = rows.scored_shard().rows
    found = rows_of(config.output)
    assert sum(row["vector"] is None for row in found) >= 3, "users without history have none"
    for row, expected in zip(found, rows_of(plain.output), strict=True):
        vector = row.pop("vector")
        assert row["item_ids"] == expected["item_ids"]
        if vector is not None:
            places = [ids.index(item) for item in row["item_ids"]]
            scores = (table[places] @ torch.tensor(vector)).tolist()
            assert scores == pytest.approx(row["scores"], rel=1e-5, abs=1e-6)
        else:
            assert row["scores"] is None


def test_a_baseline_has_no_vectors(data: str, histories: str, tmp_path: Path) -> None:
    baseline(BaselineConfig(prepared=data, output=str(tmp_path / "knn"), kind="knn"))
    config = configured(
        str(tmp_path / "knn"), data, tmp_path / "out", **of_file(histories, vectors=True)
    )
    with pytest.raises(ValueError, match="vectors must be false for a baseline"):
        recommend(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("filter_seen", [True, False], ids=["seen-hidden", "all-items"])
def test_lists_are_those_of_brute_force(
    run: str, data: str, histories: str, tmp_path: Path, filter_seen: bool
) -> None:
    done = recommend(
        configured(run, data, tmp_path / "out", **of_file(histories, filter_seen=filter_seen))
    )
    rows = rows_of(tmp_path / "out")
    items = pq.read_table(Path(data) / "items.parquet").to_pylist()
    untrained = {row["item_id"] for row in items if not row["count"]}
    expected = by_brute_force(run, data, histories, 5, untrained, filter_seen)
    assert [row["item_ids"] for row in rows] == expected
    assert [row["user_id"] for row in rows] == [
        row["who"] for row in pq.read_table(histories).to_pylist()
    ]
    scored = [row for row in rows if row["scores"] is not None]
    for row in scored:
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert len(row["scores"]) == len(row["item_ids"])
    counts = done.manifest["counts"]
    assert counts["users"] == len(rows) == 41
    assert counts["users_without_history"] == len(rows) - len(scored) == 5
    assert counts["unknown_items"] == 3  # two unknown ids and a null
    assert counts["untrained_items"] == len(untrained) > 0


@pytest.mark.parametrize("name", ["test.parquet", "validation.parquet", "train"])
def test_sequences_of_a_prepared_folder_are_no_histories(
    run: str, data: str, tmp_path: Path, name: str
) -> None:
    config = configured(run, data, tmp_path / "out", histories=f"{data}/{name}")
    with pytest.raises(ValueError, match="histories must hold item ids of the log, got .*indices"):
        recommend(config)


@pytest.mark.parametrize(("known", "is_warned"), [(9, False), (8, True)])
def test_many_unknown_items_are_warned_of(
    run: str,
    data: str,
    tmp_path: Path,
    known: int,
    is_warned: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (item, *_) = pq.read_table(f"{data}/items.parquet")["item_id"].to_pylist()
    users = {"user_id": [1], "items": [[item] * known + [10**9] * (10 - known)]}
    pq.write_table(pa.table(users), tmp_path / "histories.parquet")
    histories = str(tmp_path / "histories.parquet")
    recommend(configured(run, data, tmp_path / "out", histories=histories))
    said = "20 % of the items in the histories are not in the catalog (2 of 10)" in caplog.text
    assert said == is_warned


def test_an_event_log_gives_the_lists_of_its_histories(
    ranks: Ranks, run: str, data: str, tmp_path: Path
) -> None:
    (*items,) = pq.read_table(f"{data}/items.parquet")["item_id"].to_pylist()
    generator = np.random.default_rng(3)
    events = [
        (f"u{user}", int(generator.choice([*items, 10**9])), int(generator.integers(10**6)))
        for user in range(30)
        for _ in range(1 + user % 5)
    ]
    names = ("who", "what", "when")
    columns = dict(zip(names, zip(*events, strict=True), strict=True))
    pq.write_table(pa.table({name: list(one) for name, one in columns.items()}), tmp_path / "log")
    by_hand: dict[str, list[int]] = {}
    for user, item, _ in sorted(events, key=lambda event: event[2]):
        by_hand.setdefault(user, []).append(item)
    users = {"user_id": list(by_hand), "items": list(by_hand.values())}
    pq.write_table(pa.table(users), tmp_path / "users.parquet")
    wanted = configured(run, data, tmp_path / "of-lists", histories=str(tmp_path / "users.parquet"))
    recommend(wanted)
    named = dict(zip(("user_column", "item_column", "time_column"), names, strict=True))
    of_log = {"events": str(tmp_path / "log"), **named}
    for num_ranks in (1, 2):
        output = tmp_path / f"of-log-{num_ranks}"
        ranks(num_ranks).run(recommend_on_ranks, configured(run, data, output, **of_log))
        found, expected = (
            sorted(rows_of(folder), key=lambda row: row["user_id"])
            for folder in (output, tmp_path / "of-lists")
        )
        assert found == expected and len(found) == 30
    again = configured(run, data, tmp_path / "of-log-2", **of_log)
    assert not recommend(again).is_new
    with pytest.raises(ValueError, match="histories must come without events"):
        configured(run, data, tmp_path / "x", histories="a", events="b")


def recommend_on_ranks(config: RecommendConfig) -> dict[str, Any]:
    return recommend(config).manifest


def test_the_number_of_ranks_changes_no_list(
    ranks: Ranks, run: str, data: str, histories: str, tmp_path: Path
) -> None:
    alone = recommend(configured(run, data, tmp_path / "1", **of_file(histories)))
    for num_ranks in (2, 3):
        output = tmp_path / str(num_ranks)
        config = configured(run, data, output, **of_file(histories))
        for manifest in ranks(num_ranks).run(recommend_on_ranks, config):
            assert manifest["counts"] == alone.manifest["counts"]
            assert len(manifest["files"]) == num_ranks
        for row, other in zip(rows_of(output), rows_of(tmp_path / "1"), strict=True):
            assert (row["user_id"], row["item_ids"]) == (other["user_id"], other["item_ids"])
            assert row["scores"] == pytest.approx(other["scores"], abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]


class LargestTensor(TorchDispatchMode):
    """Notes the shape of the largest tensor, of any type, that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = torch.Size()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.numel() > self.shape.numel():
                self.shape = value.shape
        return result


def test_memory_is_bounded_by_a_batch_times_a_block_of_rows(tmp_path: Path) -> None:
    """Neither users x items nor a batch x items exists, and all else is smaller than a block."""
    num_users, num_items, batch_size, block_rows = 8000, 4096, 128, 1024
    events = np.arange(2 * num_items)
    log = {"user_id": events // 8, "item_id": events % num_items, "timestamp": events}
    pq.write_table(pa.table(log), tmp_path / "large.parquet")
    data = prepare_small(tmp_path, events=str(tmp_path / "large.parquet"))
    narrow = EncoderConfig(width=4, num_heads=1, max_length=8)
    train(small_config(data, tmp_path / "run", encoder=narrow, limits=LimitConfig(max_steps=1)))
    lists = [[user % num_items, 3 * user % num_items] for user in range(num_users)]
    users = {"who": list(range(num_users)), "what": lists}
    pq.write_table(pa.table(users), tmp_path / "h.parquet", row_group_size=1000)
    sizes = of_file(
        str(tmp_path / "h.parquet"), batch_size=batch_size, block_rows=block_rows, min_count=0
    )
    with LargestTensor() as largest:
        recommend(configured(str(tmp_path / "run"), data, tmp_path / "out", **sizes))
    assert len(rows_of(tmp_path / "out")) == num_users
    assert largest.shape.numel() == batch_size * block_rows, largest.shape


@pytest.mark.parametrize("options", [{}, {"filter_seen": False, "min_count": 0}], ids=str)
def test_prepared_users_get_the_lists_that_evaluation_judges(
    run: str, data: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    done = recommend(configured(run, data, tmp_path / "out", **options))
    targets = {
        row["user_id"]: set(row["targets"])
        for row in pq.read_table(Path(data) / "test.parquet").to_pylist()
    }
    catalog = ItemIds(Prepared.open(data).item_ids())
    hits = [
        bool(targets[row["user_id"]] & set(catalog.items(pa.array(row["item_ids"])).tolist()))
        for row in rows_of(tmp_path / "out")
    ]
    report = str(tmp_path / "metrics.json")
    judged = evaluate(run, data, MeasureConfig(ks=(5,), **options), output=report)
    assert sum(hits) / len(hits) == pytest.approx(judged["metrics"]["HitRate@5"])
    assert done.manifest["protocol"].items() <= judged["protocol"].items()


def test_allow_and_deny_lists_restrict_the_candidates(
    run: str, data: str, histories: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"item_id": [1, 2, 3, 4, 5, UNKNOWN]}), tmp_path / "allow.parquet")
    pq.write_table(pa.table({"item_id": [2, UNKNOWN, UNKNOWN + 1]}), tmp_path / "deny.parquet")
    lists = {"allow": str(tmp_path / "allow.parquet"), "deny": str(tmp_path / "deny.parquet")}
    done = recommend(configured(run, data, tmp_path / "out", **of_file(histories), **lists))
    named = {item for row in rows_of(tmp_path / "out") for item in row["item_ids"]}
    assert named == {1, 3, 4, 5}
    assert done.manifest["counts"]["candidates"] == 4
    assert done.manifest["counts"]["allow_unknown_items"] == 1
    assert done.manifest["counts"]["deny_unknown_items"] == 2
    assert done.manifest["counts"]["short_lists"] == 41
    only = {"allow": str(tmp_path / "deny.parquet"), "deny": str(tmp_path / "deny.parquet")}
    with pytest.raises(ValueError, match="must leave at least one item"):
        recommend(configured(run, data, tmp_path / "none", **of_file(histories), **only))


def test_a_unit_length_loss_is_ranked_by_angle(data: str, histories: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", loss=CCE(normalize=True, temperature=0.1))
    train(config)
    options = of_file(histories, min_count=0)
    done = recommend(configured(config.output, data, tmp_path / "out", **options))
    expected = by_brute_force(config.output, data, histories, 5, set(), True)
    assert [row["item_ids"] for row in rows_of(tmp_path / "out")] == expected
    assert done.manifest["scores"] == "cosine"


def test_recommend_is_idempotent(run: str, data: str, histories: str, tmp_path: Path) -> None:
    config = configured(run, data, tmp_path / "out", **of_file(histories))
    first = recommend(config)
    written = (tmp_path / "out" / "_manifest.json").stat().st_mtime_ns
    again = recommend(config)
    assert (first.is_new, again.is_new) == (True, False)
    assert again.manifest == json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert (tmp_path / "out" / "_manifest.json").stat().st_mtime_ns == written
    assert pq.read_table(tmp_path / "out").num_rows == len(rows_of(tmp_path / "out"))
    older = (tmp_path / "out" / "_manifest.json").rename(tmp_path / "out" / "manifest.json")
    assert not recommend(config).is_new
    older.rename(tmp_path / "out" / "_manifest.json")
    more = of_file(histories, k=6)
    with pytest.raises(FileExistsError, match="other input or options"):
        recommend(configured(run, data, tmp_path / "out", **more))
    assert recommend(configured(run, data, tmp_path / "out", **more, force=True)).is_new
    assert len(rows_of(tmp_path / "out")[4]["item_ids"]) == 6


def test_recommend_refuses_a_folder_with_other_files(run: str, data: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(FileExistsError, match="holds other files"):
            recommend(configured(run, data, tmp_path / "out", force=force))
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def damaged(histories: str, path: Path) -> str:
    """A copy whose later row groups cannot be decoded."""
    content = bytearray(Path(histories).read_bytes())
    start = pq.read_metadata(histories).row_group(3).column(0).data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    return str(path)


def fail_on_ranks(config: RecommendConfig) -> str:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        recommend(config)
    return str(caught.value)


def test_damaged_histories_stop_all_ranks_and_leave_nothing(
    ranks: Ranks, run: str, data: str, histories: str, tmp_path: Path
) -> None:
    broken = damaged(histories, tmp_path / "broken.parquet")
    config = configured(run, data, tmp_path / "out", **of_file(broken))
    messages = ranks(2).run(fail_on_ranks, config)
    assert any("row group 3" in message for message in messages), messages
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["broken.parquet"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"who": [1]}, "column must be a known name, got 'what'"),
        ({"who": [1], "what": [3]}, "must be a list of int64 ids"),
        ({"who": [1], "what": [["3"]]}, "must be a list of int64 ids"),
        ({"who": [1.5], "what": [[3]]}, "'who' must fit into int64 as whole numbers"),
    ],
    ids=["no-items", "no-lists", "other-ids", "user-type"],
)
def test_histories_that_do_not_fit_are_refused(
    run: str, data: str, tmp_path: Path, table: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(table), tmp_path / "h.parquet")
    with pytest.raises(ValueError, match=message):
        recommend(configured(run, data, tmp_path / "out", **of_file(str(tmp_path / "h.parquet"))))


def test_user_ids_keep_their_type(run: str, data: str, tmp_path: Path) -> None:
    users = pa.array([7, 2], pa.uint16())
    pq.write_table(pa.table({"who": users, "what": [[1], [2]]}), tmp_path / "h.parquet")
    recommend(configured(run, data, tmp_path / "out", **of_file(str(tmp_path / "h.parquet"))))
    schema = pq.read_schema(next((tmp_path / "out").glob("part-*")))
    assert schema.field("user_id").type == pa.uint16()
    assert schema.field("item_ids").type.value_type == pa.int64()


def test_string_ids_are_found_and_versioned() -> None:
    catalog = ItemIds(pa.array(["b", "a", "ü"]))
    asked = pa.array(["ü", None, "x", "b", "b"]).dictionary_encode()
    assert catalog.items(asked).tolist() == [2, -1, -1, 0, 0]
    assert catalog.items(pa.array([], pa.string())).tolist() == []
    assert catalog.version == ItemIds(pa.array(["b", "a", "ü"], pa.large_string())).version
    assert catalog.version != ItemIds(pa.array(["ba", "", "ü"])).version
    assert ItemIds(pa.array([1, 2])).version != ItemIds(pa.array([2, 1])).version
    with pytest.raises(ValueError, match="item ids must be string as in the catalog"):
        catalog.items(pa.array([1]))


def test_command_reports_skipped_items(
    run: str, data: str, histories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recommend", "--run", run, "--prepared", data, "--output", str(tmp_path / "out")]
    words += ["--histories", histories, "--user-column", "who", "--items-column", "what"]
    assert main([*words, "--k", "3"]) == 0
    assert "unknown items                                         3\n" in capsys.readouterr().out
    assert main([*words, "--k", "3"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*words, "--k", "0"]) == 2
    assert "k must be at least 1, got 0" in capsys.readouterr().err
