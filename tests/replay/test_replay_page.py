"""docs/replay.md: its examples run in order, and its three ways to score agree in what they must."""

import re
from pathlib import Path

import pytest
import torch

from fastif.evaluation.correlation import spearman

PAGE = (Path(__file__).parents[2] / "docs" / "replay.md").read_text()


def test_examples_run(capsys):
    pytest.importorskip("sklearn", reason="the page's digits come with scikit-learn")
    names = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(example, names)
    assert "32 steps, training time" in capsys.readouterr().out
    scores, crossed, quicker, cheaper = (names[name].double() for name in ("scores", "crossed", "quicker", "cheaper"))
    assert scores.shape == crossed.shape == quicker.shape == cheaper.shape == (5, 400)
    assert torch.equal(names["values"].double(), scores.gather(1, names["indices"]))
    assert float(spearman(scores, cheaper).mean()) > 0.3  # the same network, in three segments
    assert float(spearman(quicker, crossed).mean()) > 0.3  # the same two
    assert float(spearman(scores, crossed).mean()) > 0.1  # others, of half the data
    assert max(names["replay"].deviations) < 1e-3
