"""Relative links of every Markdown file lead to files of the repository, and their anchors to headings."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, name, prose

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def slugs(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in LINK.findall(re.sub(r"`[^`]*`", "", prose(page.read_text()))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in slugs(file)):
            wrong.append(target)
    assert not wrong, f"{name(page)} has links that lead nowhere: {', '.join(wrong)}"


def test_every_page_is_in_the_navigation_and_in_the_index() -> None:
    site = tomllib.loads((ROOT / "docs" / "zensical.toml").read_text())
    listed = set(re.findall(r"'([\w/.-]+\.md)'", str(site["project"]["nav"])))
    pages = {name(page) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert pages <= listed, "add the page to docs/zensical.toml"
    assert all((ROOT / path).exists() for path in listed)
    index = (ROOT / "docs" / "index.md").read_text()
    missing = [page for page in pages - {"docs/index.md"} if f"({page.removeprefix('docs/')})" not in index]
    assert not missing, f"docs/index.md does not link {', '.join(missing)}"


def test_the_readme_is_a_door() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
