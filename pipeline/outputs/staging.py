"""Output folders that appear whole or not at all.

Beside ``output``, and gone when all is done::

    .output.partial/lock      held by the process that writes
                    result    becomes ``output`` when it is complete
                    work      temporary files
                    former    what ``result`` takes the place of, where that takes two renames
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["locked", "partial_of", "put_in_place", "settle", "staged_folder"]

RESULT, FORMER = "result", "former"
_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <stdio.h>
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS)


@contextlib.contextmanager
def staged_folder(output: Path, *, replace: bool = False) -> Iterator[tuple[Path, Path]]:
    """Two temporary folders beside ``output``: the result, renamed at the end, and a work folder.

    Both are removed when the block raises. What a killed process left behind is removed by the next
    one; a process that still runs keeps its folder, because it holds a lock in it.

    Args:
        output: where the result shall be; must not exist, or be an empty folder.
        replace: whether a folder that is there may be replaced. It stays until the new one is
            complete; the two change places in one step where the file system can do that.

    Yields:
        The folder that becomes ``output``, and a folder for temporary files.

    Raises:
        FileExistsError: another process is preparing the same output.
        PermissionError: nothing can be written beside ``output``.
        ValueError: ``output`` is a mount point, which cannot be renamed.
    """
    output = output.absolute()
    if os.path.ismount(output):
        raise ValueError(
            f"output must be a folder below a mount point, got {str(output)!r}, which is one; "
            f"say {str(output / 'prepared')!r}"
        )
    settle(output)
    partial = partial_of(output)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(partial))
        try:
            result, work = _fresh(partial / RESULT), _fresh(partial / "work")
            yield result, work
            if replace and output.exists():
                put_in_place(result, output)
            else:
                os.replace(result, output)
        finally:
            if os.path.lexists(output) or not (partial / FORMER).exists():
                shutil.rmtree(partial, ignore_errors=True)


def partial_of(output: Path) -> Path:
    """The folder beside ``output`` for what is not complete."""
    output = output.absolute()
    return output.parent / f".{output.name}.partial"


@contextlib.contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Make the folder and keep it for this process, for the length of a ``with``.

    Raises:
        FileExistsError: another process has it.
        PermissionError: nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        with _explain_permission(partial.parent):
            partial.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(partial))
        yield


def put_in_place(result: Path, output: Path) -> None:
    """Let a complete result take the place of ``output``, and keep that in the result's folder.

    In one step where the file system can; else in two renames, of which ``settle`` makes up for the
    second where the process was killed between them.
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
    """Whether an output was brought to its place that a killed process had left aside.

    Where it was killed between two renames, ``output`` is missing, and what was there and the new
    one, which is complete, lie beside it: the new one gets the place. Does nothing where there is
    an output or nothing was left, nor while another process is between its two renames.

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
            if os.path.lexists(output):  # since it was looked for
                return False
            found.rename(output)
            shutil.rmtree(partial, ignore_errors=True)
            return True
    except FileExistsError:  # another process has the lock
        return False
    except OSError as error:
        raise OSError(
            error.errno,
            f"{output} must be put back where a killed process left it aside, got "
            f"{error.strerror}; rename {found} to {output}",
        ) from error


@contextlib.contextmanager
def _explain_permission(parent: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_ALLOWED:
            raise
        raise PermissionError(
            f"output must be in a folder that can be written, got {str(parent)!r} "
            f"({error.strerror}); choose another folder or fix its permissions"
        ) from error


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


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; whether the file system can."""
    code = _rename_exchange(first, second)
    if code and code not in _NO_EXCHANGE:
        raise OSError(code, os.strerror(code), str(second))
    return not code


def _rename_exchange(first: Path, second: Path) -> int:
    """The error number that the system answers, 0 where the folders have changed places."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = [os.fsencode(path) for path in (first, second)]
    failed = libc.renameat2(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _EXCHANGE)
    return ctypes.get_errno() if failed else 0


def _fresh(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder
