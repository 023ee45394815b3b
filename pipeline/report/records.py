"""Read the files of run folders into records, without loading a model."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardrec.pipeline.config import flatten
from shardrec.pipeline.outputs.files import BESIDE, MANIFEST_NAME
from shardrec.pipeline.outputs.formats import BASELINE
from shardrec.pipeline.outputs.json_files import (
    Shape,
    parse_json,
    read_json,
    read_object,
    read_text,
    require_inside,
    require_shape,
)

__all__ = ["RunRecord", "read_record", "read_runs"]

MOST_RUNS = 12
_MOST_LOG_BYTES = 1 << 30  # of metrics.jsonl: three million lines
_LATEST = 2.5e11  # seconds since 1970 of the year 9892; later ones are no dates
_REMEDY = "leave this run out"
_NUMBER, _MAYBE = (int, float), (int, float, type(None))
_TIMES: Shape = {"seconds": _NUMBER, "padding_share": _NUMBER, "memory_bytes": _NUMBER}
# What the page reads of each kind of event.
_EVENTS: Mapping[str, Shape] = {
    "step": {
        **_TIMES,
        **{"step": int, "loss": _MAYBE, "gradient_norm": _MAYBE, "positions": _NUMBER},
        **{"epoch": _NUMBER, "num_skipped": _NUMBER},
    },
    "validation": {"step": int, "metric": str, "metrics": dict},
    "resume": {"step": int},
    "end": {
        **_TIMES,
        **{"reason": str, "step": _NUMBER, "epoch": _NUMBER, "num_skipped": _NUMBER},
        **{"seconds_per_step": _NUMBER, "positions_per_second": _NUMBER},
    },
}


@dataclass(kw_only=True, slots=True)
class RunRecord:
    """The content of one run folder.

    Attributes:
        name: name of the run in the report, printable and unique.
        config: every option, by dotted name.
        details: content of run.json: data, encoder, versions.
        steps: logged steps, by ascending step number.
        validations: logged validations, by ascending step number.
        end: the end event; None if the run has not ended.
        last_time: seconds since 1970 of the last event; None before the first.
        evaluation: content of metrics.json; None before ``evaluate``.
        beside: metrics of the baselines on the validation users, by name.
        num_resumes: how often the run was resumed.
        num_unreadable: number of lines in metrics.jsonl that a crash truncated.
        folder: the run folder; None for a record that was not read from a folder.
    """

    name: str
    config: Mapping[str, Any]
    details: Mapping[str, Any]
    steps: list[Mapping[str, Any]] = field(default_factory=list)
    validations: list[Mapping[str, Any]] = field(default_factory=list)
    end: Mapping[str, Any] | None = None
    last_time: float | None = None
    evaluation: Mapping[str, Any] | None = None
    beside: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    num_resumes: int = 0
    num_unreadable: int = 0
    folder: Path | None = None

    @property
    def test_metrics(self) -> Mapping[str, float | None]:
        """Metrics of ``evaluate`` by name; empty before ``evaluate``."""
        return {} if self.evaluation is None else self.evaluation["metrics"]

    @property
    def test_baselines(self) -> Mapping[str, Mapping[str, float | None]]:
        """Metrics of the baselines on the users of ``evaluate``, by name."""
        return {} if self.evaluation is None else self.evaluation.get("baselines", {})

    def add(self, event: Mapping[str, Any]) -> None:
        """Add one logged event; if a resumed run logs a step again, the later event replaces it."""
        kind, step = event.get("event"), event.get("step")
        self.last_time = event.get("time", self.last_time)
        if kind == "step" and isinstance(step, int):
            self._forget_from(step)
            self.steps.append(event)
        elif kind == "validation" and isinstance(step, int):
            self.validations.append(event)
        elif kind == "resume" and isinstance(step, int):
            self._forget_from(step + 1)
            self.num_resumes += 1
        elif kind == "end":
            self.end = event

    def _forget_from(self, step: int) -> None:
        self.end = None
        for events in (self.steps, self.validations):
            while events and events[-1]["step"] >= step:
                events.pop()


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """The records of the runs, in the order given, under unique names.

    Raises:
        FileNotFoundError: a folder is not a run.
        ValueError: there is no folder, there are too many, one is given twice, or a file is
            damaged.
    """
    paths = [Path(folder) for folder in folders]
    if not 1 <= len(paths) <= MOST_RUNS:
        raise ValueError(
            f"a report must be of 1 to {MOST_RUNS} runs, got {len(paths)}; choose those to compare"
        )
    whole = [path.resolve() for path in paths]
    for index, path in enumerate(whole):
        if path in whole[:index]:
            raise ValueError(f"runs must be different folders, got {path} twice; remove one")
    names = _distinct(whole)
    return [read_record(path, name) for path, name in zip(paths, names, strict=True)]


def read_record(folder: Path, name: str) -> RunRecord:
    """The record of one run folder, finished or in progress; raises the errors of `read_runs`.

    The record of a baseline's folder has its options, and its metrics if it was evaluated.
    """
    config, details = _config_and_details(folder)
    where = str(folder / "run.json")
    require_shape(details, {"data": dict, "encoder": str, "versions": dict}, where, _REMEDY)
    data: Shape = {"fingerprint": str, "num_items": int}
    require_shape(details["data"], data, f"'data' in {where}", _REMEDY)
    require_shape(details["versions"], {"shardrec": str}, f"'versions' in {where}", _REMEDY)
    record = RunRecord(name=_printable(name), config=dict(flatten(config)), details=details)
    record.folder = folder
    if (folder / "metrics.json").is_file():
        record.evaluation = _evaluation(folder)
    if (folder / BESIDE).is_file():
        beside = str(folder / BESIDE)
        stored = require_shape(_required(folder, BESIDE), {"metrics": dict}, beside, _REMEDY)
        record.beside = _baselines(stored["metrics"], f"'metrics' in {beside}")
    log = folder / "metrics.jsonl"
    text = ""
    if log.is_file():
        text = read_text(require_inside(log, _REMEDY), _MOST_LOG_BYTES, errors="replace")
    *lines, being_written = text.split("\n")
    for line in filter(str.strip, lines):
        event = _event(line)
        record.num_unreadable += event is None
        record.add(event or {})
    record.add(_event(being_written) or {})
    return record


def _evaluation(folder: Path) -> dict[str, Any]:
    """The report of ``evaluate`` in a run."""
    where, remedy = str(folder / "metrics.json"), "evaluate again"
    stored = require_shape(
        _required(folder, "metrics.json"), {"metrics": dict, "protocol": dict}, where, remedy
    )
    newer = [name for name in ("candidates", "ties") if name in stored["protocol"]]
    protocol: Shape = dict.fromkeys(("split", "seen_items", *newer), str)
    require_shape(stored["protocol"], protocol, f"'protocol' in {where}", remedy)
    if not _are_numbers(stored["metrics"]):
        raise ValueError(f"'metrics' in {where} must be numbers, got other values; {remedy}")
    _baselines(stored.get("baselines", {}), f"'baselines' in {where}")
    return stored


def _baselines(stored: Any, where: str) -> Mapping[str, Mapping[str, float | None]]:
    """Metrics of baselines by name, after checking that they are numbers."""
    if not isinstance(stored, dict) or not all(
        isinstance(one, dict) and _are_numbers(one) for one in stored.values()
    ):
        raise ValueError(f"{where} must be numbers by name, got other values; {_REMEDY}")
    return {_printable(name): metrics for name, metrics in stored.items()}


def _config_and_details(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    manifest = read_json(folder / MANIFEST_NAME)
    if manifest.get("format") != BASELINE.name:
        return _required(folder, "config.json"), _required(folder, "run.json")
    require_inside(folder / MANIFEST_NAME, _REMEDY)
    request = require_shape(manifest, BASELINE.shape, str(folder), BASELINE.remedy)["request"]
    config = {"baseline": {name: value for name, value in request.items() if name != "data"}}
    data = {"fingerprint": manifest["data"], "num_items": manifest["counts"]["items"]}
    return config, {"data": data, "encoder": "none", "versions": manifest["versions"]}


def _event(line: str) -> Mapping[str, Any] | None:
    """The event in a line; None if it is not one, as where the process died while writing it."""
    try:
        event = require_shape(parse_json(line), {"event": str, "time": _NUMBER}, "", "")
        require_shape(event, _EVENTS.get(event["event"], {}), "", "")
    except ValueError:
        return None
    numbers = {name: one for name, one in event.items() if type(one) in _NUMBER}
    is_sound = _are_numbers(numbers) and _are_numbers(event.get("metrics", {}))
    is_sound &= 0 <= event["time"] < _LATEST
    return event if is_sound else None


def _are_numbers(values: Mapping[str, Any]) -> bool:
    """Whether all are None or finite numbers of a size that can be drawn."""
    known = [one for one in values.values() if one is not None]
    return all(type(one) in _NUMBER and -1e60 < one < 1e60 for one in known)


def _required(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"run must be a folder that train wrote, got {folder} without {name}; check the path"
        )
    return read_object(require_inside(path, _REMEDY), {}, _REMEDY)


def _distinct(paths: Sequence[Path]) -> list[str]:
    """The shortest suffixes of the paths that are all different.

    Example:
        >>> _distinct([Path("/a/x/run"), Path("/a/y/run")])
        ['x/run', 'y/run']
    """
    longest = max(len(path.parts) for path in paths)
    for length in range(1, longest + 1):
        names = [os.sep.join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _printable(name: str) -> str:
    """The name with replacement characters for unprintable ones."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name
    )
