"""Every command and snippet of the README and of the pages is run, in order, as a reader would."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from tests.docs.blocks import PAGES, README, ROOT, Block, blocks
from tests.docs.running import Reader

GET_STARTED = ROOT / "docs" / "get-started.md"
MARKS = ("run", "dryrun", "needs", "skip", "setup")
# Of README and of pages, in words.
LONGEST_README, LONGEST_PAGE = 1300, 3600


def name(page: Path) -> str:
    """How a page is called in the names of tests."""
    return str(page.relative_to(ROOT).with_suffix(""))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which somebody has followed `Get started`: a log, a prepared folder, a run."""
    folder = tmp_path_factory.mktemp("started")
    follow(GET_STARTED, folder)
    return folder


def follow(page: Path, folder: Path) -> None:
    reader = Reader(folder)
    for block in blocks(page):
        reader.take(block)


@pytest.mark.slow
def test_a_reader_can_follow_get_started_from_nothing(started: Path) -> None:
    assert (started / "run" / "metrics.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != GET_STARTED], ids=name)
def test_a_reader_can_follow_the_page_after_get_started(
    page: Path, started: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(started, folder)
    if page == README:  # it begins at the beginning
        shutil.rmtree(folder)
        folder.mkdir()
    follow(page, folder)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_its_language_and_how_it_is_tested(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("bash", "python", "text"), f"{block.place}: {block.language!r}"
        assert block.mark in MARKS, f"{block.place}: {block.mark!r}"
        assert block.note or block.mark not in ("skip", "needs"), f"{block.place}: say why"
    fences = len(re.findall(r"^ *```", page.read_text(), re.M))
    shown = [block for block in blocks(page) if block.mark != "setup"]
    assert fences == 2 * len(shown), f"{page.name}: a fence is open or was not read"


def test_a_block_that_nobody_can_run_is_refused(tmp_path: Path) -> None:
    for block in (
        Block("page:1", "bash", "curl example.org"),
        Block("page:1", "bash", "rm -r /data", "dryrun"),
        Block("page:1", "bash", "shardrec evalaute"),
        Block("page:1", "bash", "shardrec launch train -- --prepared x --runn y", "dryrun"),
        Block("page:1", "bash", "make no-such-target", "dryrun"),
        Block("page:1", "bash", 'pip install ".[no_such_extra]"', "dryrun"),
        Block("page:1", "bash", "python benchmarks/losses.py --no-such-option 1", "dryrun"),
        Block("page:1", "python", "assert False"),
        Block("page:1", "yaml", "a: 1"),
        Block("page:1", "bash", "curl example.org", "skip"),
    ):
        with pytest.raises(AssertionError):
            Reader(tmp_path).take(block)


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_can_be_read_in_one_sitting(page: Path) -> None:
    assert len(page.read_text().split()) <= LONGEST_PAGE
