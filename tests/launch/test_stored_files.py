"""What the stages leave behind: found again where it is whole, refused by name where it is not."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shardrec.launch import cli

TINY = ("--recipe", "tiny_cpu", "limits.max_steps=2", "validation.every_steps=none")
STAGES = {
    "synth": "--output D/log.parquet --users 300 --items 203 --events 3000 --clusters 16",
    "prepare": "--events D/log.parquet --output D/data",
    "train": "--prepared D/data --run D/run --resume=auto " + " ".join(TINY),
    "evaluate": "--prepared D/data --run D/run",
    "recommend": "--prepared D/data --run D/run --output D/lists",
    "export": "--prepared D/data --run D/run --output D/model",
    "gate": "--prepared D/data --run D/run --published D/published.json",
    "publish": "--export D/model --lists D/lists --gate D/run/gate.json "
    "--published D/published.json",
    "report": "D/run --output D/report.html",
}
OUTPUTS = {
    **{"synth": "log.parquet", "prepare": "data", "train": "run", "evaluate": "run/metrics.json"},
    **{"recommend": "lists", "export": "model", "gate": "run/gate.json"},
    **{"publish": "published.json", "report": "report.html"},
}


def run_stage(folder: Path, stage: str, *more: str) -> int:
    return cli.main([stage, *STAGES[stage].replace("D/", f"{folder}/").split(), *more])


def files_of(path: Path) -> dict[Path, tuple[int, int, bytes]]:
    """Number, time of writing and content of each file; locks excepted."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    found = {one: (one.stat(), one.read_bytes()) for one in files if not one.name.endswith(".lock")}
    return {one: (at.st_ino, at.st_mtime_ns, text) for one, (at, text) in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    for stage in STAGES:
        assert run_stage(folder, stage) == 0, stage
    return folder


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "report"])
def test_a_finished_stage_does_nothing_and_says_so(
    folder: Path,
    stage: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = files_of(folder)
    capsys.readouterr()
    assert run_stage(folder, stage) == 0
    said = "".join(capsys.readouterr()) + caplog.text
    assert "already" in said and ("nothing to do" in said or "nothing was done" in said), said
    assert files_of(folder) == before


def test_a_finished_report_is_made_again_and_is_equal(folder: Path) -> None:
    before = (folder / OUTPUTS["report"]).read_bytes()
    assert run_stage(folder, "report") == 0
    assert (folder / OUTPUTS["report"]).read_bytes() == before


@dataclass(frozen=True)
class Stored:
    """A file, the stage that reads it, and values that must be in it and are of this type."""

    path: str
    stage: str
    keys: tuple[str, ...]


STORED = (
    Stored("data/manifest.json", "evaluate", ("files", "counts", "columns", "source", "split")),
    Stored("data/manifest.json", "recommend", ("files/0", "files/0/bytes", "counts/items")),
    Stored("run/run.json", "evaluate", ("data", "data/num_items", "encoder")),
    Stored("run/config.json", "export", ("data", "encoder", "encoder/width")),
    Stored("run/end.json", "train", ("step", "reason", "best_metrics")),
    Stored("run/metrics.json", "gate", ("request", "request/ks", "metrics")),
    Stored("run/metrics.json", "evaluate", ("request", "metrics")),
    Stored("run/gate.json", "publish", ("evaluation", "evaluation/source", "passed")),
    Stored("lists/_manifest.json", "recommend", ("request", "files", "files/0/bytes")),
    Stored("lists/_manifest.json", "publish", ("request",)),
    Stored("model/manifest.json", "export", ("request", "files", "files/0")),
    Stored("model/manifest.json", "publish", ("files", "files/0/sha256", "request/source")),
    Stored("published.json", "gate", ("current", "publications/0", "publications/0/export")),
    Stored("published.json", "publish", ("swaps", "publications", "publications/0/previous")),
)


def replaced(text: str, key: str, value: Any) -> str:
    """The JSON with the value at a path of keys replaced; None takes it away."""
    data = json.loads(text)
    *parents, last = (int(part) if part.isdigit() else part for part in key.split("/"))
    at = data
    for part in parents:
        at = at[part]
    if value is None and isinstance(at, dict):
        del at[last]
    else:
        at[last] = value
    return json.dumps(data)


def damages(keys: tuple[str, ...]) -> Iterator[tuple[str, Callable[[str], str]]]:
    yield "cut off", lambda text: text[: len(text) // 2]
    yield "a list", lambda text: "[1, 2]"
    yield "empty", lambda text: ""
    for key in keys:
        yield f"no {key}", lambda text, key=key: replaced(text, key, None)  # type: ignore[misc]
        yield f"{key} of another type", lambda text, key=key: replaced(text, key, 1.5)  # type: ignore[misc]


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: f"{stored.stage}:{stored.path}")
def test_a_damaged_file_is_refused_in_one_line_that_names_it(
    folder: Path, stored: Stored, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / stored.path
    whole = path.read_text()
    try:
        for name, damage in damages(stored.keys):
            path.write_text(damage(whole))
            capsys.readouterr()
            assert run_stage(folder, stored.stage) == 2, name
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.startswith(f"shardrec {stored.stage}: ") and ";" in said, (name, said)
            assert str(path) in said or str(path.parent) in said, (name, said)
    finally:
        path.write_text(whole)


@pytest.mark.slow
def test_a_forced_stage_is_done_again(folder: Path) -> None:
    stages = [stage for stage in STAGES if stage not in ("publish", "report")]
    for stage in stages:
        before = files_of(folder / OUTPUTS[stage])
        assert run_stage(folder, stage, "--force") == 0, stage
        after = files_of(folder / OUTPUTS[stage])
        assert not {at[:2] for at in before.values()} & {at[:2] for at in after.values()}, stage
    for stage in ("evaluate", "gate", "publish"):
        assert run_stage(folder, stage) == 0, stage
