"""What the build hooks of the documentation write."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
from tests.docs.blocks import ROOT


def hook(name: str) -> ModuleType:
    path = ROOT / "docs" / "hooks" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"hook_{name}", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A part.

    Attributes:
        ks: list lengths.
    """

    ks: tuple[int, ...] = (5, 10)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A config.

    Attributes:
        name: of the thing.
        mode, other: "a" or "b|c".
        inner: its part.
    """

    name: str
    mode: Literal["a", "b"] = "a"
    other: float | None = None
    inner: Inner = field(default_factory=lambda: Inner(ks=(20,)))


@dataclass(frozen=True, kw_only=True)
class Silent:
    """A config that says nothing of its field."""

    width: int = 1


def test_a_table_has_name_type_default_and_meaning_of_every_option() -> None:
    module = hook("configuration")
    rows = module.options(Outer)
    assert module.table(rows).splitlines()[2:] == [
        "| `name` | str | required | of the thing. |",
        '| `mode` | `a` or `b` | `a` | "a" or "b\\|c". |',
        '| `other` | float or none | `none` | "a" or "b\\|c". |',
        "| `inner.ks` | int, … | `20` | list lengths. |",
    ]
    assert [module.as_typed(row).name for row in rows][-1] == "--inner.ks"


def test_an_option_without_a_meaning_fails_the_build() -> None:
    with pytest.raises(ValueError, match="width must have a line in the docstring of Silent"):
        hook("configuration").options(Silent)


def test_decisions_are_sections_of_one_page(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# Second\n\n## Part\n\n```bash\n# a comment\n```\n\n# Third\n")
    (tmp_path / "a.md").write_text("## First\n\n### Part\n")
    assert hook("decisions").assemble(tmp_path) == (
        "## First\n\n### Part\n\n## Second\n\n### Part\n\n```bash\n# a comment\n```\n\n## Third"
    )


def test_a_decision_without_a_title_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("We decided.\n")
    with pytest.raises(ValueError, match="a.md must begin with '# ', got 'We decided.'"):
        hook("decisions").assemble(tmp_path)


def test_only_short_code_is_kept_in_one_line() -> None:
    mark = hook("short_code").on_page_content
    long = f"<code>{'x' * 80}</code>"
    assert mark(f"<code>--resume</code> {long}") == f'<code class="short">--resume</code> {long}'


def test_formulas_become_mathml() -> None:
    pytest.importorskip("latex2mathml", reason="the extra `docs` is not installed")
    inline, block = "\\(a &lt; b\\)", "\\[c\\]"
    page = f'<span class="arithmatex">{inline}</span><div class="arithmatex">{block}</div>'
    made = hook("mathematics").on_page_content(page)
    assert made.count("<math") == 2 and "arithmatex" not in made
    assert '<div class="formula">' in made and "&amp;lt;" not in made
