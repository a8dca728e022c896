"""docs/published.md: its tables are those of the kept results, and its pictures are there."""

import re
from pathlib import Path

from benchmarks.figures import pages

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "published.md").read_text()


def test_tables_are_those_of_the_results():
    assert pages.with_tables(PAGE) == PAGE
    assert PAGE.count("<!-- table: published-") == 8


def test_pictures_are_there():
    pictures = re.findall(r"\]\(([\w-]+\.png)\)", PAGE)
    assert len(pictures) == 5
    assert all((DOCS / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
