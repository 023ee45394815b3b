"""The verdict on a GPU, at toy size in Triton's interpreter: every stage, and how it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import verdict_gpu
import verdict_gpu_train
from verdict import checks
from verdict.checks import LOSSES, Case, cases, check
from verdict.lines import Lines
from verdict.speed import Size

ROOT = Path(__file__).resolve().parent.parent.parent
MORE = {"torchrec", "fbgemm_gpu", "pyarrow", "duckdb", "rich", "torchx", "torchmetrics"}


@pytest.mark.slow
def test_every_stage_runs_and_leaves_its_lines(tmp_path: Path) -> None:
    """As a command of its own, so that the interpreter is on, and nothing but torch is needed."""
    code = "import sys, shortcuts, verdict_gpu; shortcuts.take_shortcuts(); "
    code += "done = verdict_gpu.main(); print(*sys.modules); sys.exit(done)"
    variables = {"TRITON_INTERPRET": "1", "OUT": str(tmp_path)}
    folders = ("src", "benchmarks", "tests/kernels/interpreted")
    path = {"PYTHONPATH": ":".join(str(ROOT / folder) for folder in folders)}
    command = [sys.executable, "-P", "-c", code, "--toy"]
    done = subprocess.run(
        command, env=os.environ | variables | path, capture_output=True, text=True, timeout=300
    )
    text = (tmp_path / "verdict_gpu.jsonl").read_text()
    assert done.returncode == 0, text[-3000:] + done.stderr[-3000:]
    assert not MORE & set(done.stdout.splitlines()[-1].split())
    rows = [json.loads(line) for line in text.splitlines()]
    (counted,) = (row for row in rows if row["kind"] == "checks")
    assert (counted["of"], counted["done"], counted["bad"]) == (len(LOSSES), len(LOSSES), 0)
    timed = [row for row in rows if row["kind"] == "speed"]
    assert {row["loss"] for row in timed if row["by"] == "ours"} == set(LOSSES)
    assert "ours, autocast" in {row["by"] for row in timed}
    assert [row["kind"] for row in (rows[0], rows[-1])] == ["begin", "end"]


def test_every_loss_is_checked_at_every_width_in_both_usual_dtypes() -> None:
    wanted = cases("cuda", toy=False)
    for loss in LOSSES:
        seen = {(case.D, case.dtype) for case in wanted if case.loss == loss}
        widths = {256, 128, 64, 100}
        assert {(width, kind) for width in widths for kind in ("bfloat16", "float32")} <= seen


def test_a_failure_is_a_line_and_the_next_stage_comes(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "lines.jsonl", 60)

    def broken() -> dict[str, Any]:
        raise torch.OutOfMemoryError("no room")

    lines.attempt("speed", {"loss": "cce"}, broken)
    lines.attempt("speed", {"loss": "sce"}, lambda: {"ms": 1.0})
    lines.attempt("speed", {"loss": "rece"}, lambda: {"ms": 1.0}, needs=1e9)
    rows = [json.loads(line) for line in lines.path.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["speed_failed", "speed", "left_out"]
    assert "no room" in rows[0]["error"] and "broken" in " ".join(rows[0]["where"])


def test_a_wrong_gradient_is_bad_and_an_error_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("cce", "float32", 8, 16, 24, "cpu")

    def evaluate(factor: float) -> Any:
        def found(loss: str, batch: Any, backend: str, **options: Any) -> list[torch.Tensor]:
            return [torch.ones(3, dtype=torch.float64) * (factor if backend == "triton" else 1)]

        return found

    monkeypatch.setattr(checks, "run", evaluate(1.0))
    assert check(case)["ok"] and check(case)["same_bits"]
    monkeypatch.setattr(checks, "run", evaluate(1.01))
    assert not check(case)["ok"] and check(case)["errors"] == [0.01]
    monkeypatch.setattr(checks, "run", None)
    row = check(case)
    assert not row["ok"] and "TypeError" in row["error"] and row["where"]


def test_what_the_budget_leaves_out_is_named(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "lines.jsonl", 0.0)
    verdict = verdict_gpu.Verdict(lines, "cpu")
    verdict.speed(("cce", "sce"), Size(8, 16, 24), most_s=0, needs=10)
    assert [(row["kind"], row["loss"]) for row in lines.rows] == [
        ("left_out", "cce"),
        ("left_out", "sce"),
    ]


def test_on_a_gpu_the_most_telling_comes_first_and_only_failures_are_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages as they would follow one another, with stand-ins for what needs a GPU."""
    lines = Lines(tmp_path / "lines.jsonl", 440)
    out = {"wrong": False}

    def checked(lines: Lines, device: str, seconds: float, *, toy: bool) -> None:
        if out["wrong"]:
            lines.say("check", loss="cce", ok=False)
        lines.say("checks", of=2, done=2, bad=int(out["wrong"]))

    monkeypatch.setattr(verdict_gpu, "check_all", checked)
    monkeypatch.setattr(verdict_gpu, "contests", lambda *_: {"ours": int, "other": int})
    monkeypatch.setattr(verdict_gpu, "measured", lambda *_: {"ms": 1.0})
    monkeypatch.setattr(Size, "make", lambda *_: None)
    verdict_gpu.on_gpu(verdict_gpu.Verdict(lines, "cpu"))
    kinds = [row["kind"] for row in lines.rows]
    assert kinds[: len(LOSSES) + 1] == [*["speed"] * len(LOSSES), "checks"]
    largest = [row["loss"] for row in lines.rows if row.get("V") == 10_000_000]
    assert largest == ["cce_minus", "sce", "rece", "cce"]
    assert verdict_gpu.bad_rows(lines) == []
    out["wrong"] = True
    verdict_gpu.on_gpu(verdict_gpu.Verdict(lines, "cpu"))
    assert [row["loss"] for row in verdict_gpu.bad_rows(lines)] == ["cce"]


@pytest.mark.slow  # trains, resumes under the profiler, evaluates and exports
def test_a_run_lives_through_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--toy", "--steps", "12", "--losses", "cce_minus", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["verdict_gpu_train.py", *words])
    failed = verdict_gpu_train.main()
    rows = [json.loads(line) for line in (tmp_path / "verdict_gpu_train.jsonl").open()]
    assert not failed, rows
    begin, row, end = rows
    assert (begin["kind"], row["kind"], end["bad"]) == ("begin", "train", 0)
    assert 6 <= row["stopped_after"] < 12, "a step that has begun is ended first"
    assert (len(row["losses"]), row["items"]) == (12, 3)
    assert row["profile"].startswith("3 steps, ") and "NDCG@10" in row["metrics"]
