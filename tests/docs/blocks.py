"""Code blocks of a Markdown page, with what the page says about running each.

A comment above a block says how it is treated::

    <!-- test: dryrun -->           its commands are parsed and planned, not carried out
    <!-- test: needs faiss -->      it is run where that package is installed
    <!-- test: skip the reason -->  it cannot be run; the reason is for the reader of the source
    <!-- test: setup ... -->        Python that is run first and not shown
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("**/*.md"))]

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
_MARK = re.compile(r"<!-- test: (?P<kind>\w+) ?(?P<rest>.*?)\s*-->", re.S)


@dataclass(frozen=True, slots=True)
class Block:
    """One code block, or the hidden Python before one.

    Attributes:
        place: file and line, for messages.
        language: as the fence says; "" where it says nothing.
        text: without indentation.
        mark: "run", "dryrun", "needs", "skip" or "setup".
        note: what follows the mark: a package, or a reason.
    """

    place: str
    language: str
    text: str
    mark: str = "run"
    note: str = ""

    def commands(self) -> list[str]:
        """Lines of a shell block, continued ones joined, comments left out."""
        joined = self.text.replace("\\\n", " ")
        lines = (line.strip() for line in joined.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order, hidden ones included."""
    text = page.read_text(encoding="utf-8")
    found: list[tuple[int, Block]] = []
    fences = list(_FENCE.finditer(text))
    for fence in fences:
        kind, note = _mark_above(text[: fence.start()])
        place = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, fence.start()) + 1}"
        body = textwrap.dedent(fence["text"])
        found.append((fence.start(), Block(place, fence["language"], body, kind, note)))
    for mark in _MARK.finditer(text):
        inside = any(fence.start() < mark.start() < fence.end() for fence in fences)
        if mark["kind"] == "setup" and not inside:
            place = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, mark.start()) + 1}"
            found.append((mark.start(), Block(place, "python", mark["rest"], "setup")))
    return [block for _, block in sorted(found, key=lambda pair: pair[0])]


def _mark_above(text: str) -> tuple[str, str]:
    """Kind and note of the comment that stands directly above a block."""
    marks = list(_MARK.finditer(text))
    if not marks or text[marks[-1].end() :].strip() or marks[-1]["kind"] == "setup":
        return "run", ""
    return marks[-1]["kind"], marks[-1]["rest"]
