"""docs/scale.md: its tables are those of the kept results and of the formulas, and these hold together."""

from pathlib import Path

import pytest

from benchmarks.figures import pages, scale, tables

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()


def test_tables_are_those_of_the_results():
    assert pages.with_tables(PAGE) == PAGE
    assert PAGE.count("<!-- table: ranks-cpu -->") == PAGE.count("<!-- table: scale -->") == 1


def test_kept_bytes_are_those_that_were_planned():
    for row in tables.results_of("ranks-cpu")["ranks"]:
        for stage in ("fit", "scores"):
            for way in ("sent", "received"):
                assert row[stage][way] == pytest.approx(row[stage][f"{way}_planned"], rel=0.1)


def test_predictions_hold_together():
    for network, size in zip(scale.NETWORKS, (0.97e9, 6.98e9), strict=True):
        assert sum(o * d for o, d in network.layers) == pytest.approx(size, rel=0.01)
        alone = scale.predict(network, 1)
        assert alone.exchanges == alone.sent == alone.gather == 0
        assert alone.held == alone.during
        for world in scale.WORLDS:
            one = scale.predict(network, world)
            assert one.passes == pytest.approx(alone.passes / world)
            assert 1 <= world * one.queries / alone.queries < 1.2  # divided, but for whole layers
            assert 1 <= world * one.held / alone.held < 1.2
            assert one.during == alone.during
            assert alone.fit / (world * one.fit) <= 1
            assert alone.scores / (world * one.scores) >= 0.9
