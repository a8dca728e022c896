"""Pages that explain queries hold the examples that the scores name, in their order, and nothing of the others."""

import base64
import html
import io
import re

import numpy as np
import pytest
import torch

from fastif import EKFAC, Influence
from fastif.influence.token_parts import split_by_token
from fastif.report import explain
from tests.report.test_report import Tags

SCORES = torch.tensor([[0.5, -0.25, 0.0, 2.0, -1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
TRAIN = ["first & foremost", "second", "third", "fourth", "fifth"]


def sides(path):
    """Of each side the items: example, score, shown text."""
    page = path.read_text()
    Tags(page)
    found = []
    for side in page.split("Helps most")[1].split("Harms most"):
        items = [item.split("</li>")[0] for item in side.split("<li")[1:]]
        plain = [re.sub("<[^>]+>", "|", item) for item in items]
        found.append(
            [[part for part in item.split("|") if part.strip(" >") and "class=" not in part] for item in plain]
        )
    return found


def test_the_best_of_both_sides_in_their_order(tmp_path):
    paths = explain(SCORES, ["one", "two"], TRAIN, tmp_path / "pages", k=2, train_names=list("abcde"))
    assert [path.name for path in paths] == ["query-0.html", "query-1.html"]
    helps, harms = sides(paths[0])
    assert [item[:2] for item in helps] == [["+2.00e+00", "3 · d"], ["+5.00e-01", "0 · a"]]
    assert [item[2] for item in helps] == ["fourth", "first &amp; foremost"]
    assert [item[:3] for item in harms] == [["−1.00e+00", "4 · e", "fifth"], ["−2.50e-01", "1 · b", "second"]]
    page = paths[0].read_text()
    assert "third" not in page
    assert "one" in page
    assert "of 5, that help" in page
    assert 'href="query-1.html"' in page
    assert "standard error" not in page
    helps, harms = sides(paths[1])
    assert [item[1] for item in helps] == ["4 · e", "3 · d"]
    assert harms == []
    assert "No example harms it." in paths[1].read_text()


def test_bars_are_as_long_as_scores_and_errors_stand_on_them(tmp_path):
    spread = torch.full((2, 5), 0.5)
    (path,) = explain(SCORES, ["one", "two"], TRAIN, tmp_path, k=1, queries=[0], spread=spread)
    page = path.read_text()
    assert re.findall(r'<rect x="0" y="2" width="([\d.]+)"', page) == ["80.00", "40.00"]  # of 2 + 0.5
    assert re.findall(r'<path d="M([\d.]+) 6H([\d.]+)', page) == [("60.00", "100.00"), ("20.00", "60.00")]
    assert page.count("± 5.0e-01") == 2
    assert "± is a standard error" in page


def test_tokens_are_coloured_by_their_parts(tmp_path):
    train = [["<b>", " new", " card"], ["lost"], ["x"], ["y"], ["z"]]
    parts = torch.zeros(2, 5, 3)
    parts[0, 0] = torch.tensor([0.5, -1.0, 0.0])
    parts[0, 1, 0] = -0.25
    scores = torch.zeros(2, 5)
    scores[0, 0], scores[0, 1] = 0.5, -0.25
    for given in (parts, lambda row, indices: parts[row, indices]):
        (path,) = explain(scores, ["q", "r"], train, tmp_path, queries=[0], by_token=given)
        page = path.read_text()
        spans = re.findall(r'<span style="background: rgba\(([\d, .]+)\)" title="([^"]+)">([^<]+)</span>', page)
        assert [(colour, html.unescape(text)) for colour, _, text in spans] == [
            ("0, 114, 178, 0.25", "<b>"),
            ("213, 94, 0, 0.50", " new"),
            ("213, 94, 0, 0.00", " card"),
            ("213, 94, 0, 0.50", "lost"),
        ]
        assert [title for _, title, _ in spans[:2]] == ["+5.00e-01", "−1.00e+00"]


def pictures(page):
    from PIL import Image

    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


@pytest.mark.parametrize("form", ["uint8", "float", "grey", "paths"])
def test_images_are_in_the_page_pixel_by_pixel(tmp_path, form):
    from PIL import Image

    pixels = torch.randint(0, 256, (5, 3, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = {"uint8": pixels, "float": pixels / 255, "grey": pixels[:, 0].numpy(), "paths": []}[form]
    if form == "grey":
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    for i, image in enumerate(pixels if form == "paths" else ()):
        given.append(tmp_path / f"{i}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(given[-1])
    (path,) = explain(SCORES[:1], given[:1], given, tmp_path / "pages", k=2)
    shown = pictures(path.read_text())
    assert len(shown) == 5
    for found, place in zip(shown, [0, 3, 0, 4, 1], strict=True):
        assert torch.equal(torch.from_numpy(found).permute(2, 0, 1), pixels[place])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(scores=SCORES[0]), "scores must be [q, n], got [5]"),
        (dict(train=TRAIN[:3]), "scores [2, 5] need 5 of train, got 3"),
        (dict(query_names=["a"]), "scores [2, 5] need 2 of query_names, got 1"),
        (dict(spread=SCORES[:1]), "spread must be of the scores' shape [2, 5], got [1, 5]"),
        (dict(k=0), "k must be an integer >= 1, got 0"),
        (dict(queries=[2]), "queries must be in [0, q=2), got 2"),
        (dict(by_token=torch.zeros(2, 5, 3)), "train must be lists of tokens"),
        (dict(train=[[w] for w in TRAIN], by_token=torch.zeros(2, 4, 3)), "by_token must be [2, 5, t], got [2, 4, 3]"),
        (dict(train=[[w] for w in TRAIN], by_token=lambda *_: torch.zeros(1, 3)), "must give finite parts [4, t], got"),
        (dict(scores=SCORES.log()), "scores must be finite, query 0 has nan at 1"),
        (dict(spread=SCORES / 0), "spread must be finite, query 0 has inf at 0"),
        (dict(query=torch.zeros(2, 4), train=torch.zeros(5, 4)), "images must be [h, w] or [c, h, w] with c of 1 or 3"),
        (dict(query=torch.zeros(2, 4, 4), train=torch.zeros(5, 4, 4) - 1), "example 3 goes from -1 to -1: undo what"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, change, words):
    given = {"scores": SCORES, "query": ["one", "two"], "train": TRAIN, "out": tmp_path, **change}
    scores, query, train, out = (given.pop(name) for name in ("scores", "query", "train", "out"))
    with pytest.raises(ValueError, match=re.escape(words)):
        explain(scores, query, train, out, **given)


def test_parts_by_token_and_their_rest_add_up_where_layers_see_other_positions():
    torch.manual_seed(0)

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean(1)

    layers = torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(*layers, Mean(), torch.nn.Linear(4, 3))
    x, y = torch.randn(20, 6, 5), torch.arange(20) % 3
    influence = Influence(model, curvature=EKFAC(), batch_size=7, progress=False).fit((x, y))
    parts, rest = split_by_token(influence.fitted, (x[:4], y[:4]), (x, y), 6)
    assert parts.shape == (4, 20, 6)
    by_layer = influence.scores((x[:4], y[:4]), (x, y), by="layer")
    assert torch.allclose(parts.sum(2), by_layer["0"] + by_layer["3"], rtol=1e-3, atol=1e-5)
    assert torch.allclose(rest, by_layer["2"] + by_layer["5"], rtol=1e-3, atol=1e-5)
    alone = Influence(model, curvature=EKFAC(), layers=["0", "3"], progress=False).fit((x, y))
    want = alone.scores((x[:4], y[:4]), (x, y), by="token")
    assert torch.allclose(split_by_token(alone.fitted, (x[:4], y[:4]), (x, y), 6)[0], want, rtol=1e-3, atol=1e-6)
