"""Callbacks write what they are told, and nothing else."""

import dataclasses
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shardrec.pipeline.checkpoint.writer import CheckpointReport
from shardrec.pipeline.run.callbacks import (
    Callback,
    EndReport,
    JsonLines,
    MinuteLines,
    ProgressBar,
    StepReport,
    TensorBoard,
    ValidationReport,
    progress,
)

STEP = StepReport(
    step=1,
    epoch=0.1,
    loss=2.5,
    learning_rate=1e-3,
    gradient_norm=0.7,
    positions=100,
    padding_share=0.2,
    seconds=0.5,
    skipped=False,
    num_skipped=0,
    memory_bytes=2**30,
    statistics={"collisions": 3.0},
)
VALIDATION = ValidationReport(
    step=2,
    epoch=0.2,
    metric="ndcg@10",
    metrics={"ndcg@10": 0.25, "ndcg@5": 0.2},
    improved=True,
    seconds=1.0,
)
CHECKPOINT = CheckpointReport(step=2, folder="run/checkpoints/step-2", best=True, seconds=0.1)
END = EndReport(
    output="run",
    reason="max_steps",
    step=3,
    epoch=0.3,
    seconds=3.0,
    seconds_per_step=0.5,
    positions_per_second=200.0,
    padding_share=0.2,
    memory_bytes=2**30,
    num_skipped=0,
    best_step=2,
    best_metrics={"ndcg@10": 0.25},
)


def play(callback: Callback) -> None:
    for step in (1, 2, 3):
        callback.on_step(dataclasses.replace(STEP, step=step))
    callback.on_validation(VALIDATION)
    callback.on_checkpoint(CHECKPOINT)
    callback.on_end(END)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_lines_hold_every_kth_step_and_every_other_event(tmp_path: Path) -> None:
    play(JsonLines(tmp_path / "metrics.jsonl", every=2))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    events = [(line["event"], line["step"]) for line in lines]
    assert events == [("step", 1), ("step", 2), ("validation", 2), ("checkpoint", 2), ("end", 3)]
    assert lines[0]["loss"] == 2.5 and lines[0]["statistics"] == {"collisions": 3.0}
    assert lines[2]["metrics"] == {"ndcg@10": 0.25, "ndcg@5": 0.2}


def test_a_skipped_step_is_always_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl", every=100)
    lines.on_step(dataclasses.replace(STEP, step=7, skipped=True, loss=float("nan")))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    play(TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("validation/ndcg@10")] == [
        (2, 0.25)
    ]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert "train/collisions" in events.Tags()["scalars"]


def test_a_terminal_gets_a_bar_and_a_log_gets_lines() -> None:
    assert isinstance(progress(3, Terminal()), ProgressBar)
    assert isinstance(progress(3, io.StringIO()), MinuteLines)


def test_a_log_gets_one_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = progress(9, stream)
    for step in range(1, 10):  # at 0, 25, 50, 75 … seconds
        lines.on_step(dataclasses.replace(STEP, step=step))
        now += 25
    first, *others = stream.getvalue().splitlines()
    assert first.startswith("step 1/9 epoch 0.10 loss 2.5000 0.500 s/step 200 positions/s")
    assert [line.split()[1] for line in others] == ["4/9", "7/9"]


def test_a_log_gets_every_validation_and_the_end() -> None:
    stream = io.StringIO()
    play(progress(3, stream))
    first, validation, last, end = stream.getvalue().splitlines()
    assert first.startswith("step 1/3") and last.startswith("step 3/3"), "with the last loss"
    assert validation == "validation at step 2 (best): ndcg@10 0.2500"
    assert end == "stopped at step 3: max_steps"


def test_the_bar_shows_loss_and_validation() -> None:
    stream = Terminal()
    play(progress(3, stream))
    assert "loss 2.5000" in stream.getvalue() and "ndcg@10 0.2500" in stream.getvalue()


def test_a_notebook_gets_a_drawing_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    live_curve = pytest.importorskip("shardrec.pipeline.run.live_curve")
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(live_curve, "_MOST_POINTS", 60)
    curve = live_curve.LiveCurve(shown.append, interval_s=0)
    for step in range(1, 200):
        skipped = dataclasses.replace(STEP, step=step, loss=float("nan") if step == 7 else 2 / step)
        curve.on_step(skipped)
        assert len(curve.losses) <= 60 and curve.losses[-1]["step"] in (step, step - 1)
    assert len(shown) == 199 and shown[-1]["text/plain"] == "loss 0.0101 at step 199"
    assert "Validation" not in shown[-1]["image/svg+xml"]
    curve.on_validation(VALIDATION)
    drawing = ElementTree.fromstring(shown[-1]["image/svg+xml"])
    labels = [one.get("aria-label") or "" for one in drawing.iter() if one.get("aria-label")]
    assert [label.partition(" by ")[0] for label in labels] == ["Validation ndcg@10", "Loss"]
    assert "0.2500 at step 2" in labels[0] and "at step 199" in labels[1]
    assert len(shown[-1]["image/svg+xml"]) < 10_000
    quiet = live_curve.LiveCurve(shown.append)
    quiet.on_end(END)
    quiet.on_step(STEP)
    assert len(shown) == 200, "nothing to draw, or too soon"


def test_hooks_left_out_do_nothing() -> None:
    class Steps(Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_step(self, report: StepReport) -> None:
            self.steps.append(report.step)

    steps = Steps()
    play(steps)
    assert steps.steps == [1, 2, 3]
