"""Runs the blocks of a page as a reader would, with small sizes and in this process."""

from __future__ import annotations

import ast
import contextlib
import glob
import importlib.util
import io
import os
import re
import shlex
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.docs.blocks import ROOT, Block

from shardrec.launch.cli import main

# Added to commands, so that a page runs in seconds; an option that a page sets itself stays.
SMALL_LOG = {"--users": "300", "--items": "400", "--events": "4000", "--report-users": "100"}
SMALL_RUN = {"limits.max_steps": "8", "batches.batch_size": "32", "show_progress": "false"}


class Reader:
    """Somebody who types the blocks of a page, in order and in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def take(self, block: Block) -> None:
        """Run one block.

        Raises:
            AssertionError: it fails, or there is no way to run it.
        """
        if block.mark == "skip":
            assert block.note, f"{block.place}: a block that is skipped needs a reason"
        elif block.language == "text":
            return
        elif block.mark == "needs" and importlib.util.find_spec(block.note) is None:
            return
        elif block.language == "python" and block.mark in ("run", "needs", "setup"):
            with inside(self.folder):
                code = compile(block.text, block.place, "exec", dont_inherit=True)
                exec(code, self.names)
        elif block.language == "bash" and block.mark in ("run", "needs"):
            for command in block.commands():
                run(command, self.folder, block.place)
        elif block.language == "bash" and block.mark == "dryrun":
            for command in block.commands():
                plan(command, self.folder, block.place)
        else:
            raise AssertionError(f"{block.place}: {block.language!r}, {block.mark!r}: unknown")


def run(command: str, folder: Path, place: str) -> None:
    """Carry out a command of ours."""
    words = shlex.split(command, comments=True)
    assert words[0] == "shardrec", f"{place}: do not know how to run {command!r}; mark it"
    call([*expanded(words[1:], command, folder), *smaller(words)], folder, place)


def expanded(words: list[str], command: str, folder: Path) -> list[str]:
    """The words, with those that a shell takes for names of files in place of their pattern."""
    found: list[str] = []
    for word in words:
        is_pattern = "*" in word and f"'{word}'" not in command
        found += sorted(glob.glob(word, root_dir=folder)) if is_pattern else [word]
    return found


def smaller(words: list[str]) -> list[str]:
    """What makes a command small."""
    stage = words[1]
    if stage == "synth":
        return [word for pair in SMALL_LOG.items() for word in pair]
    if stage == "train":
        given = {word.partition("=")[0] for word in words}
        return [f"{name}={value}" for name, value in SMALL_RUN.items() if name not in given]
    return []


def plan(command: str, folder: Path, place: str) -> None:
    """Hold a command that cannot be carried out to the parser that would read it."""
    words = shlex.split(command, comments=True)
    checks = {
        "shardrec": lambda: plan_ours(words, folder, place),
        "torchx": lambda: plan_torchx(words, place),
        "make": lambda: plan_make(words, place),
        "pip": lambda: plan_pip(words, place),
        "python": lambda: plan_script(words, place),
    }
    if re.fullmatch(r"\w+=.*", words[0]) or words[:2] == [".", ".venv/bin/activate"]:
        return
    assert words[0] in checks, f"{place}: do not know how to check {command!r}"
    checks[words[0]]()


def plan_ours(words: list[str], folder: Path, place: str) -> None:
    """A job is printed instead of submitted; the launcher has a stage's arguments checked too."""
    if words[1] == "launch":
        return call(["launch", "--dryrun", *words[2:]], folder, place)
    if words[1] == "doctor":
        return call(["doctor", "--help"], folder, place)
    call(["launch", "--dryrun", words[1], "--", *words[2:]], folder, place)


def plan_torchx(words: list[str], place: str) -> None:
    """TorchX makes the request and prints it."""
    from torchx.cli.argparse_util import ArgOnceAction, torchxconfig
    from torchx.cli.main import main as torchx

    for kind in (ArgOnceAction, torchxconfig):  # an option may not come twice, not even in two runs
        kind.called_args.clear()
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with inside(ROOT), contextlib.redirect_stdout(io.StringIO()) as shown:
        torchx([words[1], "--dryrun", "--workspace", "", *words[2:]])
    for number, handler in kept.items():  # TorchX replaces them for good
        signal.signal(number, handler)
    assert "shardrec.launch.cli" in shown.getvalue(), place


def plan_make(words: list[str], place: str) -> None:
    """The target is there; nothing is made."""
    targets = [word for word in words[1:] if "=" not in word]
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(targets) <= set(known), f"{place}: {targets} of {known}"
    done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, f"{place}: {done.stderr.decode()}"


def plan_pip(words: list[str], place: str) -> None:
    """The extras exist, and so do the files of constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"\[([^]]+)\]", " ".join(words))
    named = {name for extra in extras for name in extra.split(",")}
    assert named <= set(project["optional-dependencies"]), f"{place}: {named}"
    for constraints in (after for word, after in pairwise(words) if word == "-c"):
        assert (ROOT / constraints).is_file(), f"{place}: there is no {constraints}"


def plan_script(words: list[str], place: str) -> None:
    """The script is there and its source names every option."""
    script = ROOT / words[1]
    assert script.is_file(), f"{place}: there is no {words[1]}"
    sources = [script, *script.parent.glob("*.py")]
    known = {text for source in sources for text in strings(source)}
    for option in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
        assert option in known, f"{place}: {words[1]} has no option {option}"


def strings(source: Path) -> Iterator[str]:
    """The string constants of a Python file."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def call(words: list[str], folder: Path, place: str) -> None:
    """Run ``shardrec`` here; what it prints is shown when it fails."""
    shown = io.StringIO()
    with inside(folder), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        code = main(words)
    assert code == 0, f"{place}: shardrec {shlex.join(words)}: exit code {code}\n{shown.getvalue()}"


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The folder is the present one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
