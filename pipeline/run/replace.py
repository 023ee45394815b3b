"""``train --force``: train in a staging folder; replace the old run only on success.

The new run is trained in ``.run.partial/result``, next to the old one.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from shardrec.pipeline.outputs.files import BESIDE
from shardrec.pipeline.outputs.json_files import write_atomically
from shardrec.pipeline.outputs.lock import RunLock
from shardrec.pipeline.outputs.staging import (
    RESULT,
    locked,
    partial_of,
    put_in_place,
    require_place,
    settle,
)
from shardrec.pipeline.run.callbacks import EndReport
from shardrec.pipeline.run.config import TrainConfig
from shardrec.pipeline.run.folder import END, MEMORY, METRICS, write_config
from shardrec.pipeline.run.resume import Resume, write_end

__all__ = ["check_force", "moved_to", "replace_run", "training_folder"]

# What train, memorize, evaluate and gate write into a run folder.
RUN_FILES = {
    *("config.json", "run.json", "mlflow.json", "checkpoints", "tensorboard", "profile"),
    *(METRICS, END, BESIDE, "metrics.json", "metrics.users.parquet", "gate.json", MEMORY),
}


def check_force(force: bool, resume: Resume) -> None:
    """Refuse ``force`` together with ``resume="yes"``.

    Raises:
        ValueError: both are set.
    """
    if force and resume == "yes":
        raise ValueError(
            "--force must come alone or with --resume=auto, got --resume, which starts no new "
            "run; with --resume=auto an interrupted forced run is resumed"
        )


@contextlib.contextmanager
def training_folder(output: Path, resume: Resume, *, force: bool) -> Iterator[Path]:
    """Context manager: the folder to train in, ``output`` or, to replace a run, a staging folder.

    Locks both folders. With "auto" an interrupted run is resumed where it is: first the one in the
    staging folder, then the one in ``output``.

    Raises:
        FileExistsError: ``output`` holds more than a run, or another process is writing there.
        ValueError: ``output`` is a mount point, which cannot be replaced.
        PermissionError: the staging folder cannot be written.
    """
    if not force or _goes_on_in_place(output, resume):
        yield output
        return
    _require_only_a_run(output)
    require_place(output)
    partial, lock = partial_of(output), RunLock(output)
    staged = partial / RESULT
    with contextlib.ExitStack() as held:
        lock.acquire()
        held.callback(lock.release)
        held.enter_context(locked(partial))
        if staged.exists() and not _is_to_go_on(staged, resume):
            shutil.rmtree(staged)
        message = "%s stays until the new run, in %s, is complete"
        logging.getLogger(__name__).warning(message, output, staged)
        try:
            yield staged
        finally:
            if not staged.exists():
                shutil.rmtree(partial, ignore_errors=True)


def moved_to(folder: Path, config: TrainConfig) -> TrainConfig:
    """The config with ``folder`` as output; the name of the MLflow run stays the same."""
    if folder == Path(config.output):
        return config
    name = config.mlflow.run_name or Path(config.output).name
    mlflow = dataclasses.replace(config.mlflow, run_name=name)
    return dataclasses.replace(config, output=str(folder), mlflow=mlflow)


def replace_run(config: TrainConfig, folder: Path, report: EndReport) -> EndReport:
    """Replace the run in ``config.output`` by the finished one in ``folder``.

    Returns:
        The report, with the final path of the run.

    Raises:
        OSError: a file cannot be written, or a folder cannot be renamed.
    """
    output, report = Path(config.output), dataclasses.replace(report, output=config.output)
    write_config(config, folder)
    write_end(folder, report)
    metrics = folder / METRICS
    if metrics.is_file():
        old, new = (json.dumps(str(path.absolute()))[1:-1] for path in (folder, output))
        write_atomically(metrics, metrics.read_text(encoding="utf-8").replace(old, new))
    put_in_place(folder, output)
    shutil.rmtree(folder.parent, ignore_errors=True)
    return report


def _goes_on_in_place(output: Path, resume: Resume) -> bool:
    """Whether there is no run to replace, or "auto" resumes the one in ``output``."""
    is_settled = settle(output)
    if not (output / "run.json").is_file():
        return True
    if _is_to_go_on(partial_of(output) / RESULT, resume):
        return False
    return resume == "auto" and (is_settled or not (output / END).is_file())


def _is_to_go_on(staged: Path, resume: Resume) -> bool:
    return resume == "auto" and (staged / "run.json").is_file()


def _require_only_a_run(output: Path) -> None:
    """Refuse a folder that holds other things, which would be deleted with the run."""
    names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    if names - RUN_FILES:
        raise FileExistsError(
            f"output must hold nothing but a run to be replaced, got {output} with "
            f"{', '.join(sorted(names - RUN_FILES)[:3])}; move that elsewhere, or choose another "
            "name"
        )
