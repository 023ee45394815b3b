"""Output folders that appear whole or not at all."""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

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
    partial = output.parent / f".{output.name}.partial"
    with contextlib.ExitStack() as stack:
        with _explain_permission(output.parent):
            partial.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(partial))
        try:
            result, work = _fresh(partial / "result"), _fresh(partial / "work")
            yield result, work
            if replace and output.exists():
                _swap(result, output)
            else:
                os.replace(result, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _explain_permission(parent: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_ALLOWED:
            raise
        raise PermissionError(
            f"output must be in a folder that can be written, got {str(parent)!r} "
            f"({error.strerror}); choose another folder or mend its permissions"
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


def _swap(first: Path, second: Path) -> None:
    """Let two folders change places; in two renames where the file system cannot do it in one."""
    if _exchange(first, second):
        return
    aside = first.with_name("former")
    second.rename(aside)
    try:
        first.rename(second)
    except OSError:
        aside.rename(second)
        raise


def _exchange(first: Path, second: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    names = [os.fsencode(path) for path in (first, second)]
    if not libc.renameat2(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _fresh(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder
