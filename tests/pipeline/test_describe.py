"""describe: the numbers of a few lines of plain Python, and an option for each warning."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.pipeline.event_logs import make_events, write_log
from tests.pipeline.logs_as_written import columns, prepared, write

from shardrec.launch.cli import main
from shardrec.pipeline.describe import DescribeConfig, describe


def test_the_numbers_are_those_of_plain_python(tmp_path: Path) -> None:
    events = make_events()
    facts = describe(write_log(tmp_path / "log.parquet", events)).facts
    unique = list(dict.fromkeys(events))
    of_users = sorted(Counter(user for user, _, _ in unique).values())
    of_items = sorted(Counter(item for _, item, _ in unique).values(), reverse=True)
    ties = Counter((user, time) for user, _, time in unique)
    assert (facts["events"], facts["users"], facts["items"]) == (
        len(events),
        len(of_users),
        len(of_items),
    )
    lengths = facts["events_of_a_user"]
    assert [lengths["least"], lengths["most"]] == [of_users[0], of_users[-1]]
    assert lengths["median"] == of_users[(len(of_users) - 1) // 2]
    half = sum(of_items[: len(of_items) // 2]) / len(unique)
    assert facts["share_of_the_most_popular_items"]["50 %"] == pytest.approx(half, abs=1e-4)
    shares = facts["shares"]
    assert shares["duplicates"] == pytest.approx(1 - len(unique) / len(events), abs=1e-4)
    tied = sum(count for count in ties.values() if count > 1)
    assert shares["tied_in_time"] == pytest.approx(tied / len(events), abs=1e-4)


@pytest.mark.parametrize("split", ["temporal", "leave_one_out"])
def test_a_split_leaves_what_prepare_writes(tmp_path: Path, split: str) -> None:
    log = write_log(tmp_path / "log.parquet", make_events())
    found = describe(log).facts["splits"][split]
    counts = prepared(log, tmp_path / "out", split=split, validation="users").counts
    assert found == {
        "training_users": counts["train_sequences"],
        "training_events": counts["train_events"],
        "validation_users": counts["validation_users"],
        "test_users": counts["test_users"],
        "items_without_training_events": counts["items_without_training_events"],
    }


WARNED: dict[str, tuple[dict[str, Any], str]] = {
    "ties": ({"timestamp": np.arange(180) % 6 // 3}, "--ties shuffle"),
    "repeats": ({"item_id": np.repeat(columns()["item_id"][::3], 3)}, "--drop-repeats"),
    "sessions": ({"user_id": np.arange(180)}, "another --user-column"),
    "one time": ({"timestamp": np.zeros(180, int)}, "--split leave_one_out"),
    "rare items": ({"item_id": np.arange(180)}, "--min-item-events 2"),
    "a bot": ({"user_id": np.append(np.arange(50), np.full(130, 99))}, "perhaps a bot"),
}


@pytest.mark.parametrize("case", WARNED)
def test_a_warning_names_the_option_that_answers_it(tmp_path: Path, case: str) -> None:
    changed, words = WARNED[case]
    found = describe(write(tmp_path / "log.parquet", **changed))
    assert any(words in warning for warning in found.warnings), found.warnings
    plain = describe(write(tmp_path / "plain.parquet"))
    assert not plain.warnings and words not in plain.as_text()


def test_times_are_shown_as_dates_where_they_are_or_look_like_them(tmp_path: Path) -> None:
    seconds = columns()["timestamp"] + 1_600_000_000
    given = {"s": seconds, "ms": seconds * 1000, "ns": seconds * 10**9}
    for unit, times in given.items():
        shown = describe(write(tmp_path / "log.parquet", timestamp=times)).facts["times"]
        assert (shown["looks_like"], shown["first_as_date"]) == (unit, "2020-09-13T12:26:40Z")
    times = pa.array(seconds, pa.timestamp("s", "Europe/Berlin"))
    shown = describe(write(tmp_path / "log.parquet", timestamp=times)).facts["times"]
    assert shown["first"] == "2020-09-13T12:26:40Z"


def test_columns_are_guessed_by_their_names_or_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = columns()
    names = {"Kunden-Nr": rows["user_id"], "Artikel": rows["item_id"], "Preis": rows["item_id"]}
    log = str(tmp_path / "day=1" / "log.parquet")
    Path(log).parent.mkdir()
    pq.write_table(pa.table(names | {"Event Time": rows["timestamp"]}), log)
    assert main(["describe", log, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["columns"] == {
        "Kunden-Nr": "int64, user",
        "Artikel": "int64, item",
        "Preis": "int64, not read",
        "Event Time": "int64, time",
        "day": "int64, not read",
    }
    assert main(["describe", log, "--time-column", "day"]) == 0
    assert "--split leave_one_out" in capsys.readouterr().out
    pq.write_table(pa.table({"a": [1], "b": [2]}), log)
    assert main(["describe", log]) == 2
    assert "--user-column must be set where no column has a usual name, got a, b" in (
        capsys.readouterr().err
    )


def test_nulls_are_counted_where_prepare_would_refuse_them(tmp_path: Path) -> None:
    items = pa.array([None, 1, None, *columns()["item_id"][3:].tolist()])
    found = describe(write(tmp_path / "log.parquet", item_id=items))
    assert found.facts["nulls"] == {"user_id": 0, "item_id": 2, "timestamp": 0}
    assert "2 values of 'item_id' are null" in found.as_text()
    assert describe(write(tmp_path / "plain.parquet")).facts["nulls"]["item_id"] == 0


def test_lists_and_event_types_are_described_as_they_are_prepared(tmp_path: Path) -> None:
    lists = {"user": [1, 2], "item": [[1, 2, 3], [4, 5]], "time": [[1, 2, 3], [1, 2]]}
    pq.write_table(pa.table(lists), tmp_path / "lists.parquet")
    found = describe(str(tmp_path / "lists.parquet"), DescribeConfig(layout="sequences")).facts
    assert (found["events"], found["users"], found["items"]) == (5, 2, 5)
    log = write(tmp_path / "log.parquet", kind=["buy", "view"] * 90)
    config = DescribeConfig(event_column="kind", event_types=("buy",))
    assert describe(log, config).facts["events_other_type"] == 90


def test_the_page_is_one_file_without_scripts_and_the_same_again(tmp_path: Path) -> None:
    log, page = write_log(tmp_path / "<log>.parquet", make_events()), tmp_path / "page.html"
    assert main(["describe", log, "--html", str(page)]) == 0
    first = page.read_text()
    assert first.count("<figure>") == 4 and "&lt;log&gt;" in first and "<log>" not in first
    assert "<script" not in first and "http" not in first.replace("http-equiv", "")
    assert main(["describe", log, "--html", str(page)]) == 0
    assert page.read_text() == first
    other = tmp_path / "other.html"
    other.write_text("mine")
    assert main(["describe", log, "--html", str(other)]) == 2
    assert other.read_text() == "mine"


def test_the_curves_are_those_of_plain_python(tmp_path: Path) -> None:
    events = make_events()
    curves = describe(write_log(tmp_path / "log.parquet", events)).curves
    unique = list(dict.fromkeys(events))
    of_items = sorted(Counter(item for _, item, _ in unique).values(), reverse=True)
    assert curves["popularity"][-1] == pytest.approx(100)
    half = -(-50 * len(of_items) // 100)
    assert curves["popularity"][49] == pytest.approx(
        100 * sum(of_items[:half]) / len(unique), abs=1e-3
    )
    assert curves["item_events"][49] == of_items[half - 1]
    assert sum(curves["events_over_time"]) == pytest.approx(100, abs=1e-2)
    first, last = min(e[2] for e in unique), max(e[2] for e in unique)
    width = -(-(last - first + 1) // 50)
    early = sum((time - first) // width == 0 for _, _, time in unique)
    assert curves["events_over_time"][0] == pytest.approx(100 * early / len(unique), abs=1e-3)
