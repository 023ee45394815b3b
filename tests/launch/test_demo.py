"""The demo, small: on a generated log, and on a log with other column names."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from shardrec.launch import cli
from shardrec.launch.demo import LOSSES, MARK, METRICS, DemoConfig, run_demo, start_folder
from shardrec.pipeline.synth import SynthConfig, generate


@pytest.mark.slow
def test_every_loss_trains_on_workers_and_the_table_compares_them(tmp_path: Path) -> None:
    log = tmp_path / "log.parquet"
    generate(SynthConfig(users=300, items=203, events=3_000, clusters=16, report_users=50), log)
    renamed = pq.read_table(log).rename_columns(["customer", "article", "moment"])
    pq.write_table(renamed, log)
    config = DemoConfig(
        events=str(log),
        user_column="customer",
        item_column="article",
        time_column="moment",
        output=str(tmp_path / "demo"),
        steps=3,
    )
    screen = io.StringIO()
    rows = run_demo(config, Console(file=screen, width=120))
    assert [row.name for row in rows] == ["popularity", *LOSSES]
    for row in rows[1:]:
        assert row.seconds_per_step is not None and row.seconds_per_step > 0
        assert row.memory_bytes is not None and row.memory_bytes > 0
        assert all(0 <= row.metrics[name] <= 1 for name in METRICS)
    shown = screen.getvalue()
    assert [name for name in ("popularity", *LOSSES, *METRICS) if name not in shown] == []
    assert "stopped at step 3" in shown, "the workers' news reach the screen"
    assert "shardrec prepare --events path/to/log.parquet" in shown
    for loss in LOSSES:
        assert (tmp_path / "demo" / "runs" / loss / "metrics.json").is_file()


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="output must be new or an earlier demo"):
        start_folder(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    start_folder(tmp_path / "demo")
    (tmp_path / "demo" / "events.parquet").touch()
    start_folder(tmp_path / "demo")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [MARK]


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ("nowhere.parquet", "nowhere.parquet"),
        ("demo/events.parquet", "events must lie outside the folder that is replaced"),
    ],
)
def test_a_bad_log_is_refused_before_an_earlier_demo_is_replaced(
    events: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_folder(tmp_path / "demo")
    (tmp_path / "demo" / "events.parquet").write_text("precious")
    output = str(tmp_path / "demo")
    assert cli.main(["demo", "--events", str(tmp_path / events), "--output", output]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert (tmp_path / "demo" / "events.parquet").read_text() == "precious"
