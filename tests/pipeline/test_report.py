"""Reports: one page that says what the runs say, and needs nothing from outside."""

import dataclasses
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.pipeline.small_data import prepare_small, small_config

from shardrec.launch.cli import main
from shardrec.modules.losses import CCEMinus
from shardrec.pipeline.config import to_json
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.outputs.files import BESIDE
from shardrec.pipeline.report import report
from shardrec.pipeline.report.curves import Line, place_labels, thin
from shardrec.pipeline.report.records import read_runs
from shardrec.pipeline.run.callbacks import EndReport, JsonLines, StepReport, ValidationReport
from shardrec.pipeline.train import train

HOSTILE = """<img src=x onerror=alert(1)>&"'$x^2$ {{ 7 * 7 }}\N{ESCAPE}"""
PANELS = ("validation", "loss", "gradient", "throughput", "memory", "padding")
METRICS = {
    "NDCG@10": 0.1234,
    "Recall@10": 0.25,
    "Coverage@10": 0.5,
    "Recall@10/head": 0.4,
    "Recall@10/torso": 0.2,
    "Recall@10/tail": None,
    "users": 1234,
}


class Page(HTMLParser):
    """Tags with their attributes, ids, and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, attribute: str) -> list[str]:
        found = (attributes.get(attribute) for _, attributes in self.tags)
        return [value for value in found if value is not None]


def outside(html: str) -> list[str]:
    """Whatever would make a browser ask for something, or run something."""
    page = Page(html)
    found = [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object")]
    found += [v for name in ("src", "srcset", "data", "action") for v in page.values(name)]
    found += [value for value in page.values("href") if not value.startswith("#")]
    found += [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    return found + re.findall(r"https?:|//[a-z]|@import|url\((?!#)", html)


def play(folder: Path, steps: int, *, seed: int = 0, ends: bool = True, **options: Any) -> Path:
    """A run folder as train leaves it, without the training; made-up numbers."""
    folder.mkdir(parents=True)
    config = small_config("data", folder, **options)
    details = {
        "data": {"fingerprint": "f00d", "num_items": 53},
        "encoder": "shardrec",
        "versions": {"shardrec": "0.1.0", "torch": "2.13.0"},
    }
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    (folder / "run.json").write_text(json.dumps(details))
    log, generator = JsonLines(folder / "metrics.jsonl"), np.random.default_rng(seed)
    for step in range(1, steps + 1):
        log.on_step(step_report(step, float(3 / math.sqrt(step) + 0.1 * generator.random())))
        if step % max(1, steps // 5) == 0:
            log.on_validation(validation_report(step, 0.2 * step / steps))
    if ends:
        log.on_end(END)
    return folder


def step_report(step: int, loss: float) -> StepReport:
    return StepReport(
        step=step,
        epoch=step / 10,
        loss=loss,
        learning_rate=1e-3,
        gradient_norm=2 * loss,
        positions=900 + step % 7,
        padding_share=0.25,
        seconds=0.01,
        skipped=False,
        num_skipped=0,
        memory_bytes=2**29 + 2**18 * min(step, 400),
    )


def validation_report(step: int, value: float) -> ValidationReport:
    return ValidationReport(
        step=step,
        epoch=step / 10,
        metric="NDCG@10",
        metrics={"NDCG@10": value},
        improved=True,
        seconds=0.1,
    )


END = EndReport(
    output="run",
    reason="max_steps reached",
    step=10,
    epoch=1.0,
    seconds=200.0,
    seconds_per_step=0.0125,
    positions_per_second=90_000.0,
    padding_share=0.25,
    memory_bytes=2**29,
    num_skipped=0,
    best_step=10,
    best_metrics={"NDCG@10": 0.2},
)


def judge(
    folder: Path,
    metrics: dict[str, float | None],
    seen: str = "not removed",
    baselines: dict[str, dict[str, float]] | None = None,
) -> None:
    """What evaluate writes into a run."""
    written = {
        "baselines": baselines or {},
        "metrics": metrics,
        "protocol": {"split": "test", "seen_items": seen},
        "checkpoint": {"which": "best", "folder": "step-10", "step": 10},
    }
    (folder / "metrics.json").write_text(json.dumps(written))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two short real runs, the first one evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    data = prepare_small(folder / "data", split="temporal", test_quantile=0.6, targets="all")
    configs = [
        small_config(data, folder / "first", log_every=1),
        small_config(data, folder / "second", log_every=1, loss=CCEMinus(num_negatives=8)),
    ]
    for config in configs:
        train(config)
    evaluate(configs[0].output, data)
    return [config.output for config in configs]


@pytest.mark.slow
def test_the_command_writes_a_page_about_real_runs(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pages" / "report.html"
    assert main(["report", *trained, "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    html = output.read_text()
    assert outside(html) == []
    text = Page(html).text
    metrics = json.loads((Path(trained[0]) / "metrics.json").read_text())["metrics"]
    for name in ("NDCG@10", "Recall@10", "Recall@10/head", "Recall@10/torso", "MRR@20"):
        assert f"{metrics[name]:.4f}" in text, name
    lines = [json.loads(line) for line in (Path(trained[1]) / "metrics.jsonl").open()]
    (end,) = [line for line in lines if line["event"] == "end"]
    assert f"{end['seconds_per_step']:.3g}" in text
    assert f"{end['memory_bytes'] / 2**30:.2f}" in text
    last = [line for line in lines if line["event"] == "step"][-1]
    assert f"{last['loss']:.3f}  second" in " ".join(Page(html).texts)
    assert "loss.num_negatives" in text and "encoder.max_length" in text
    assert "different losses" in text
    assert len(Page(html).values("aria-label")) == len(PANELS)


def test_many_runs_of_very_different_length_fit_one_page(tmp_path: Path) -> None:
    lengths = (1200, 2, 40, 150, 300, 90, 1)
    folders = [play(tmp_path / f"run-{n}", n, seed=n) for n in lengths]
    html = report(folders, tmp_path / "report.html").read_text()
    assert outside(html) == []
    assert len(html) < 500_000
    page = Page(html)
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    used = re.findall(r"url\(#([^)]*)\)", html) + [href[1:] for href in page.values("href")]
    assert set(used) <= set(ids)
    labels = [label for label in page.values("aria-label") if "by step" in label]
    assert len(labels) == len(PANELS)
    for label in labels:
        assert all(f"run-{n} " in label for n in lengths), label
        assert "at step 1,200" in label and "at step 1" in label
    for n in lengths:  # a label in every panel, heads of tables, configuration
        assert html.count(f"run-{n}<") >= len(PANELS) + 2


def test_every_colour_is_the_page_s_own(tmp_path: Path) -> None:
    html = report([play(tmp_path / "run", 30)], tmp_path / "report.html").read_text()
    (drawing, *others) = re.findall(r"<svg style.*?</figure>", html, re.DOTALL)
    assert len(others) == len(PANELS) - 1
    assert "var(--hue-0)" in drawing and "var(--grid)" in drawing
    assert re.findall(r"#[0-9a-f]{6}", drawing) == []


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    folders = [play(tmp_path / HOSTILE, 5), play(tmp_path / "plain", 5)]
    judge(folders[0], METRICS)
    name = os.fsdecode(b"not utf-8 \xff")
    folders.append(play(tmp_path / name, 5))
    html = report(folders, tmp_path / "report.html").read_text()
    assert outside(html) == []
    shown = HOSTILE.replace("\N{ESCAPE}", "\N{REPLACEMENT CHARACTER}")
    assert shown in Page(html).texts
    assert any(shown in label for label in Page(html).values("aria-label"))
    assert "not utf-8 \N{REPLACEMENT CHARACTER}" in Page(html).texts


def test_equal_runs_give_an_equal_page(tmp_path: Path) -> None:
    folders = [play(tmp_path / "a", 40), play(tmp_path / "b", 60, seed=3)]
    judge(folders[0], METRICS)
    page = report(folders, tmp_path / "report.html").read_bytes()
    assert report(folders, tmp_path / "report.html").read_bytes() == page
    assert report(folders, tmp_path / "other.html").read_bytes() == page
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "other.html", "report.html"}


def test_a_run_in_progress_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    folder = play(tmp_path / "run", 6, ends=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 7, "lo')
    (record,) = read_runs([folder])
    assert [event["step"] for event in record.steps] == [1, 2, 3, 4, 5, 6]
    assert record.num_unreadable == 0
    text = Page(report([folder], tmp_path / "report.html").read_text()).text
    assert "not ended; last event 20" in text
    assert "0.01" in text and "None of the runs has been evaluated" in text


def test_a_run_without_a_step_is_reported_too(tmp_path: Path) -> None:
    folder = play(tmp_path / "run", 0, ends=False)
    text = Page(report([folder], tmp_path / "report.html").read_text()).text
    assert "no step yet" in text and "No step has been logged yet" in text


def test_a_resumed_run_counts_what_was_said_last(tmp_path: Path) -> None:
    folder = play(tmp_path / "run", 10)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 11, "lo\n')  # the crash
        file.write('{"event": "resume", "step": 6, "ranks": 2, "time": 1800000000.0}\n')
    log = JsonLines(folder / "metrics.jsonl")
    for step in (7, 8):
        log.on_step(step_report(step, 0.5))
    (record,) = read_runs([folder])
    assert [event["step"] for event in record.steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [event["loss"] for event in record.steps[-2:]] == [0.5, 0.5]
    assert [event["step"] for event in record.validations] == [2, 4, 6]
    assert record.end is None and record.num_unreadable == 1
    text = Page(report([folder], tmp_path / "report.html").read_text()).text
    assert "run: 1 line of metrics.jsonl could not be read" in text and "resumed 1×" in text


def test_steps_that_were_not_finite_leave_gaps_and_are_counted(tmp_path: Path) -> None:
    folder = play(tmp_path / "run", 3, ends=False)
    log = JsonLines(folder / "metrics.jsonl")
    bad = dataclasses.replace(step_report(4, math.nan), gradient_norm=math.inf, skipped=True)
    log.on_step(dataclasses.replace(bad, num_skipped=1))
    html = report([folder], tmp_path / "report.html").read_text()
    loss, memory = (
        label for label in Page(html).values("aria-label") if label[:4] in ("Loss", "Memo")
    )
    assert "at step 3" in loss and "at step 4" in memory


def test_popularity_and_the_best_of_each_column_are_shown(tmp_path: Path) -> None:
    folders = [play(tmp_path / name, 5) for name in ("worse", "better", "unjudged")]
    judge(folders[0], METRICS)
    judge(folders[1], METRICS | {"NDCG@10": 0.2222, "Recall@10/head": 0.8})
    html = report(folders, tmp_path / "report.html").read_text()
    text = Page(html).text
    assert "<strong>0.2222</strong>" in html and "<strong>0.1234</strong>" not in html
    assert "<strong>0.8000</strong>" in html and "width: 100.0%" in html and "width: 50.0%" in html
    assert "no targets" in text and "1,234" in text


def test_baselines_stand_beside_the_runs_in_table_and_curve(tmp_path: Path) -> None:
    folders = [play(tmp_path / name, 5) for name in ("a", "b")]
    tested = {"popularity": {"NDCG@10": 0.0111}, "knn_next": {"NDCG@10": 0.3333}}
    for folder in folders:
        judge(folder, METRICS, baselines=tested)
        beside = {"popularity": {"NDCG@10": 0.0222}, "knn": {"NDCG@10": 0.2444}}
        (folder / BESIDE).write_text(json.dumps({"split": "validation", "metrics": beside}))
    html = report(folders, tmp_path / "report.html").read_text()
    text = Page(html).text
    assert "popularity baseline 0.0222 0.0111" in text and "<strong>0.3333</strong>" in html
    (validation, *others) = (v for v in Page(html).values("aria-label") if "by step" in v)
    assert "popularity 0.0222 throughout; knn 0.2444 throughout" in validation
    assert not any("throughout" in label for label in others)
    (folders[0] / BESIDE).write_text(json.dumps({"metrics": {"popularity": {"NDCG@10": 0.5}}}))
    html = report(folders, tmp_path / "report.html").read_text()
    (validation, *_) = (v for v in Page(html).values("aria-label") if "by step" in v)
    assert "popularity" not in validation and "knn 0.2444" in validation, "on it they agree"
    (folders[0] / BESIDE).write_text(json.dumps({"metrics": {"popularity": "much"}}))
    with pytest.raises(ValueError, match=r"'metrics' in .*baselines\.json must be numbers"):
        report(folders, tmp_path / "report.html")


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    folders = [play(tmp_path / name, 5) for name in ("a", "b")]
    judge(folders[0], METRICS)
    judge(folders[1], METRICS, seen="removed, targets excepted")
    details = json.loads((folders[1] / "run.json").read_text())
    details["data"]["fingerprint"] = "beef"
    (folders[1] / "run.json").write_text(json.dumps(details))
    text = Page(report(folders, tmp_path / "report.html").read_text()).text
    assert "different data" in text and "different protocols" in text
    assert "What differs Nothing: the runs have equal options" in text


def test_only_options_that_differ_are_listed(tmp_path: Path) -> None:
    folders = [
        play(tmp_path / "a", 5, seed=1),
        play(tmp_path / "b", 5, loss=CCEMinus(num_negatives=77)),
    ]
    html = report(folders, tmp_path / "report.html").read_text()
    table = html[html.index('id="differences"') : html.index('id="configuration"')]
    rows = Page(table).text
    assert "loss.num_negatives – 77" in rows and "loss.type cce cce_minus" in rows
    assert "seed" not in rows and "output" not in rows


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [play(tmp_path / parent / "run", 3) for parent in ("x", "y")]
    assert [record.name for record in read_runs(folders)] == ["x/run", "y/run"]


def test_what_is_no_run_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = play(tmp_path / "run", 3), tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        assert main(["report", str(run), str(folder), "--output", str(output)]) == 2
        assert "run must be a folder that train wrote, got" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be different folders"):
        report([run, f"{run}/."], output)
    with pytest.raises(ValueError, match="must be of 1 to 12 runs, got 0"):
        report([], output)
    (run / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json must be JSON"):
        report([run], output)
    assert not output.exists()


def test_a_file_that_is_no_report_is_left_alone(tmp_path: Path) -> None:
    run, precious = play(tmp_path / "run", 3), tmp_path / "notes.html"
    precious.write_text("<!doctype html>\nmine")
    for path in (precious, tmp_path / "run"):
        with pytest.raises(FileExistsError, match="must be a new file or a former report"):
            report([run], path)
    assert precious.read_text() == "<!doctype html>\nmine"


def test_thinning_keeps_the_mean_and_the_ends_of_the_axis() -> None:
    steps = np.arange(1.0, 5001)
    for is_log in (False, True):
        short = thin(Line("run", 0, steps, steps % 10), 60, is_log=is_log)
        assert 20 < len(short.steps) <= 60
        assert (np.diff(short.steps) > 0).all()
        assert (short.steps[0], short.steps[-1]) == (1, 5000)
        assert short.values[-10:] == pytest.approx([4.5] * 10, abs=0.6)


@pytest.mark.parametrize("wanted", [[5, 5, 5], [-50, 0, 99, 300], [98, 99, 99.5], [10], []])
def test_labels_keep_their_distance_inside_the_panel(wanted: list[float]) -> None:
    placed = place_labels(wanted, gap=12, low=0, high=100)
    assert all(0 <= height <= 100 for height in placed)
    assert all(after - before >= 12 for before, after in zip(placed, placed[1:], strict=False))


def test_labels_move_closer_where_there_is_no_room() -> None:
    placed = place_labels([50.0] * 30, gap=12, low=0, high=100)
    assert placed[0] > -1e-9 and placed[-1] <= 100 and sorted(placed) == placed
    assert np.diff(placed).min() > 3
