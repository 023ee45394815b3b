"""Output folders that appear whole or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged_folder(output: Path) -> Iterator[tuple[Path, Path]]:
    """Two temporary folders beside ``output``: the result, renamed at the end, and a work folder.

    Both are removed when the block raises. What a killed process left behind is removed by the next
    one; a process that still runs keeps its folder, because it holds a lock in it.

    Args:
        output: where the result shall be; must not exist, or be an empty folder.

    Yields:
        The folder that becomes ``output``, and a folder for temporary files.

    Raises:
        FileExistsError: another process is preparing the same output.
    """
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial"
    partial.mkdir(exist_ok=True)
    with _locked(partial):
        try:
            result, work = _fresh(partial / "result"), _fresh(partial / "work")
            yield result, work
            os.replace(result, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"output must be written by one process at a time, got {str(folder)!r} in use; "
                "wait for the other one"
            ) from error
        yield


def _fresh(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder
