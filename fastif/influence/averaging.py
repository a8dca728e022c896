"""Scores averaged over networks that were trained on parts of the data, row by row at one scale.

Each network has a curvature of its own, from the examples that it was trained on. A query's row of network k has the
spread σ_k, the standard deviation over the training examples; rows are brought to one scale before they are averaged:

    scores[q, :] = median_k σ_k · mean_k (s_k[q, :] / σ_k)

docs/math.md (23).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif.influence.fitted import Fitted
from fastif.influence.networks import are_halves
from fastif.influence.score_folder import ScoreFolder
from fastif.influence.score_job import find_missing, holds_matrices, open_folder, settings_of, write_block, write_scores
from fastif.influence.scoring import compute_scores, compute_self_influence
from fastif.influence.shared_folder import held, share_of_all
from fastif.influence.tiles import By, add_groups, check_groups


class Averaged(NamedTuple):
    """The mean over the networks, and what is known of its error."""

    values: dict[str, Tensor]  # "" or, by layer, its name
    errors: dict[str, Tensor] | None  # standard errors, of the same shapes; None where they were not asked for
    low_rank_error: float = 0.0


def average_scores(
    fitted: Fitted,
    query: Any,
    train: Any,
    query_groups: Tensor | None,
    groups: Tensor | None,
    low_rank: int | None,
    by: By,
    spread: bool,
) -> Averaged:
    """Scores in memory, [q, n] or their parts; about three times what they take while they are averaged."""
    if groups is not None:
        check_groups("groups", groups, train.n)
    low_rank_error, rows = 0.0, _rows_of(fitted, spread)
    for number, alone in enumerate(_each_alone(fitted)):
        values, error = compute_scores(alone, query, train, query_groups, None, low_rank, by)
        low_rank_error = max(low_rank_error, error)
        rows.add({name: _grouped(part, groups) for name, part in values.items()}, _spreads(values.values(), number))
    return rows.averaged()._replace(low_rank_error=low_rank_error)


def average_self_influence(fitted: Fitted, train: Any, spread: bool) -> Averaged:
    """The self-influence of every training example, [n], as one row."""
    rows = _rows_of(fitted, spread)
    for number, alone in enumerate(_each_alone(fitted)):
        row = compute_self_influence(alone, train)[None]
        rows.add({"": row}, _spreads([row], number))
    averaged = rows.averaged()
    errors = averaged.errors
    return Averaged({"": averaged.values[""][0]}, None if errors is None else {"": errors[""][0]})


def write_averaged_scores(
    fitted: Fitted, query: Any, train: Any, folder: Path | str, *, spread: bool, resume: bool, **how: Any
) -> tuple[ScoreFolder, ScoreFolder | None]:
    """The folder of the scores, in which each network has one of its own, and that of their standard errors.

    An interrupted job goes on in the folder of the network that it was at.
    """
    folder = Path(folder)
    made: list[ScoreFolder] = []
    networks = _each_alone(fitted)
    query_groups, low_rank, by, key = (how[name] for name in ("query_groups", "low_rank", "by", "key"))
    matrices = holds_matrices(fitted, folder, query_groups, low_rank, by)
    settings = settings_of(fitted, query, train, query_groups, low_rank, by, key, bool(matrices))
    wanted = [folder, folder / "standard-error"] if spread else [folder]
    for where in wanted:
        where.mkdir(parents=True, exist_ok=True)
    ranks = fitted.setup.ranks
    ranks.compare("scores", settings)
    with held(folder, ranks):
        for where in wanted:
            of_what = {**settings, "what": "standard error" if where != folder else "scores"}
            made.append(open_folder(where, of_what, resume or where != folder, ranks))
        if ranks.meet("whether it is done", all(one.finished for one in made))[0]:
            return made[0], made[1] if spread else None
        parts = [
            write_scores(alone, query, train, folder / f"network-{number:02d}", resume=True, matrices=matrices, **how)
            for number, alone in enumerate(networks)
        ]
        error = max(part.low_rank_error for part in parts)
        for run, missing in find_missing(made, ranks):
            spreads = [_folder_spreads(part, run, number) for number, part in enumerate(parts)]
            for stretch in share_of_all(missing, ranks):
                rows = _rows_of(fitted, spread)
                for part, sigma in zip(parts, spreads, strict=True):
                    rows.add({"": part[run.start : run.stop, stretch.start : stretch.stop]}, sigma)
                averaged = rows.averaged()
                for one, values in zip(made, (averaged.values, averaged.errors or {}), strict=False):
                    write_block(one, run, stretch, values[""], error, ranks)
    return made[0], made[1] if spread else None


def _each_alone(fitted: Fitted) -> list[Fitted]:
    """What was fitted on each network, as if it were the only one."""
    return [
        Fitted(
            fitted.setup._replace(checkpoints=[state], networks=None),
            (curvature,),
            fitted.n,
            fitted.subset_of(number),
            fitted.train,
        )
        for number, (state, curvature) in enumerate(fitted.at_checkpoints())
        if state is not None
    ]


def average_rows(parts: Sequence[Tensor], unit: int = 1, spread: bool = False) -> tuple[Tensor, Tensor | None]:
    """The networks' scores [q, n] each, their rows at one scale and averaged, and the standard errors of that where
    they are asked for, over units of so many networks: [q, n] each."""
    rows = _Rows(unit, spread)
    for number, part in enumerate(parts):
        rows.add({"": part}, _spreads([part], number))
    averaged = rows.averaged()
    return averaged.values[""], None if averaged.errors is None else averaged.errors[""]


def unit_of(kept: Sequence[Tensor], n: int, spread: bool) -> int:
    """Networks of a unit: two where they come in complementary halves.

    A network's scores of the examples that it was trained on are systematically smaller than those of the others, so
    that only pairs differ by chance alone. Raises ValueError where a spread is asked for and there is one unit.
    """
    size = 2 if are_halves(kept, n) else 1
    units = len(kept) // size
    if spread and units < 2:
        what = "pairs of halves" if size == 2 else "networks"
        raise ValueError(f"spread=True needs at least two {what} to tell how far they differ, got {units}")
    return size


def _rows_of(fitted: Fitted, spread: bool) -> _Rows:
    return _Rows(unit_of(fitted.setup.kept or (), fitted.n, spread), spread)


class _Rows:
    """Sums over networks of rows at one scale, in units of `size` networks that follow one another."""

    def __init__(self, size: int, spread: bool):
        self.size, self.spread = size, spread
        self.sigmas: list[Tensor] = []  # by network: [q]
        self.unit: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}  # over the units so far
        self.squares: dict[str, Tensor] = {}  # sums of squared distances from the mean, as Welford updates them

    def add(self, values: Mapping[str, Tensor], sigma: Tensor) -> None:
        """A network's rows [q, ...], and their spreads [q]."""
        self.sigmas.append(sigma)
        for name, part in values.items():
            scale = torch.where(sigma > 0, 1 / sigma, 0.0).to(part.dtype).view(-1, *[1] * (part.dim() - 1))
            _add(self.unit, name, part * scale)
        if len(self.sigmas) % self.size:
            return
        number = len(self.sigmas) // self.size
        for name, part in self.unit.items():
            if name not in self.means:
                self.means[name] = part
                continue
            away = part - self.means[name]
            self.means[name].add_(away, alpha=1 / number)
            if self.spread:
                _add(self.squares, name, away.mul_(part.sub_(self.means[name])))
        self.unit.clear()

    def averaged(self) -> Averaged:
        units = len(self.sigmas) // self.size
        sigma = torch.stack(self.sigmas).quantile(0.5, dim=0)  # the mean of the middle two of an even number
        values, errors = {}, {}
        for name, mean in self.means.items():
            scale = (sigma / self.size).to(mean.dtype).view(-1, *[1] * (mean.dim() - 1))
            values[name] = mean * scale
            if self.spread:
                errors[name] = (self.squares[name] / (units * (units - 1))).sqrt_() * scale
        return Averaged(values, errors if self.spread else None)


def _add(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    sums[name] = sums[name].add_(part) if name in sums else part


def _grouped(values: Tensor, groups: Tensor | None) -> Tensor:
    return values if groups is None else add_groups(values, groups)


def _spreads(parts: Iterable[Tensor], network: int) -> Tensor:
    """The standard deviation of each row [q, n] over the training examples, of the sum of parts and positions."""
    rows = sum(part.double().flatten(2).sum(2) if part.dim() > 2 else part.double() for part in parts)
    assert isinstance(rows, Tensor)
    return _check_spreads(rows.std(dim=1, correction=0), rows.abs().amax(1), network)


def _folder_spreads(scores: ScoreFolder, run: range, network: int) -> Tensor:
    """The same of rows on the disk, block by block."""
    total = squares = most = torch.zeros(len(run), dtype=torch.float64)
    for mean in (None, 0):  # the mean first: squares of what is far from zero would cancel
        shift = torch.zeros(len(run), 1, dtype=torch.float64) if mean is None else total[:, None] / scores.shape[1]
        for stretch in scores.column_runs:
            rows = scores[run.start : run.stop, stretch.start : stretch.stop].double()
            rows = rows.flatten(2).sum(2) if rows.dim() > 2 else rows
            if mean is None:
                total, most = total + rows.sum(1), torch.maximum(most, rows.abs().amax(1))
            else:
                squares = squares + (rows - shift).square().sum(1)
    return _check_spreads((squares / scores.shape[1]).sqrt(), most, network)


def _check_spreads(sigma: Tensor, most: Tensor, network: int) -> Tensor:
    """Refuses rows that are the same for all examples and not zero: they have no scale."""
    flat = ((sigma <= 1e-12 * most) & (most > 0)).nonzero()
    if len(flat):
        raise ValueError(
            f"scores: query {int(flat[0])} has the same score, {float(most[flat[0]]):.3g}, for all training examples "
            f"under network {network}: a row without spread cannot be averaged with those of other networks"
        )
    return torch.where(most > 0, sigma, 0.0)
