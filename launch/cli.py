"""The ``shardrec`` command: one subcommand for each stage, and one rule for what goes wrong.

Exit codes: 0 the output is complete, or was before; 1 it failed, and the last line says why;
2 the input or an option is wrong, in one line; 3 a gate or a rollback stands against a publication;
75 stopped by SIGTERM, to be started again; 130 interrupted; 143 ended by SIGTERM where there are no
checkpoints. Nothing but 0 leaves a finished-looking output.
"""

import dis
import importlib
import sys
from collections.abc import Sequence
from types import TracebackType

import shardrec
from shardrec.launch.os_errors import WRONG_PATHS, explain
from shardrec.pipeline.run.interruption import Preempted

COMMANDS = {
    "synth": "generate an event log whose best possible metrics are known",
    "prepare": "turn an event log into a prepared folder that training streams",
    "train": "train on a prepared folder",
    "evaluate": "rank the whole catalog for the test users and write the metrics",
    "recommend": "write the best items of every user to Parquet",
    "export": "write item vectors and the encoder for a service",
    "gate": "compare an evaluated run with the published model on the same users",
    "publish": "let a pointer name an export, in one step",
    "rollback": "let a pointer name what it named before",
    "report": "write one HTML page that shows and compares runs",
    "plan": "say what a run will cost each rank, and how large a catalog fits",
    "launch": "run a stage through TorchX, here or on a cluster",
    "doctor": "say what is installed, whether it fits together, how to mend it",
    "demo": "the whole job on generated data or on your own log, with a table",
}
# Where the functions of the commands are, but for those of shardrec.launch.commands.
ELSEWHERE = {
    **dict.fromkeys(("recommend", "export", "gate", "publish", "rollback"), "delivery"),
    **dict.fromkeys(("launch", "report", "doctor", "demo"), "tools"),
}
BAD_INPUT, FAILED, REFUSED, INTERRUPTED = 2, 1, 3, 130
PREEMPTED = 75  # "temporary failure, try again" among the codes of sysexits.h


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
        from shardrec.pipeline.config import unknown_name

        print(f"shardrec: {unknown_name('command', name, list(COMMANDS))}", file=sys.stderr)
        return BAD_INPUT
    return run(name, rest)


def usage() -> str:
    """What ``shardrec --help`` prints."""
    lines = [f"  {name:<10} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: shardrec COMMAND [options]; shardrec COMMAND --help says more",
            "",
            "Trains sequential recommenders over row-sharded catalogs of items.",
            "",
            *lines,
            "",
            "exit codes: 0 complete, 1 failed, 2 wrong input or option, 3 not to be published,\n"
            "75 stopped by SIGTERM and to be started again, 130 interrupted, 143 ended by SIGTERM",
        ]
    )


def run(name: str, arguments: list[str]) -> int:
    """Run a subcommand; errors that were raised for the user become one line on stderr."""
    try:
        module = f"shardrec.launch.{ELSEWHERE.get(name, 'commands')}"
        return int(getattr(importlib.import_module(module), name)(arguments))
    except SystemExit as stopped:  # a parser has said what is wrong, or printed its help
        if not isinstance(stopped.code, int | None):
            raise
        return stopped.code or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "shardrec").partition(".")[0] == "shardrec":
            raise
        message = f"{error.name} is not installed; run `make setup`, or `shardrec doctor` for more"
        print(f"shardrec {name}: {message}", file=sys.stderr)
        return FAILED
    except Exception as error:
        if not is_for_the_user(error):
            raise
        print(f"shardrec {name}: {spell(error)}", file=sys.stderr)
        return exit_code(error)


def is_for_the_user(error: Exception) -> bool:
    """Whether ``error`` was raised on purpose to tell the user, and not by a bug.

    So it is when a ``raise`` of this package made it (a failed assertion excepted), or when the
    operating system refused something.
    """
    if isinstance(error, OSError):
        return True
    last = _last_frame(error.__traceback__)
    if isinstance(error, AssertionError) or last is None:
        return False
    ours = last.tb_frame.f_globals.get("__name__", "").startswith("shardrec.")
    instruction = last.tb_frame.f_code.co_code[last.tb_lasti]
    return ours and instruction == dis.opmap["RAISE_VARARGS"]


def _last_frame(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def spell(error: Exception) -> str:
    """The message in one line."""
    text = explain(error) if isinstance(error, OSError) else str(error)
    return " ".join((text or type(error).__name__).split())


def exit_code(error: Exception) -> int:
    """2 when the input is at fault, 75 after SIGTERM, 1 when something failed on the way."""
    if isinstance(error, Preempted):
        return PREEMPTED
    missing = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
    wrong = (ValueError, TypeError, PermissionError, *missing)
    is_path = isinstance(error, OSError) and error.errno in WRONG_PATHS
    return BAD_INPUT if is_path or isinstance(error, wrong) else FAILED


if __name__ == "__main__":
    sys.exit(main())
