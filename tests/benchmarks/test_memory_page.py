"""docs/memory.md: its table is that of the kept results."""

from pathlib import Path

from benchmarks.figures import tables

PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()


def test_table_is_that_of_the_results():
    assert tables.with_tables(PAGE) == PAGE
    assert PAGE.count("<!-- table: memory-cpu -->") == 1
