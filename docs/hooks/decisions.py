"""Build hook: puts the fragments of ``docs/decisions.d`` into the page of decisions.

One file for each subject, in the order of their names; each begins with its title.
"""

import re
from pathlib import Path
from typing import Any

PAGE = "decisions.md"
MARK = "<!-- fragments of decisions.d -->"
FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)
HEADING = re.compile(r"^#(?=#* )", re.M)
FRAGMENTS = Path(__file__).resolve().parent.parent / "decisions.d"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str | None:
    """The page with its mark replaced by the fragments."""
    if page.file.src_uri != PAGE:
        return None
    if MARK not in markdown:
        raise ValueError(f"{PAGE} must hold {MARK!r}, got a page without it; put it back")
    return markdown.replace(MARK, assemble(FRAGMENTS))


def assemble(folder: Path) -> str:
    """All fragments of a folder, one after another, their titles as headings of the second level.

    Raises:
        ValueError: a fragment does not begin with a heading.
    """
    return "\n\n".join(section(path) for path in sorted(folder.glob("*.md")))


def section(path: Path) -> str:
    """One fragment; where its title is of the first level, all of its headings move down by one."""
    text = path.read_text(encoding="utf-8").strip()
    if not text.startswith(("# ", "## ")):
        got = text.partition("\n")[0]
        raise ValueError(f"{path.name} must begin with '# ', got {got!r}; give it a title")
    if text.startswith("## "):
        return text
    parts = FENCE.split(text)  # every second part is code, and its comments are no headings
    parts[::2] = [HEADING.sub("##", part) for part in parts[::2]]
    return "".join(parts)
