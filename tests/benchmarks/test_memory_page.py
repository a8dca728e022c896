"""docs/memory.md: its table is that of the kept results."""

from pathlib import Path

from benchmarks.figures import pages

PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()


def test_table_is_that_of_the_results():
    assert pages.with_tables(PAGE) == PAGE
    assert PAGE.count("<!-- table: memory-cpu -->") == 1
