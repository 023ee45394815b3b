"""Start or resume a run: check and lock its folder, and restore its last checkpoint.

A run counts as interrupted until its folder has ``end.json``. An interrupted run resumes from its
last complete checkpoint as if nothing had happened, on any number of ranks; without a checkpoint it
restarts. The phases, in this order:
1. ``find_end``: a finished run with the same config has nothing left to do.
2. ``check_folder``: the folder is new, or holds this run and is locked.
3. ``restore``: load the last complete checkpoint into model, optimizers and data loader; the latter
   (``prepared/loader.py``) continues at the saved epoch and step.
4. Without a checkpoint, ``started``: lock the folder and write its first files; a new run that
   fails before its first step removes them. When resuming, ``rewind``: truncate the records to the
   step of the checkpoint.
5. ``write_end``: mark the run as finished.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.pipeline.checkpoint.state import versions
from shardrec.pipeline.checkpoint.store import Checkpoints
from shardrec.pipeline.config import flatten
from shardrec.pipeline.outputs.json_files import (
    parse_json,
    read_object,
    require_inside,
    write_atomically,
)
from shardrec.pipeline.outputs.lock import LOCK, RunLock
from shardrec.pipeline.outputs.storage import Folder
from shardrec.pipeline.prepared.attributes import COLUMNS_NAME
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.loader import TrainingBatches
from shardrec.pipeline.run.callbacks import EndReport
from shardrec.pipeline.run.config import TrainConfig
from shardrec.pipeline.run.folder import (
    END,
    METRICS,
    is_free,
    open_checkpoints,
    read_run,
    require_new,
    write_config,
)
from shardrec.pipeline.run.progress import Progress
from shardrec.pipeline.run.step import Stepper

__all__ = ["Resume", "check_folder", "find_end", "restore", "rewind", "started", "write_end"]

Resume = Literal["no", "yes", "auto"]
"""What a run folder may hold. "no": nothing; "yes": an interrupted run; "auto": either."""

# The files that a run has written before its first step.
_JSON = ("config.json", "run.json", COLUMNS_NAME)
BEGINNING = {LOCK, *_JSON, *(f".{name}.partial" for name in _JSON)}


def find_end(config: TrainConfig, resume: Resume, encoder: str) -> EndReport | None:
    """The report on how this run ended, if ``config.output`` holds it finished; else None.

    Raises:
        FileNotFoundError: the prepared data is gone.
        ValueError: the folder holds a run of another config, data or encoder.
    """
    folder = Path(config.output)
    if resume == "no" or not (folder / END).is_file():
        return None
    stored = _check_same(config, Prepared.open(config.data), encoder)
    if stored.limits != config.limits:
        return None
    end = _read_end(folder / END)
    message = "%s is finished already (%s): nothing to do"
    logging.getLogger(__name__).info(message, folder, end.reason)
    return end


def check_folder(
    config: TrainConfig, prepared: Prepared, encoder: str, resume: Resume, lock: RunLock
) -> bool:
    """Whether the run is new; if it is resumed instead, its folder is locked.

    Raises:
        FileExistsError: the folder holds something that must not be continued, or is in use.
        FileNotFoundError: ``resume`` is "yes" and the folder holds no run.
        ValueError: the folder holds a run of another config, data or encoder.
    """
    folder = Path(config.output)
    if resume != "no" and (folder / "run.json").is_file():
        _check_same(config, prepared, encoder)
        lock.acquire()
        return False
    if resume == "yes":
        raise FileNotFoundError(
            f"output must be a folder that train wrote to be resumed, got {folder}; check the "
            "path, or start without resuming"
        )
    if resume == "no" or not _is_a_beginning(folder):
        require_new(folder)
    checkpoints = open_checkpoints(folder, config)
    if not checkpoints.is_empty():
        raise FileExistsError(
            f"checkpoints.folder must be empty for a new run, got {checkpoints.folder}, which "
            "holds checkpoints; give every run a folder of its own"
        )
    return True


@contextlib.contextmanager
def started(
    config: TrainConfig, start: Callable[[], Path], lock: RunLock, at: Progress, *, is_new: bool
) -> Iterator[None]:
    """Context manager: lock the run folder and start the run; undo that if no step is taken.

    If the block raises while ``at`` is still at step 0, the files of a new run are removed, so that
    a command with corrected options finds the folder unchanged.

    Raises:
        FileExistsError: another process has started a run there since ``check_folder``.
    """
    folder = Path(config.output)
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    if is_new and (folder / "run.json").exists():
        require_new(folder)
    try:
        start()
        yield
    except GeneratorExit:  # the run was built but not used: no failure
        raise
    except BaseException:
        if is_new and not at.step:
            _undo(folder, was_there)
        raise


def restore(
    checkpoints: Checkpoints, stepper: Stepper, batches: TrainingBatches
) -> Progress | None:
    """Load the last complete checkpoint into model, optimizers and data loader.

    If another version of torch or shardrec wrote it, a warning names both versions.

    Returns:
        The progress stored with the checkpoint; None if there is no checkpoint yet.

    Raises:
        RuntimeError: the checkpoint does not fit the model.
        ValueError: the checkpoint does not fit the data or the table.

    Collectives: as ``Checkpoints.load_last``.
    """
    found = checkpoints.load_last(stepper.model.catalog.row_range)
    if found is None:
        return None
    folder, state = found
    if Communicator(checkpoints.group).rank == 0:
        _warn_of_other_versions(folder, state.written_by)
    stepper.start_average()
    try:
        with stepper.averaged():
            stepper.model.encoder.load_state_dict(dict(state.encoder))
            stepper.model.catalog.attributes.load_state_dict(dict(state.attributes))
            stepper.model.catalog.load_state_dict(state.table)
            if stepper.average is not None:
                stepper.average.load_state_dict(state.unaveraged)
        stepper.load_optimizer(state.optimizer)
        batches.load_state_dict(state.progress["data"])
        return Progress.from_json(state.progress)
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise RuntimeError(
            f"{folder} must hold the state of this run, got {error!r}; use the checkpoint before"
        ) from error


def rewind(config: TrainConfig, step: int, num_ranks: int) -> None:
    """Truncate metrics.jsonl after ``step``, remove end.json, and record the resumption."""
    folder = Path(config.output)
    write_config(config, folder)
    (folder / END).unlink(missing_ok=True)
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if _is_before(line, step)]
    event = {"event": "resume", "time": round(time.time(), 3), "step": step, "ranks": num_ranks}
    write_atomically(path, "".join(f"{line}\n" for line in [*kept, json.dumps(event)]))


def write_end(folder: Path, report: EndReport) -> None:
    """Write end.json, which marks the run as finished."""
    write_atomically(folder / END, json.dumps(dataclasses.asdict(report), indent=1))


def _warn_of_other_versions(folder: Folder, written_by: Mapping[str, str]) -> None:
    ours = versions()
    pairs = {name: (str(written_by.get(name)), ours[name]) for name in ("shardrec", "torch")}
    differing = [f"{name} {was}, not {now}" for name, (was, now) in pairs.items() if was != now]
    if differing:
        message = "%s was written by %s: the run continues, but its rounding may differ from now on"
        logging.getLogger(__name__).warning(message, folder, " and ".join(differing))


def _read_end(path: Path) -> EndReport:
    remedy = "remove it, and the run continues from its last checkpoint to its end"
    shape = {"reason": str, "step": int, "best_metrics": dict}
    stored = read_object(require_inside(path, remedy), shape, remedy)
    names = [field.name for field in dataclasses.fields(EndReport)]
    missing = [name for name in names if name not in stored]
    if missing:
        raise ValueError(f"{path} must have {', '.join(missing)}, got none; {remedy}")
    return EndReport(**{name: stored[name] for name in names})


def _is_before(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is of a step up to ``step``; a truncated line is not."""
    try:
        event = parse_json(line)
        return bool(event["event"] != "end" and event["step"] <= step)
    except (ValueError, TypeError, KeyError):
        return False


def _check_same(config: TrainConfig, prepared: Prepared, encoder: str) -> TrainConfig:
    """The stored config of the run in the folder, which must be this run."""
    folder = Path(config.output)
    details, stored = read_run(folder)
    if details["data"]["fingerprint"] != prepared.fingerprint:
        raise ValueError(
            f"the run must belong to the prepared data, got {folder} of other data than "
            f"{prepared.path}; give the folder it was started on, or start a new run"
        )
    if details["encoder"] != encoder:
        raise ValueError(
            f"the encoder must be {details['encoder']} as in {folder}, got {encoder}; pass the "
            "same module, or start a new run"
        )
    ours, before = dict(flatten(config)), dict(flatten(stored))
    differing = [
        name
        for name in sorted(ours.keys() | before.keys())
        if ours.get(name) != before.get(name) and not _is_free(name, config)
    ]
    if differing:
        shown = ", ".join(f"{name}={ours.get(name)} for {before.get(name)}" for name in differing)
        raise ValueError(
            f"config must be that of the run in {folder} to resume it, got {shown}; restore "
            "the options, or start a new run in another folder"
        )
    return stored


def _is_free(name: str, config: TrainConfig) -> bool:
    """Whether a resumed run may change this option; limits too, unless decay depends on them."""
    longer = name.startswith("limits.") and config.optimizer.decay == "constant"
    return longer or is_free(name)


def _undo(folder: Path, was_there: bool) -> None:
    """Remove what a run wrote before its first step, and its folder if it made that."""
    with contextlib.suppress(OSError):  # the first error is the one to report
        for name in sorted(BEGINNING):
            (folder / name).unlink(missing_ok=True)
        if not was_there:
            folder.rmdir()


def _is_a_beginning(folder: Path) -> bool:
    """Whether the folder holds only what a run killed before writing run.json leaves."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return names <= BEGINNING - {"run.json"}
