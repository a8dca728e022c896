"""The recipes of docs/data.md run as they stand there, and give what they say."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
RECIPES = dict(re.findall(r"^## (.*?)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE))
((BEFORE),) = re.findall(r"with this before it:\n\n```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs(recipe):
    code = RECIPES[recipe]
    if "transformers" in code:
        pytest.importorskip("transformers", reason="the recipe shows a model of transformers")
    names = {}
    exec(BEFORE, names)
    exec(code, names)
    for name, shape in re.findall(r"^(\w+) = .*# \[([\d, ]+)\]$", code, flags=re.MULTILINE):
        assert list(names[name].shape) == [int(size) for size in shape.split(",")]
    if "change" in names:
        assert all("lora" in name for name in names["change"])
        assert len(names["change"]) == 4


def test_the_page_has_every_recipe():
    assert len(RECIPES) == 9
    assert PAGE.count("```python") == 10
