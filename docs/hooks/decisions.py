"""Build hook: puts the fragments of ``docs/decisions.d`` into the page of decisions.

One file a subject, in the order of their names; each begins with a heading of the second level.
"""

from pathlib import Path
from typing import Any

PAGE = "decisions.md"
MARK = "<!-- fragments of decisions.d -->"
FRAGMENTS = Path(__file__).resolve().parent.parent / "decisions.d"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str | None:
    """The page with its mark replaced by the fragments."""
    if page.file.src_uri != PAGE:
        return None
    if MARK not in markdown:
        raise ValueError(f"{PAGE} must hold {MARK!r}, got a page without it; put it back")
    return markdown.replace(MARK, assemble(FRAGMENTS))


def assemble(folder: Path) -> str:
    """All fragments of a folder, one after another.

    Raises:
        ValueError: a fragment does not begin with a heading of the second level.
    """
    parts = []
    for path in sorted(folder.glob("*.md")):
        text = path.read_text(encoding="utf-8").strip()
        if not text.startswith("## "):
            got = text.partition("\n")[0]
            raise ValueError(f"{path.name} must begin with '## ', got {got!r}; give it a heading")
        parts.append(text)
    return "\n\n".join(parts)
