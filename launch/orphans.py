"""End workers when the process that started them is gone, instead of leaving them running.

SIGKILL of ``shardrec launch`` or of torchrun, or a closed session, leaves the workers running,
because they are in sessions of their own. So every worker checks for both once a second. If one is
gone, the worker sends itself SIGTERM, after which training writes a checkpoint.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["LAUNCHER", "end_with_launcher", "is_running", "logs_of_launch", "this_process"]

# Set for local workers by `shardrec launch`: which process it is.
LAUNCHER = "SHARDREC_LAUNCHER"
INTERVAL_S = 1.0
LOGS = "shardrec-launch-"


@contextlib.contextmanager
def end_with_launcher(environment: Mapping[str, str]) -> Iterator[None]:
    """Context manager: inside it, this process gets SIGTERM if the launcher or torchrun is gone.

    Args:
        environment: environment variables, which tell what started this process. Nothing is done
            for a process that was started by hand.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in environment
    if not under_torchrun and LAUNCHER not in environment:
        yield
        return
    # One worker is enough to ask torchrun, which asks all others.
    asks = os.getppid() if under_torchrun and environment.get("LOCAL_RANK") == "0" else None
    silent = under_torchrun and asks is None
    launcher = None if silent else environment.get(LAUNCHER)
    over = threading.Event()
    watch = (os.getppid(), launcher, asks or os.getpid(), over)
    threading.Thread(target=_watch, args=watch, name="launcher", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(parent: int, launcher: str | None, asked: int, over: threading.Event) -> None:
    """Wait for the end of parent and launcher; SIGTERM to this process, or to ``asked``."""
    while not over.wait(INTERVAL_S):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if launcher is not None and not is_running(launcher):
            launcher = None
            with contextlib.suppress(ProcessLookupError):
                os.kill(asked, signal.SIGTERM)


def this_process() -> str:
    """Text that identifies this process: its id and its start time, because ids are reused."""
    return f"{os.getpid()}-{_start(os.getpid())}"


def is_running(process: str) -> bool:
    """Whether the process that ``this_process`` identifies is still running on this machine."""
    number, _, start = process.partition("-")
    return _start(int(number)) == start


def _start(number: int) -> str | None:
    """When a process was started, in ticks of the kernel; None if it has ended."""
    try:
        text = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # its name, before, may hold anything
    return None if fields[0] in "ZX" else fields[19]


@contextlib.contextmanager
def logs_of_launch() -> Iterator[Path]:
    """Context manager: a folder for the workers' output, removed at the end.

    It also removes such folders of launchers that were killed.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{LOGS}*"):
        process = left.name.removeprefix(LOGS).partition("_")[0]
        with contextlib.suppress(ValueError):
            if not is_running(process):
                shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"{LOGS}{this_process()}_")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
