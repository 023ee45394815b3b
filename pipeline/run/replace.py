"""Training anew where a run is already: that run stays until the new one is complete.

The new run is trained beside it, in ``.run.partial/result``, and takes its place at the end.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from shardrec.pipeline.outputs.json_files import write_atomically
from shardrec.pipeline.outputs.lock import RunLock
from shardrec.pipeline.outputs.staging import RESULT, locked, partial_of, put_in_place, settle
from shardrec.pipeline.run.callbacks import EndReport
from shardrec.pipeline.run.config import TrainConfig, write_config
from shardrec.pipeline.run.resume import END, METRICS, Resume, write_end

__all__ = ["check_force", "folder_for", "moved_to", "take_place"]

# What train, evaluate and gate write into a run folder.
OURS = {
    *("config.json", "run.json", "mlflow.json", "checkpoints", "tensorboard", "profile"),
    *(METRICS, END, "metrics.json", "gate.json"),
}


def check_force(force: bool, resume: Resume) -> None:
    """Refuse to start anew and to insist on going on at once.

    Raises:
        ValueError: both were asked for.
    """
    if force and resume == "yes":
        raise ValueError(
            "--force must come alone or with --resume=auto, got --resume, which starts nothing "
            "anew; with --resume=auto a forced run that was interrupted goes on"
        )


@contextlib.contextmanager
def folder_for(output: Path, resume: Resume) -> Iterator[Path]:
    """Where to train so that a run in ``output`` stays as it is; ``output`` where there is none.

    Both folders are locked for the length of the ``with``. With "auto" a run that was interrupted
    goes on where it is: the one that was begun beside ``output``, or else the one in it.

    Raises:
        FileExistsError: ``output`` holds more than a run, or another process writes there.
        PermissionError: nothing can be written beside ``output``.
    """
    is_settled = settle(output)
    begun, partial = partial_of(output) / RESULT, partial_of(output)
    is_begun = resume == "auto" and (begun / "run.json").is_file()
    goes_on = resume == "auto" and (is_settled or not (output / END).is_file())
    if not (output / "run.json").is_file() or (goes_on and not is_begun):
        yield output
        return
    _require_run_alone(output)
    lock = RunLock(output)
    with contextlib.ExitStack() as stack:
        lock.acquire()
        stack.callback(lock.release)
        stack.enter_context(locked(partial))
        if begun.exists() and not is_begun:
            shutil.rmtree(begun)
        try:
            yield begun
        finally:
            if not begun.exists():
                shutil.rmtree(partial, ignore_errors=True)


def moved_to(folder: Path, config: TrainConfig) -> TrainConfig:
    """The same run in another folder, known to MLflow by the name it would have had."""
    name = config.mlflow.run_name or Path(config.output).name
    mlflow = dataclasses.replace(config.mlflow, run_name=name)
    return dataclasses.replace(config, output=str(folder), mlflow=mlflow)


def take_place(config: TrainConfig, folder: Path, report: EndReport) -> None:
    """Let the complete run in ``folder`` take the place of the one in ``config.output``."""
    output = Path(config.output)
    write_config(config, folder)
    write_end(folder, report)
    metrics = folder / METRICS
    if metrics.is_file():
        there, here = (json.dumps(str(path.absolute()))[1:-1] for path in (folder, output))
        write_atomically(metrics, metrics.read_text(encoding="utf-8").replace(there, here))
    put_in_place(folder, output)
    shutil.rmtree(folder.parent, ignore_errors=True)


def _require_run_alone(output: Path) -> None:
    """Refuse a folder in which somebody keeps other things, which would go with the run."""
    names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    if names - OURS:
        raise FileExistsError(
            f"output must hold nothing but a run to be replaced, got {output} with "
            f"{', '.join(sorted(names - OURS)[:3])}; move that elsewhere, or choose another name"
        )
