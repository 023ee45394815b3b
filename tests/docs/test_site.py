"""The site as it is published: built strictly, links that lead somewhere, nothing fetched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

import pytest
from tests.docs.blocks import README, ROOT

from shardrec.pipeline.config import flatten
from shardrec.pipeline.recipes import RECIPES

# Attributes whose address is fetched when the page is opened.
FETCHED = {
    **dict.fromkeys(("audio", "embed", "iframe", "img", "input", "script", "source"), "src"),
    **dict.fromkeys(("image", "link", "use"), "href"),
    "object": "data",
}


class Page(HTMLParser):
    """Where a page of HTML points to.

    Attributes:
        anchors: ids and names that a link may point to.
        links: addresses of ``<a>``.
        resources: addresses that a browser fetches by itself.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value is not None}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        is_fetched = tag in FETCHED and found.get("rel") not in ("canonical", "next", "prev")
        if is_fetched and FETCHED[tag] in found:
            self.resources.append(found[FETCHED[tag]])
        self.resources += re.findall(r"url\(['\"]?([^)'\"]+)", found.get("style", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning fails the build."""
    for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(name, reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    settings = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@cache
def read(path: Path) -> Page:
    return Page(path)


def pages(site: Path) -> list[Path]:
    found = sorted(site.glob("**/*.html"))
    assert len(found) > 10
    return found


def internal_links(site: Path) -> Iterator[tuple[Path, Path, str]]:
    """Page, target and anchor of every link inside the site; 404.html has absolute ones."""
    for path in pages(site):
        for link in read(path).links:
            parts = urlsplit(link)
            if not parts.scheme and not parts.netloc:
                base = site if parts.path.startswith("/") else path.parent
                target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
                target = target / "index.html" if target.is_dir() else target
                yield path, target, unquote(parts.fragment)


@pytest.mark.slow
def test_every_internal_link_and_anchor_leads_somewhere(site: Path) -> None:
    links = list(internal_links(site))
    assert len(links) > 100
    for page, target, anchor in links:
        where = f"{page.relative_to(site)} links to {target}#{anchor}"
        assert target.is_file(), where
        if anchor and target.suffix == ".html":
            assert anchor in read(target).anchors, where


@pytest.mark.slow
def test_external_links_are_whole_addresses(site: Path) -> None:
    for path in pages(site):
        for link in read(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert is_whole(parts), f"{path.relative_to(site)}: {link}"


def is_whole(parts: SplitResult) -> bool:
    """Whether an address has a scheme of the web and a host."""
    return parts.scheme in ("http", "https") and "." in (parts.hostname or "")


@pytest.mark.slow
def test_the_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for path in pages(site):
        fetched = read(path).resources
        assert fetched, path
        assert [one for one in fetched if is_elsewhere(one)] == [], path.relative_to(site)
    for path in site.glob("**/*.css"):
        fetched = re.findall(r"(?:url\(|@import )['\"]?([^)'\"; ]+)", path.read_text())
        assert [one for one in fetched if is_elsewhere(one)] == [], path.relative_to(site)


def is_elsewhere(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


@pytest.mark.slow
def test_formulas_are_mathml_and_no_latex_is_left(site: Path) -> None:
    text = read(site / "mathematics.html").text
    assert text.count("<math") > 30
    assert "arithmatex" not in text and "\\frac" not in text


@pytest.mark.slow
def test_the_reference_has_every_option_of_every_recipe(site: Path) -> None:
    text = read(site / "configuration.html").text
    for recipe in RECIPES.values():
        for name, _ in flatten(recipe("data", "run")):
            assert name.endswith(".type") or f">{name}</code>" in text, name


@pytest.mark.slow
def test_every_fragment_of_the_decisions_is_on_their_page(site: Path) -> None:
    text = read(site / "decisions.html").text
    for path in (ROOT / "docs" / "decisions.d").glob("*.md"):
        title = path.read_text().partition("\n")[0].lstrip("# ")
        assert plain(title) in plain(re.sub(r"<[^>]*>", "", text)), path.name
    assert "fragments of decisions.d" not in text


def plain(text: str) -> str:
    """Letters and digits alone, so that markup and typography do not matter."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def test_the_links_of_the_readme_lead_to_files_and_headings() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README.read_text())
    assert len(links) > 10
    for link in links:
        name, _, anchor = link.partition("#")
        target = ROOT / name if name else README
        assert target.is_file(), link
        if anchor:
            assert anchor in headings(target), link


def headings(page: Path) -> set[str]:
    """Anchors that a code host makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
