"""What the operating system refused, in the form of the project's own messages.

Stages let it through as it comes; the command asks here before it tells the user.
"""

import errno
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["WRONG_PATHS", "explain"]

# How pyarrow and the standard library name the file inside a message.
_NAMED = re.compile(r"(?:file|directory|path) '([^']+)'")
_SHOWN = 60


def explain(error: OSError) -> str:
    """The message for the user: what must hold, what was found, what to do; in one line.

    A message that is in this form already is returned as it is, without its error number.

    Args:
        error: as raised by Python or pyarrow; where it names a file, that file is looked at to
            tell an input that cannot be read from an output that cannot be written.
    """
    said = error.strerror or str(error)
    explanation = _EXPLANATIONS.get(error.errno or 0)
    path = _path_of(error)
    if " must " in said:
        return str(said)
    if explanation is None or path is None:
        return str(error)
    return explanation(path, os.strerror(error.errno or 0))


def _path_of(error: OSError) -> Path | None:
    if error.filename is not None and not isinstance(error.filename, int):
        return Path(os.fsdecode(error.filename))
    named = _NAMED.search(str(error))
    return Path(named[1]) if named else None


def _not_permitted(path: Path, reason: str) -> str:
    """Whether it is an input or an output that permissions stand against, and which."""
    folder = next((one for one in path.absolute().parents if os.path.isdir(one)), Path("/"))
    if os.path.exists(path) and not _allows(path, os.R_OK):
        return (
            f"input must be a file or folder that can be read, got {str(path)!r} ({reason}); mend "
            "its permissions or give another"
        )
    if not _allows(folder, os.X_OK):
        return (
            f"path must be in folders that can be entered, got {str(path)!r} ({reason} in "
            f"{str(folder)!r}); mend its permissions or give another"
        )
    if os.path.isfile(path) and _allows(folder, os.W_OK):
        return (
            f"output must be a file that can be written, got {str(path)!r} ({reason}); choose "
            "another name or mend its permissions"
        )
    return (
        f"output must be in a folder that can be written, got {str(folder)!r} ({reason}); choose "
        "another folder or mend its permissions"
    )


def _allows(path: Path, how: int) -> bool:
    return os.access(path, how, effective_ids=os.access in os.supports_effective_ids)


def _below_a_file(path: Path, reason: str) -> str:
    files = [one for one in (path, *path.parents) if os.path.isfile(one)]
    which = f"where {str(files[-1])!r} is a file" if files else reason
    return f"path must be in a folder, got {str(path)!r}, {which}; give another path"


def _too_long(path: Path, reason: str) -> str:
    longest = max(path.parts, key=lambda part: len(os.fsencode(part)))
    shown = longest if len(longest) <= _SHOWN else f"{longest[:_SHOWN]}…"
    return (
        f"names must be short enough for the file system, got {shown!r} of "
        f"{len(os.fsencode(longest))} bytes ({reason}); choose a shorter one"
    )


def _full(path: Path, reason: str) -> str:
    return (
        f"the disk of the output must have room for it, got {reason} at {str(path)!r}; free some "
        "space and start again"
    )


def _missing(path: Path, _: str) -> str:
    return f"path must exist, got {str(path)!r}; check it"


def _is_there(path: Path, _: str) -> str:
    what = "is a file" if os.path.isfile(path) else "is there already"
    return f"path must be a new name or a folder, got {str(path)!r}, which {what}; give another"


def _is_folder(path: Path, _: str) -> str:
    return f"path must name a file, got the folder {str(path)!r}; name a file"


_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_EXPLANATIONS: Mapping[int, Callable[[Path, str], str]] = {
    **dict.fromkeys(_PERMISSION, _not_permitted),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _full),
    errno.ENOTDIR: _below_a_file,
    errno.ENAMETOOLONG: _too_long,
    errno.ENOENT: _missing,
    errno.EEXIST: _is_there,
    errno.EISDIR: _is_folder,
}
# Errors whose remedy is another path.
WRONG_PATHS = (
    *_PERMISSION,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.EEXIST,
    errno.EISDIR,
)
