"""Pages that explain single queries by the training examples that help and harm each of them most."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastif.files import write_whole
from fastif.influence.score_folder import ScoreFolder
from fastif.influence.tiles import best_of
from fastif.report.pages import document, text_of

HELPS, HARMS = "0, 114, 178", "213, 94, 0"  # Okabe and Ito's blue and orange: apart for colour-blind eyes
_STRONGEST = 0.5  # opacity of a token's colour; the text stays readable on it
_STYLE = """
.query { border: 1px solid #c9d0d8; border-radius: .6rem; padding: 1rem 1.2rem; margin: 1.2rem 0; background: #f5f7f9; }
.query .shown { font-size: 1.15rem; } .query img { width: 11rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 0 2.2rem; }
.sides h2 { margin-bottom: .4rem; } .sides h2 b { font-size: .9em; }
ol { list-style: none; margin: 0; padding: 0; }
li { border-top: 1px solid #e3e7ec; padding: .65rem 0; }
li.row { display: grid; grid-template-columns: 11rem 1fr; gap: 0 1rem; align-items: start; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); gap: .4rem 1.1rem; }
.pictures li { border: 0; }
.score { font-variant-numeric: tabular-nums; font-weight: 600; white-space: nowrap; }
.score i { color: #5b6675; font-style: normal; font-weight: 400; font-size: .85em; }
svg { display: block; width: 100%; height: 12px; }
.name { color: #4a5563; font-size: .85rem; overflow-wrap: anywhere; }
.shown { overflow-wrap: anywhere; white-space: pre-wrap; }
.shown span { border-radius: .2em; padding: .05em 0; }
li img, .query img { image-rendering: pixelated; border-radius: .3rem; border: 1px solid #e3e7ec; }
li img { width: 100%; margin-bottom: .35rem; }
.note { color: #4a5563; font-size: .9rem; } nav { font-size: .9rem; margin-bottom: 1.4rem; }
"""


def explain(
    scores: Tensor | ScoreFolder,
    query: Any,
    train: Any,
    out: str | Path,
    *,
    k: int = 8,
    queries: Sequence[int] | None = None,
    spread: Tensor | ScoreFolder | None = None,
    by_token: Tensor | ScoreFolder | Callable[[int, Tensor], Tensor] | None = None,
    query_names: Sequence[Any] | None = None,
    train_names: Sequence[Any] | None = None,
    measurement: str = "loss",
) -> list[Path]:
    """Writes a page for each query, `query-0.html` and so on, and returns their paths.

    A page shows the query, the k training examples that help it most (largest scores, above zero) and the k that harm
    it most (smallest, below zero). It needs nothing but itself: pictures are in it.

    >>> from tempfile import TemporaryDirectory
    >>> scores = torch.tensor([[0.25, -0.5, 0.0]])
    >>> with TemporaryDirectory() as folder:
    ...     (page,) = explain(scores, ["my card is lost"], ["lost card", "new card", "hello"], folder)
    ...     page.name, "lost card" in page.read_text(), "hello" in page.read_text()
    ('query-0.html', True, False)

    Args:
        scores: [q, n], as `Influence.scores` or `Index.scores` give them: predicted rises of a query's measurement
            without a training example. docs/math.md (2).
        query, train: q and n things to show: texts; texts as lists of their tokens, which follow each other as they
            are; or images: a tensor or array [n, h, w], [n, c, h, w] with c of 1 or 3 (uint8, or floats in [0, 1]), or
            image files, each a `pathlib.Path` (strings are texts).
        out: a folder for the pages.
        k: examples on each side, >= 1.
        queries: rows of `scores` to write pages for; default all.
        spread: standard errors [q, n] of the scores (`Influence.scores(..., spread=True)`), shown as error bars.
        by_token: the tokens' parts in the scores [q, n, t] (`Influence.scores(by="token")`), or a function of a query
            and int64 [m] indices of training examples that gives [m, t]. Tokens are coloured by them, blue for those
            that help and orange for those that harm. Default, and where no token has a part: all of a text by
            the sign of its score. `train` must be lists of tokens; tokens beyond t stay without colour.
        query_names, train_names: a line for each, such as a label or an id, beside its number.
        measurement: what the scores are of, in words.

    Raises ValueError for lengths that do not fit the scores, scores or standard errors that are NaN or Inf, parts of
    texts that are no lists of tokens, images of another form, and floats outside of [0, 1].
    """
    shape = tuple(scores.shape)
    if len(shape) != 2:
        raise ValueError(f"explain: scores must be [q, n], got {list(shape)}")
    q, n = shape
    for name, given, size in (
        ("query", query, q),
        ("train", train, n),
        ("query_names", query_names, q),
        ("train_names", train_names, n),
    ):
        if given is not None and len(given) != size:
            raise ValueError(f"explain: scores {list(shape)} need {size} of {name}, got {len(given)}")
    if spread is not None and tuple(spread.shape) != shape:
        raise ValueError(f"explain: spread must be of the scores' shape {list(shape)}, got {list(spread.shape)}")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"explain: k must be an integer >= 1, got {k!r}")
    if by_token is not None and not _is_tokens(train):
        raise ValueError("explain: by_token= colours tokens: train must be lists of tokens")
    if by_token is not None and not callable(by_token) and tuple(by_token.shape[:2]) != shape:
        raise ValueError(f"explain: by_token must be [{q}, {n}, t], got {list(by_token.shape)}")
    rows = range(q) if queries is None else list(queries)
    for row in rows:
        if not 0 <= row < q:
            raise ValueError(f"explain: queries must be in [0, q={q}), got {row}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for place, row in enumerate(rows):
        found = _best(scores, spread, row, min(k, n))
        indices = torch.tensor([hit.place for hits in found for hit in hits], dtype=torch.int64)
        parts = None if by_token is None else _parts(by_token, row, indices)
        beside = rows[place - 1] if place else None, rows[place + 1] if place + 1 < len(rows) else None
        names = (_name(query_names, row), train_names)
        paths.append(out / f"query-{row}.html")
        write_whole(paths[-1], _page(row, query, train, found, parts, names, n, beside, measurement))
    return paths


class _Hit(NamedTuple):
    place: int
    score: float
    error: float | None


def _best(scores: Any, spread: Any, row: int, k: int) -> tuple[list[_Hit], list[_Hit]]:
    """Those that help a query most, and those that harm it most."""
    values = scores[row, :]
    errors = None if spread is None else spread[row, :]
    for name, given in (("scores", values), ("spread", errors)):
        if given is not None and not bool(given.isfinite().all()):
            index = int((~given.isfinite()).nonzero()[0])
            raise ValueError(f"explain: {name} must be finite, query {row} has {float(given[index])} at {index}")
    sides = []
    for largest in (True, False):
        best, indices = best_of(None, values[None], 0, k, largest)
        hits = zip(indices[0].tolist(), best[0].tolist(), strict=True)
        kept = [(index, score) for index, score in hits if (score > 0 if largest else score < 0)]
        sides.append([_Hit(i, score, None if errors is None else float(errors[i])) for i, score in kept])
    return sides[0], sides[1]


def _parts(by_token: Any, row: int, indices: Tensor) -> dict[int, list[float]] | None:
    """By example; None where no token has a part, as with layers that do not see single tokens."""
    if not len(indices):
        return None
    if callable(by_token):
        parts: Any = by_token(row, indices)
    else:
        parts = torch.stack([by_token[row, place] for place in indices.tolist()])
    if parts.shape[:1] != indices.shape or parts.dim() != 2 or not bool(parts.isfinite().all()):
        raise ValueError(f"explain: by_token must give finite parts [{len(indices)}, t], got {list(parts.shape)}")
    return dict(zip(indices.tolist(), parts.tolist(), strict=True)) if bool(parts.any()) else None


# ---------------------------------------------------------------------------------------------------------------- page


def _page(
    row: int,
    query: Any,
    train: Any,
    found: tuple[list[_Hit], list[_Hit]],
    parts: dict[int, list[float]] | None,
    names: tuple[str, Sequence[Any] | None],
    n: int,
    beside: tuple[int | None, int | None],
    measurement: str,
) -> str:
    texts = _is_texts(train)
    every = [hit for hits in found for hit in hits]
    reach = max((abs(hit.score) + (hit.error or 0.0) for hit in every), default=1.0)
    largest = max((abs(hit.score) for hit in every), default=0.0)
    sides = ""
    for title, hits in zip(("help", "harm"), found, strict=True):
        items = ""
        for hit in hits:
            score = _score(hit, reach)
            shown = _shown(train, hit, None if parts is None else parts[hit.place], largest)
            name = f"<div class=name>{hit.place:,}{_apart(_name(names[1], hit.place))}</div>"
            items += (
                f"<li class=row><div>{score}{name}</div>{shown}</li>" if texts else f"<li>{shown}{score}{name}</li>"
            )
        listed = (
            f"<ol class={'texts' if texts else 'pictures'}>{items}</ol>" if hits else f"<p>No example {title}s it.</p>"
        )
        sides += f"<section><h2>{title.capitalize()}s most</h2>{listed}</section>"
    lead = (
        f"The training examples, of {n:,}, that help and that harm this query most. A score is the predicted rise of "
        f"the query's {text_of(measurement)}, in its own units, if the example is removed from the training: positive "
        "helps, negative harms."
    )
    note = _note(texts, parts is not None, any(hit.error is not None for hit in every))
    body = (
        f"<style>{_STYLE}</style>{_nav(beside)}<h1>Query {row:,}{_apart(names[0])}</h1>"
        f"<div class=query>{_shown(query, _Hit(row, 0.0, None), None, 0.0)}</div><p class=lead>{lead}</p>"
        f"{f'<p class=note>{note}</p>' if note else ''}<div class=sides>{sides}</div>"
    )
    return document(f"Query {row}", body)


def _note(texts: bool, by_token: bool, errors: bool) -> str:
    blue, orange = (
        f'<span style="background: rgba({c}, {_STRONGEST})">{w}</span>' for c, w in ((HELPS, "Blue"), (HARMS, "orange"))
    )
    note = ""
    if texts and by_token:
        note = (
            f"{blue} tokens add to their text's score, {orange} ones take from it; the stronger, the more of it within "
            "a text. A token's part is what was learned at its place: in a language model, to predict what follows; in "
            "a classifier much of it stands where the whole text is read, such as at [CLS]. "
            "What layers add that do not see single tokens is in the score alone."
        )
    elif texts:
        note = f"{blue} texts help, {orange} ones harm; the stronger, the more."
    return note + (
        " ± is a standard error: how far the score would move with other networks of the same training."
        if errors
        else ""
    )


def _nav(beside: tuple[int | None, int | None]) -> str:
    links = [
        f'<a href="query-{row}.html">{words} query {row}</a>'
        for row, words in zip(beside, ("previous:", "next:"), strict=True)
        if row is not None
    ]
    return f"<nav>{' · '.join(links)}</nav>" if links else ""


def _score(hit: _Hit, reach: float) -> str:
    """A score, its standard error, and both as a bar from zero."""
    colour = HELPS if hit.score > 0 else HARMS
    error = "" if hit.error is None else f" <i>± {hit.error:.1e}</i>"
    length = 100 * abs(hit.score) / reach
    bar = f'<rect x="0" y="2" width="{length:.2f}" height="8" fill="rgb({colour})" fill-opacity=".75"/>'
    if hit.error is not None:
        low, high = (max(0.0, length + side * 100 * hit.error / reach) for side in (-1, 1))
        line = f"M{low:.2f} 6H{high:.2f}M{high:.2f} 3V9M{low:.2f} 3V9"
        bar += f'<path d="{line}" stroke="#1c2430" fill="none" vector-effect="non-scaling-stroke"/>'
    return (
        f'<div class=score>{_signed(hit.score)}{error}</div><svg viewBox="-1 0 102 12" preserveAspectRatio="none" '
        f'role="img" aria-label="{abs(hit.score) / reach:.0%} of the largest">{bar}</svg>'
    )


def _signed(value: float) -> str:
    return f"{value:+.2e}".replace("-", "\u2212", 1) if value < 0 else f"{value:+.2e}"


def _apart(name: str) -> str:
    """A name behind a number; a long one may go on in the next line after any of its underscores."""
    return f" · {text_of(name)}".replace("_", "_<wbr>") if name else ""


def _name(names: Sequence[Any] | None, index: int) -> str:
    return "" if names is None else str(names[index])


# ------------------------------------------------------------------------------------------------ what there is to show


def _is_texts(data: Any) -> bool:
    return not isinstance(data, Tensor | np.ndarray) and isinstance(data[0], str | list | tuple)


def _is_tokens(data: Any) -> bool:
    return _is_texts(data) and not isinstance(data[0], str)


def _shown(data: Any, hit: _Hit, parts: Sequence[float] | None, largest: float) -> str:
    """A text, coloured where it has a score, or a picture."""
    if not _is_texts(data):
        return f'<img alt="example {hit.place}" src="data:image/png;base64,{_png(data[hit.place], hit.place)}">'
    text = data[hit.place]
    strongest = largest if parts is None else max(map(abs, parts[: len(text)]), default=0.0)
    if strongest == 0:  # a query, or a text of which no token has a part
        return f"<div class=shown>{text_of(''.join(text))}</div>"
    tokens, parts = (["".join(text)], [hit.score]) if parts is None else (text, parts)
    spans = [
        _coloured(text_of(token), part, _STRONGEST * abs(part) / strongest)
        for token, part in zip(tokens, parts, strict=False)
    ]
    return f"<div class=shown>{''.join(spans)}{text_of(''.join(tokens[len(parts) :]))}</div>"


def _coloured(token: str, part: float, strength: float) -> str:
    colour = HELPS if part > 0 else HARMS
    return f'<span style="background: rgba({colour}, {strength:.2f})" title="{_signed(part)}">{token}</span>'


def _png(image: Any, index: int) -> str:
    """An image as base64 of a PNG file."""
    from PIL import Image

    if isinstance(image, Path):
        made = Image.open(image).convert("RGB")
    else:
        pixels = torch.as_tensor(image).detach().cpu()
        pixels = pixels[None] if pixels.dim() == 2 else pixels
        if pixels.dim() != 3 or len(pixels) not in (1, 3):
            raise ValueError(f"explain: images must be [h, w] or [c, h, w] with c of 1 or 3, got {list(pixels.shape)}")
        if pixels.dtype != torch.uint8:
            low, high = float(pixels.min()), float(pixels.max())
            if not (0 <= low and high <= 1):
                raise ValueError(
                    f"explain: images must be uint8, or floats in [0, 1], example {index} goes from {low:.3g} to "
                    f"{high:.3g}: undo what it was normalised by"
                )
            pixels = (pixels.float() * 255).round().to(torch.uint8)
        made = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())
    held = io.BytesIO()
    made.save(held, format="PNG")
    return base64.b64encode(held.getvalue()).decode()
