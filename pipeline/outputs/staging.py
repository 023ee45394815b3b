"""Outputs that are complete or absent: written under another name, then renamed.

A folder is written next to ``output``; what is left of it is removed at the end::

    .output.partial/lock      held by the process that writes
                    result    becomes ``output`` when it is complete
                    work      temporary files
                    former    the folder that ``result`` replaces, where that takes two renames

Replacing a folder is one atomic exchange where the file system has it. Elsewhere it is two renames:
``output`` to ``former``, then ``result`` to ``output``. A process killed between the two leaves no
``output``; ``settle``, which every later reader and writer calls first, does the second rename.
"""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from shardrec.pipeline.outputs.lock import lock_file, open_lock

RESULT, FORMER = "result", "former"
_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <stdio.h>
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS)


@contextlib.contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """Context manager: a temporary path, renamed to ``output`` at the end.

    The file is removed if the block raises.
    """
    partial = output.with_name(f".{output.name}.partial")
    partial.unlink(missing_ok=True)  # a link there is not written through
    try:
        yield partial
        partial.replace(output)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # A full disk says nothing of a path when it is written to.
        raise OSError(error.errno, error.strerror, str(output)) from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(output: Path, *, replace: bool = False) -> Iterator[tuple[Path, Path]]:
    """Context manager: a folder that is renamed to ``output`` at the end, and a temporary one.

    Both are removed if the block raises. What a killed process left behind is removed by the next
    one; a running process holds a lock and so keeps its folder.

    Args:
        output: where the result will be; must not exist, or be an empty folder.
        replace: whether ``output`` may be an existing folder. It stays until the new one is
            complete; the two are exchanged atomically where the file system can do that.

    Yields:
        The folder that becomes ``output``, and the folder for temporary files.

    Raises:
        FileExistsError: another process is writing the same output.
        PermissionError: nothing can be written next to ``output``.
        ValueError: ``output`` is a mount point, which cannot be renamed.
    """
    output = output.absolute()
    if os.path.ismount(output):
        raise ValueError(
            f"output must be a folder below a mount point, got {str(output)!r}, which is one; "
            f"use {str(output / 'prepared')!r}"
        )
    settle(output)
    partial = partial_of(output)
    with locked(partial):
        try:
            result, work = _empty(partial / RESULT), _empty(partial / "work")
            yield result, work
            if replace and output.exists():
                put_in_place(result, output)
            else:
                os.replace(result, output)
        finally:
            if os.path.lexists(output) or not (partial / FORMER).exists():
                shutil.rmtree(partial, ignore_errors=True)


def partial_of(output: Path) -> Path:
    """The staging folder of ``output``, next to it."""
    output = output.absolute()
    return output.parent / f".{output.name}.partial"


@contextlib.contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Context manager: create the staging folder and hold its lock.

    Raises:
        FileExistsError: another process holds its lock.
        PermissionError: nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            if partial.is_symlink():
                raise FileExistsError(
                    f"output must have a staging folder of its own, got a link at {partial}; "
                    "remove it"
                )
            stack.enter_context(_locked(partial))
        except OSError as error:
            if error.errno not in _NOT_ALLOWED:
                raise
            raise PermissionError(
                f"output must be in a folder that can be written, got {str(partial.parent)!r} "
                f"({error.strerror}); choose another folder or fix its permissions"
            ) from error
        yield


def put_in_place(result: Path, output: Path) -> None:
    """Replace ``output`` by the complete ``result``; the old folder stays in the staging folder.

    Atomic where the file system can exchange two folders; else two renames, and ``settle`` does the
    second one if the process is killed between them.
    """
    if _exchange(result, output):
        return
    aside = result.with_name(FORMER)
    if aside.exists():
        shutil.rmtree(aside)
    output.rename(aside)
    try:
        result.rename(output)
    except OSError:
        aside.rename(output)
        raise


def settle(output: Path) -> bool:
    """Finish a replacement that was killed between its two renames; returns whether there was one.

    In that state ``output`` is missing, and the staging folder holds the former folder and the new,
    complete one, which is renamed to ``output``. Does nothing if there is an output, if nothing was
    left, or while another process holds the lock.

    Raises:
        OSError: it cannot be renamed; the message says what to do.
    """
    partial = partial_of(output)
    if os.path.lexists(output) or not (partial / FORMER).is_dir():
        return False
    found = partial / RESULT
    found = found if found.is_dir() else partial / FORMER
    try:
        with _locked(partial):
            if os.path.lexists(output):  # it may have appeared since
                return False
            found.rename(output)
            shutil.rmtree(partial, ignore_errors=True)
            return True
    except FileExistsError:  # another process holds the lock
        return False
    except OSError as error:
        raise OSError(
            error.errno,
            f"{output} must be renamed back after a process was killed, got "
            f"{error.strerror}; rename {found} to {output}",
        ) from error


def find_file(folder: Path, name: str) -> Path | None:
    """The path of a file in an output folder, after ``settle`` if need be; None if missing."""
    path = folder / name
    if not path.is_file():
        settle(folder)
    return path if path.is_file() else None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with os.fdopen(open_lock(folder / "lock"), "w") as lock:
        if not lock_file(lock.fileno(), folder / "lock"):
            raise FileExistsError(
                f"output must be written by one process at a time, got {str(folder)!r} in use; "
                "wait for the other one"
            )
        yield


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders atomically; False if the file system cannot."""
    code = _rename_exchange(first, second)
    if code and code not in _NO_EXCHANGE:
        raise OSError(code, os.strerror(code), str(second))
    return not code


def _rename_exchange(first: Path, second: Path) -> int:
    """The system's error number, 0 if the folders have changed places."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = [os.fsencode(path) for path in (first, second)]
    failed = libc.renameat2(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _EXCHANGE)
    return ctypes.get_errno() if failed else 0


def _empty(folder: Path) -> Path:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder
