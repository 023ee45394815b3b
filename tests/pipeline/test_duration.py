"""The time of a run is counted from measured steps, for the limits that are asked about."""

import datetime
import json
from pathlib import Path

import pytest

from shardrec.launch import cli
from shardrec.pipeline.config import override
from shardrec.pipeline.duration import duration
from shardrec.pipeline.recipes import demo

NOW = datetime.datetime(2026, 1, 31, 22, 0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """20 steps of half a second, 40 an epoch, and two validations of three seconds."""
    steps = [
        {"event": "step", "step": step, "epoch": step / 40, "seconds": 9.0 if step == 1 else 0.5}
        for step in range(1, 21)
    ]
    validations = [{"event": "validation", "step": step, "seconds": 3.0} for step in (10, 20)]
    lines = [json.dumps(one) for one in [*steps, *validations]]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"event": "st']))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "steps", "validations", "seconds"),
    [
        (["limits.max_epochs=10", "validation.every_epochs=2"], 400, 5, 200 + 15),
        (["limits.max_epochs=3", "validation.every_epochs=2"], 120, 2, 60 + 6),  # one at the end
        (["limits.max_steps=50", "validation.every_epochs=none"], 50, 0, 25),
        (["limits.max_epochs=10", "limits.max_minutes=2"], 400, 5, 120),
        (["limits.max_epochs=none", "limits.max_minutes=2"], None, 0, 120),
    ],
)
def test_steps_and_validations_to_the_first_limit_are_added_up(
    run: Path, options: list[str], steps: int | None, validations: int, seconds: float
) -> None:
    found = duration(override(demo("DIR", "DIR"), options), run)
    assert (found.steps, found.validations, found.seconds) == (steps, validations, seconds)


def test_the_end_is_a_date(run: Path) -> None:
    config = override(demo("DIR", "DIR"), ["limits.max_epochs=720", "validation.every_epochs=none"])
    text = duration(config, run).describe(NOW)
    assert text.endswith("28,800 steps of 0.5 s: 4:00:00; started now it ends at 2026-02-01 02:00")


def test_plan_prints_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--num-items", "1000", "--measured", str(run), "limits.max_epochs=1"]
    assert cli.main(words) == 0
    assert "40 steps of 0.5 s and 1 validations of 3 s: 0:00:23" in capsys.readouterr().out


def test_a_run_without_steps_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--num-items", "1000", "--measured", str(tmp_path)]
    assert cli.main(words) == 2
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 1, "epoch": 0.1}\n')
    assert cli.main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert "measured must be a run folder" in said[0] and "a run of some steps" in said[1]
