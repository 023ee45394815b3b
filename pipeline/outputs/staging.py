"""Outputs that are complete or absent: written under another name, then renamed.

A folder is written in a staging folder next to ``output``, which is removed at the end::

    .output.partial/lock      held by the writing process
                    result    becomes ``output`` when it is complete
                    work      temporary files
                    former    the folder that ``result`` replaces, if that takes two renames

If ``output`` is a link, its target is written, with the staging folder next to the target. A folder
is replaced by one atomic exchange if the file system supports it, otherwise by two renames:
``output`` to ``former``, then ``result`` to ``output``. A folder in the lower layer of an overlay
cannot be renamed at all and is deleted instead; an empty ``former`` marks this case. A process
killed in between leaves no ``output``, or half of it; ``settle``, which every later reader and
writer calls first, completes the replacement. A complete result that cannot be renamed is kept.
"""

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from shardrec.pipeline.outputs.lock import BusyError, lock_file, open_lock

RESULT, FORMER = "result", "former"
_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <stdio.h>
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EXDEV)


@contextlib.contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """Context manager: a temporary path, renamed to ``output`` at the end.

    The file is removed if the block raises.

    Raises:
        ValueError: ``output`` is a mount point, or a link that leads to itself.
    """
    output = require_place(output)
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

    Both are removed if the block raises. The next process removes what a killed process left
    behind; the folder of a running process is protected by a lock.

    Args:
        output: where the result will be; must not exist, or be an empty folder.
        replace: whether ``output`` may be an existing folder. It stays until the new one is
            complete; the two are exchanged atomically where the file system can do that.

    Yields:
        The folder that becomes ``output``, and the folder for temporary files.

    Raises:
        FileExistsError: another process is writing the same output.
        PermissionError: nothing can be written next to ``output``.
        ValueError: ``output`` is a mount point, which cannot be replaced, or a link to itself.
        OSError: the result is complete but cannot be renamed; the message says where it is.
    """
    output = require_place(output)
    settle(output)
    partial = partial_of(output)
    with locked(partial):
        try:
            result, work = _empty(partial / RESULT), _empty(partial / "work")
            yield result, work
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        try:
            if replace and output.exists():
                put_in_place(result, output)
            else:
                os.replace(result, output)
        except OSError as error:
            rest = f"the result is complete: rename {result} yourself"
            if not result.is_dir():
                rest = f"{partial} was deleted meanwhile: run it again"
            raise OSError(
                error.errno,
                f"{output} must be free for the new result, got {error.strerror}; {rest}",
            ) from error
        shutil.rmtree(partial, ignore_errors=True)


def place_of(output: Path) -> Path:
    """The absolute path of ``output`` or, if it is a link, of its target; it need not exist.

    Raises:
        ValueError: it is a link to itself.
    """
    if not output.is_symlink():
        return output.absolute()
    place = Path(os.path.realpath(output))
    if place.is_symlink():
        raise ValueError(
            f"output must be a path that leads somewhere, got {str(output)!r}, a link to itself; "
            "remove the link"
        )
    return place


def require_place(output: Path) -> Path:
    """``place_of`` an output, after checking that a folder can be renamed to it.

    Raises:
        ValueError: it is a mount point, or a link to itself.
    """
    place = place_of(output)
    if _is_mount_point(place):
        raise ValueError(
            f"output must be a folder below a mount point, got {str(output)!r}, which is one; "
            f"use {str(output / 'prepared')!r}"
        )
    return place


def require_writable(output: Path) -> None:
    """Raise OSError if nothing can be written next to ``output``."""
    folder = next(one for one in place_of(output).parents if one.exists())
    if not folder.is_dir():
        raise NotADirectoryError(_not_writable(folder, f"{str(folder)!r} is a file"))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(_not_writable(folder, "no permission, or a read-only disk"))


def partial_of(output: Path) -> Path:
    """Path of the staging folder of ``output``, next to it or to the target of the link."""
    output = place_of(output)
    return output.parent / f".{output.name}.partial"


@contextlib.contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Context manager that creates the staging folder and holds its lock.

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
            raise PermissionError(_not_writable(partial.parent, error.strerror)) from error
        yield


def put_in_place(result: Path, output: Path) -> None:
    """Replace ``output`` by the complete ``result``; the old folder stays in the staging folder.

    This is atomic if the file system can exchange two folders. Otherwise it takes two renames, and
    ``settle`` does the second if the process is killed between them. An old folder that cannot be
    renamed is deleted.
    """
    output = place_of(output)
    if _exchange(result, output):
        return
    aside = result.with_name(FORMER)
    if aside.exists():
        shutil.rmtree(aside)
    try:
        output.rename(aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        aside.mkdir()  # says what happens here, should the process be killed
        shutil.rmtree(output)
        result.rename(output)
        return
    try:
        result.rename(output)
    except OSError:
        aside.rename(output)
        raise


def settle(output: Path) -> bool:
    """Complete a replacement that was killed between its steps; returns whether there was one.

    In that state ``output`` is missing or half deleted, and the staging folder holds the old folder
    and the new, complete one, which is renamed to ``output``. Does nothing if there is no such
    state, or while another process holds the lock.

    Raises:
        OSError: it cannot be renamed; the message says what to do.
    """
    output, partial = place_of(output), partial_of(output)
    found = partial / RESULT
    found = found if found.is_dir() else partial / FORMER
    if not _is_unsettled(output, partial):
        return False
    try:
        with _locked(partial):
            if not _is_unsettled(output, partial):  # another process may have settled it since
                return False
            if output.exists():
                shutil.rmtree(output)
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
    """Path of a file in an output folder, after ``settle`` if it is missing; None if still so."""
    path = folder / name
    if not path.is_file():
        settle(folder)
    return path if path.is_file() else None


def _is_unsettled(output: Path, partial: Path) -> bool:
    is_replaced = (partial / FORMER).is_dir()
    return is_replaced and (not os.path.lexists(output) or (partial / RESULT).is_dir())


def _is_mount_point(path: Path) -> bool:
    """Whether a disk, a folder or a file is mounted there; ``ismount`` overlooks bind mounts."""
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        lines = []
    places = (re.sub(r"\\([0-7]{3})", _octal, line.split(" ")[4]) for line in lines)
    return os.path.ismount(path) or os.path.realpath(path) in places


def _octal(found: re.Match[str]) -> str:
    return chr(int(found[1], 8))


def _not_writable(folder: Path, reason: str | None) -> str:
    return (
        f"output must be in a folder that can be written, got {str(folder)!r} ({reason}); "
        "choose another folder or fix its permissions"
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with os.fdopen(open_lock(folder / "lock"), "w") as lock:
        if not lock_file(lock.fileno(), folder / "lock"):
            raise BusyError(
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
