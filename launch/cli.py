"""The ``shardrec`` command: runs a subcommand, formats its errors, chooses the exit code.

Exit codes: 0 the output is complete, or already was; 1 the command failed, and the last line says
why; 2 the input or an option is wrong, explained in one line; 3 publishing is blocked by a failed
gate or an earlier rollback; 75 try again: stopped by SIGTERM after a checkpoint, or another process
is writing the same output; 130 interrupted by Ctrl-C, training after a checkpoint; 143 ended by
SIGTERM in a stage without checkpoints. Only exit code 0 leaves an output that looks complete.

Errors meant for the user become one line: those raised by a ``raise`` statement of this package,
and those of the operating system. Every other error is a bug and keeps its traceback.
``SHARDREC_DEBUG=1`` shows all tracebacks.
"""

import errno
import importlib
import linecache
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import shardrec
from shardrec.launch.stages import COMMANDS, STAGES
from shardrec.pipeline.outputs.addresses import without_keys

BAD_INPUT, FAILED, REFUSED, INTERRUPTED = 2, 1, 3, 130
PREEMPTED = 75  # "temporary failure, try again" among the codes of sysexits.h
_WRONG_KINDS = (
    *(ValueError, TypeError, PermissionError),
    *(FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError),
)

# They come with the driver, and fbgemm's CUDA build does not load without them.
DRIVER_LIBRARIES = ("libnvidia-ml.so", "libcuda.so")

# OS errors by remedy: another path, or more free space on the disk (_NO_ROOM).
_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_PATH_RULES = {
    errno.ENOTDIR: "path must be in a folder, got {path}{which}; choose another",
    errno.EEXIST: "path must be a new name or a folder, got {path}{which}; choose another",
    errno.EISDIR: "path must name a file, got the folder {path}; choose a file",
    errno.ENOENT: "path must exist, got {path}; check it",
    errno.ENAMETOOLONG: "names must be short enough for the file system, got {name} of {length} "
    "bytes ({reason}); choose a shorter one",
}
_NO_ROOM = (
    "the disk of the output must have room for it, got {reason} at {path}; free some space and "
    "start again"
)
_RULES = _PATH_RULES | dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _NO_ROOM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--"]:  # some releases of argparse let torchrun pass it on, others do not
        words = words[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else BAD_INPUT
    if words[0] == "--version":
        print(shardrec.__version__)
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        from shardrec.pipeline.near_names import unknown_name

        print(f"shardrec: {unknown_name('command', name, list(COMMANDS))}", file=sys.stderr)
        return BAD_INPUT
    return run(name, rest)


def usage() -> str:
    """The text of ``shardrec --help``."""
    return "\n".join(
        [
            "usage: shardrec COMMAND [options]; shardrec COMMAND --help for details",
            "",
            "Trains sequential recommenders over row-sharded catalogs of items.",
            "",
            *(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()),
            "",
            "exit codes: 0 complete, 1 failed, 2 wrong input or option, 3 publishing refused,\n"
            "75 stopped by SIGTERM, or the output is in use (start again), 130 interrupted,\n"
            "143 ended by SIGTERM",
        ]
    )


def run(name: str, arguments: list[str]) -> int:
    """Run a subcommand and return its exit code; an error for the user is one line on stderr."""
    # Before torch is imported. Sizes change with every batch, and GPU memory that is kept in blocks
    # of one size has holes for the next.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        module = "commands" if name in STAGES else "tools"
        return int(importlib.import_module(f"shardrec.launch.{module}").run(name, arguments))
    except SystemExit as stopped:  # a parser has said what is wrong, or printed its help
        if not isinstance(stopped.code, int | None):
            raise
        return stopped.code or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if not is_for_the_user(error):
            raise
        if os.environ.get("SHARDREC_DEBUG", "0") != "0":
            print(without_keys(traceback.format_exc()), file=sys.stderr, end="")
        print(f"shardrec {name}: {one_line(error)}", file=sys.stderr)
        return exit_code(error)


def is_for_the_user(error: Exception) -> bool:
    """Whether ``error`` is meant for the user, rather than caused by a bug.

    True if its traceback ends in a ``raise`` statement of this package, if it comes from the
    operating system, or if a third-party package is not installed.
    """
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "shardrec").partition(".")[0] != "shardrec"
    if isinstance(error, OSError):
        return True
    *_, (frame, line) = [(None, 0), *traceback.walk_tb(error.__traceback__)]
    if frame is None or not frame.f_globals.get("__name__", "").startswith("shardrec."):
        return False
    source = linecache.getline(frame.f_code.co_filename, line, frame.f_globals)
    return source.lstrip().startswith("raise ")


def one_line(error: Exception) -> str:
    """The message of ``error`` in one line, without the access keys in addresses."""
    text = explain(error) if isinstance(error, OSError) else str(error)
    if any(library in text for library in DRIVER_LIBRARIES):
        text = (
            f"the NVIDIA driver must be here for a CUDA environment, got {text}; run it on a node "
            "with a driver, or `make setup DEVICE=cpu`"
        )
    if isinstance(error, ModuleNotFoundError):
        text = f"{error.name} is not installed; run `make setup`, or `shardrec doctor` for more"
    return without_keys(" ".join((text or type(error).__name__).split()))


def exit_code(error: Exception) -> int:
    """The exit code of an error: 2 for wrong input, 75 to try again, 1 for any other failure."""
    from shardrec.pipeline.outputs.lock import BusyError
    from shardrec.pipeline.run.interruption import Interrupted, Preempted

    if isinstance(error, Interrupted):
        return INTERRUPTED
    if isinstance(error, Preempted | BusyError):
        return PREEMPTED
    is_path = isinstance(error, OSError) and error.errno in (*_PERMISSION, *_PATH_RULES)
    return BAD_INPUT if is_path or isinstance(error, _WRONG_KINDS) else FAILED


def explain(error: OSError) -> str:
    """The message for an operating-system error: the rule, what was found, and what to do.

    Args:
        error: error raised by Python or pyarrow. If it names a file, the file is examined to
            distinguish an input that cannot be read from an output that cannot be written. A
            message that already has this form is returned without its error number.
    """
    said, number, path = str(error.strerror or error), error.errno or 0, _path_of(error)
    if " must " in said:
        return said
    if path is None or number not in (*_PERMISSION, *_RULES):
        return str(error)
    reason = os.strerror(number)
    if number in _PERMISSION:
        return _not_permitted(path, reason)
    name = max(path.parts, key=lambda part: len(os.fsencode(part)))
    file = next((str(one) for one in (path, *path.parents) if os.path.isfile(one)), None)
    return _RULES[number].format(
        path=repr(str(path)),
        which=f", where {file!r} is a file" if file else f" ({reason})",
        name=repr(name if len(name) <= 60 else f"{name[:60]}…"),
        length=len(os.fsencode(name)),
        reason=reason,
    )


def _path_of(error: OSError) -> Path | None:
    if error.filename is not None and not isinstance(error.filename, int):
        return Path(os.fsdecode(error.filename))
    # How pyarrow and the standard library name the file inside a message.
    named = re.search(r"(?:file|directory|path) '([^']+)'", str(error))
    return Path(named[1]) if named else None


def _not_permitted(path: Path, reason: str) -> str:
    """The message for a permission error: input or output, and which file or folder."""
    folder = next((one for one in path.absolute().parents if os.path.isdir(one)), Path("/"))
    if os.path.exists(path) and not _allows(path, os.R_OK):
        rule, got, kind = "input must be a file or folder that can be read", path, ""
    elif not _allows(folder, os.X_OK):
        rule, got, kind = "path must be in folders that can be entered", path, ""
        reason = f"{reason} in {str(folder)!r}"
    elif os.path.isfile(path) and _allows(folder, os.W_OK):
        rule, got, kind = "output must be a file that can be written", path, " name"
    else:
        rule, got, kind = "output must be in a folder that can be written", folder, " folder"
    return f"{rule}, got {str(got)!r} ({reason}); choose another{kind} or fix its permissions"


def _allows(path: Path, how: int) -> bool:
    return os.access(path, how, effective_ids=os.access in os.supports_effective_ids)


if __name__ == "__main__":
    sys.exit(main())
