"""Small disks that get full or read-only: tmpfs mounts, so tests that use them need root."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """An empty disk of that size, mounted on a new folder; skips the test where it may not be."""
    folder.mkdir()
    mount(folder, "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def mount(folder: Path, *words: str) -> None:
    try:
        done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if done.returncode:
        pytest.skip(f"needs the right to mount a disk: {done.stderr.strip()}")


def fill(disk: Path) -> None:
    """Take all room that is left, also what others give free meanwhile, with one file."""
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
