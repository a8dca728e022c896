"""The job that writes a `ScoreFolder`: what is missing is computed, block by block, and what determines the numbers is
kept beside them, so that a job that was cut off goes on and another one is refused."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import accumulate, chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastif.curvature.called import as_called
from fastif.data.batches import Walked, as_loader, batch_length, batch_lengths, walked
from fastif.data.dealing import Part
from fastif.data.parts import Parts
from fastif.fingerprints import VERSIONS, described, described_model, fingerprint
from fastif.influence.fitted import Fitted, Setup
from fastif.influence.owners import Reported
from fastif.influence.queries import query_bytes
from fastif.influence.score_folder import MANIFEST, ScoreFolder, write_manifest
from fastif.influence.scoring import make_tiles
from fastif.influence.shared_folder import held, note_error, share_of_all
from fastif.influence.states import gather, values_of_state
from fastif.influence.tiles import By, Tile, check_groups, check_one_length, check_positions
from fastif.journal import refuse_differences
from fastif.model.calls import dtype_of
from fastif.ranks import ALONE, Ranks

BLOCK_BYTES = 64 << 20  # of a block at most, where a single batch of training examples does not take more


def write_scores(
    fitted: Fitted,
    query: Any,
    train: Any,
    folder: Path | str,
    *,
    resume: bool,
    query_groups: Tensor | None = None,
    low_rank: int | None = None,
    by: By = "all",
    key: str | None = None,
    matrices: bool | None = None,
) -> ScoreFolder:
    """Computes what is missing of the scores in `folder`; `Influence.scores` documents it.

    matrices: as `holds_matrices` has it, where the folder is part of another job.
    """
    for data in (query, train):
        if isinstance(data, Iterator):
            raise ValueError("scores: out= walks through the data more than once, got an iterator; pass a list")
    query, train = fitted.walk(query, train)
    folder = Path(folder)
    if matrices is None:
        matrices = holds_matrices(fitted, folder, query_groups, low_rank, by)
    if fitted.divided and matrices is False:
        fitted = gather(fitted)
    settings = settings_of(fitted, query, train, query_groups, low_rank, by, key, bool(matrices))
    folder.mkdir(parents=True, exist_ok=True)
    ranks = fitted.setup.ranks
    ranks.compare("scores", settings)
    with held(folder, ranks):
        scores = open_folder(folder, settings, resume, ranks)
        checkpoints, batch_size = len(fitted.curvatures), fitted.passes.batch_size
        for rows, missing in find_missing([scores], ranks):
            for columns in _share_of(missing, fitted, train):
                mine = query if query_groups is not None else Part(query, batch_size, [rows])
                part = Part(train, batch_size, columns) if columns else None
                how = dict(matrices=bool(matrices), whole=True)
                tiles = make_tiles(fitted, mine, part, query_groups, low_rank, by, **how)
                _write_tiles(scores, tiles, rows, columns, checkpoints, ranks)
    return scores if ranks.world == 1 else ScoreFolder(folder)


def holds_matrices(
    fitted: Fitted, folder: Path, query_groups: Tensor | None, low_rank: int | None, by: By
) -> bool | None:
    """Whether a job holds queries as matrices where it could hold some in factors; None where it could not.

    Ranks that keep the curvature for one another do. A job that was begun goes on as it was begun, on any number of
    ranks, since products with factors round otherwise: ranks then bring all factors together for a job of one process.
    """
    if query_groups is not None or low_rank is not None or by == "token":
        return None
    ranks = fitted.setup.ranks
    begun = ScoreFolder(folder).settings if ranks.rank == 0 and (folder / MANIFEST).exists() else None
    found = ranks.meet("how queries are held", None if begun is None else begun.get("queries") == "matrices")[0]
    return fitted.divided if found is None else found


def find_missing(scores: Sequence[ScoreFolder], ranks: Ranks) -> Iterator[tuple[range, list[range]]]:
    """By run of queries, the runs of training examples of which a block is not there in all of some folders.

    Of several ranks the first looks, before any of them writes.
    """
    first = scores[0]

    def look(rows: range) -> list[range]:
        return [columns for columns in first.column_runs if not all(one.has_block(rows, columns) for one in scores)]

    if ranks.world == 1:
        yield from ((rows, look(rows)) for rows in first.row_runs)
        return
    found = [look(rows) for rows in first.row_runs] if ranks.rank == 0 else None
    yield from zip(first.row_runs, ranks.meet("what is missing", found)[0], strict=True)


def _share_of(missing: list[range], fitted: Fitted, train: Walked) -> list[list[range]]:
    """The runs that this rank computes at a time.

    All checkpoints are in a block before the next one begins; with one alone, the queries are seen to once. Where
    solving for queries, or a pass through the model, takes all ranks, those that have nothing to compute take part for
    as often as the others.
    """
    ranks, alone = fitted.setup.ranks, len(fitted.curvatures) == 1
    by_rank = [share_of_all(missing, ranks, rank) for rank in range(ranks.world)]
    if isinstance(train, Parts):  # a run of columns is of one rank's examples, which no other has
        by_rank = [[run for run in missing if run.start in train.part_of(rank)] for rank in range(ranks.world)]
    turns = [[[*mine]] if alone and mine else [[run] for run in mine] for mine in by_rank]
    own = turns[ranks.rank]
    together = fitted.setup.estimators.needs_data or fitted.divided or fitted.passes.sharding is not None
    most = max(map(len, turns)) if together else len(own)
    return own + [[]] * (most - len(own))


def open_folder(folder: Path, settings: Mapping[str, Any], resume: bool, ranks: Ranks = ALONE) -> ScoreFolder:
    """The folder of a job, made where there is none yet, by the first rank; one of another job is refused."""
    if ranks.rank > 0:
        ranks.meet(f"opening {folder}")
        return ScoreFolder(folder)
    begun = (folder / MANIFEST).exists()
    if begun and not resume:
        raise ValueError(f"{folder} holds scores already; resume the job, or remove the folder")
    if begun:
        refuse_differences(folder, ScoreFolder(folder).settings, settings)
    elif any(folder.glob("scores-*.npy")):
        raise ValueError(f"{folder} holds blocks of scores but no {MANIFEST} that says of what; remove them")
    if not begun:
        write_manifest(folder, settings, 0.0)
    scores = ScoreFolder(folder)
    for rows, columns in product(scores.row_runs, scores.column_runs):
        if scores.has_block(rows, columns):
            scores.read_block(rows, columns)  # refuses what is damaged
    ranks.meet(f"opening {folder}")
    return scores


def _write_tiles(
    scores: ScoreFolder,
    tiles: Generator[Tile],
    rows: range,
    missing: list[range],
    checkpoints: int,
    ranks: Ranks,
) -> None:
    """Blocks of one run of queries, from the tiles of all their missing runs of training examples."""
    starts = list(accumulate((len(run) for run in missing), initial=0))  # where the runs begin in the part
    under_way: dict[int, Tensor] = {}
    left = [len(rows) * len(run) * checkpoints for run in missing]
    low_rank_error = 0.0
    with closing(tiles):
        for tile in tiles:
            low_rank_error = max(low_rank_error, tile.low_rank_error)
            number = bisect_right(starts, tile.train) - 1  # a batch lies in one run
            run = missing[number]
            values = tile.values[""] if scores.layers is None else torch.stack([*tile.values.values()], 2)
            check_one_length(scores.shape[2:], values)
            if number not in under_way:
                under_way[number] = torch.zeros((len(rows), len(run), *scores.shape[2:]), dtype=scores.dtype)
            column = tile.train - starts[number]
            under_way[number][tile.query : tile.query + len(values), column : column + values.shape[1]] += values
            left[number] -= values.shape[0] * values.shape[1]
            if left[number] == 0:
                write_block(scores, rows, run, under_way.pop(number), low_rank_error, ranks)
    if any(left):
        raise ValueError("scores: the data gave fewer examples than at its first pass")


def write_block(
    scores: ScoreFolder, rows: range, columns: range, values: Tensor, low_rank_error: float, ranks: Ranks = ALONE
) -> None:
    try:
        note_error(scores, low_rank_error, ranks)
        scores.write_block(rows, columns, values.numpy())
    except OSError as error:
        done, blocks = scores.count_blocks()
        why = f"{error.strerror or error}; {done} of {blocks} blocks are kept in {scores.folder}"
        raise OSError(error.errno, f"{why}, and the same job goes on from there when it is resumed") from error


def settings_of(
    fitted: Fitted,
    query: Any,
    train: Any,
    query_groups: Tensor | None,
    low_rank: int | None,
    by: By,
    key: str | None,
    matrices: bool,
) -> dict[str, Any]:
    """All that determines the scores' bits; of the data, their identity."""
    setup, passes = fitted.setup, fitted.passes
    parts = [*fitted.capture.blocks] if by == "layer" else _positions(fitted, train) if by == "token" else None
    item = dtype_of(passes.model).itemsize
    lengths = [batch_lengths(data, passes.batch_size) for data in (query, train)]
    each = query_bytes(setup, query, low_rank, matrices or by == "token")
    if parts is not None:  # the bytes of a score are those of all its parts
        item *= parts if isinstance(parts, int) else len(parts)
    widest, height = max(lengths[1]), sum(lengths[0])
    rows = max(1, min(height, fitted.memory // each, BLOCK_BYTES // (widest * item)))
    if len(fitted.curvatures) > 1:  # queries go through the model again for every block: no higher than wide
        rows = max(1, min(rows, int((BLOCK_BYTES / item) ** 0.5)))
    if query_groups is not None:  # a group's queries may be anywhere: all go through the model at once
        check_groups("query_groups", query_groups, height)
        rows = height = int(query_groups.max()) + 1
    ranks = {"ranks": setup.ranks.world} if setup.ranks.world > 1 and setup.estimators.needs_data else {}
    needed = fitted.subset if setup.estimators.needs_data and fitted.subset is not None else ()  # no state holds it
    return {
        "q": sum(lengths[0]),
        "n": sum(lengths[1]),
        **fit_settings(setup, train, key),
        **({"queries": "matrices"} if matrices else {}),  # where they could be held in factors
        **ranks,  # among which the products of a solve are divided, which round as they add them up
        "measurement": described(setup.measurement, "measurement", key),
        "rank": low_rank,
        "by": None if by == "all" else by,
        "parts": parts,
        "query groups": None if query_groups is None else fingerprint([query_groups]),
        "curvature state": fingerprint(chain(values_of_state(fitted), needed)),
        "choices": _choices(fitted),
        "memory": fitted.memory,
        "query": walked(query, passes.batch_size).identity.fingerprint,
        "rows": [*range(0, height, rows), height],
        "columns": _columns(train, lengths[1], max(widest, BLOCK_BYTES // (rows * item))),
    }


def _columns(train: Any, lengths: list[int], most: int) -> list[int]:
    """Borders of the columns' runs; of data in parts none lies in two."""
    if not isinstance(train, Parts):
        return borders_of(lengths, most)
    borders = [0]
    for own in train.by_rank:
        borders += [borders[-1] + border for border in borders_of(own, most)[1:] if border]
    return borders


def fit_settings(setup: Setup, train: Any, key: str | None = None) -> dict[str, Any]:
    """All that determines the curvature but for its subset; `key` stands for what cannot be fingerprinted."""
    passes, model, checkpoints = setup.passes, setup.model, setup.checkpoints
    own = dict(chain(model.named_parameters(), model.named_buffers()))
    states = [own] if checkpoints is None else checkpoints
    covered: dict[str, list[str]] = {}
    for name, estimator in setup.estimators.by_block.items():
        covered.setdefault(as_called(estimator), []).append(name)
    return {
        "loss": described(passes.loss, "loss", key),
        "estimators": sorted({described(type(e)) for e in setup.estimators.by_block.values()}),
        "curvature": "; ".join(f"{estimator} of {', '.join(names)}" for estimator, names in covered.items()),
        "checkpoints": None if checkpoints is None else len(checkpoints),
        "networks": None if setup.kept is None else fingerprint(setup.kept),
        "model": fingerprint(t for state in states for t in state.values() if isinstance(t, Tensor)),
        "model code": described_model(model, key),
        "train": walked(train, passes.batch_size).identity.fingerprint,
        "batch_size": passes.batch_size,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "autocast": None if passes.autocast is None else str(passes.autocast),
        "allow_train_mode": passes.allow_train_mode,
        "device": passes.device.type,
        "seed": setup.seed,
        "threads": torch.get_num_threads(),
        "key": key,
        **VERSIONS,
    }


def _choices(fitted: Fitted) -> dict[str, Any]:
    """What estimators chose by themselves while they were fitted and no state holds, by block."""
    chosen: dict[str, Any] = {}
    for number, curvature in enumerate(fitted.curvatures):
        for name, estimator in curvature.by_block.items():
            if not isinstance(estimator, Reported) and estimator.choices():
                chosen[f"{number}/{name}"] = estimator.choices()
    if fitted.divided:
        told = fitted.setup.ranks.meet("what estimators chose", chosen)
        chosen = {key: one for theirs in told for key, one in sorted(theirs.items())}
    return chosen


def _positions(fitted: Fitted, train: Any) -> int:
    """Of the first batch; at others', if they have another number, `check_one_length` raises."""
    checkpoint, _ = fitted.at_checkpoints()[0]
    if isinstance(train, Parts):
        batch = train.first(torch.arange(train.n), lambda x, _: torch.arange(batch_length(x)))
    else:
        batch = next(iter(as_loader(train, fitted.passes.batch_size)))
    with fitted.passes.running(checkpoint):
        (_, _, gradients), *_ = fitted.passes.gradients([batch], None)
    return check_positions({name: g.positions for name, g in gradients.items()})


def borders_of(lengths: Iterable[int], most: int) -> list[int]:
    """Borders of runs of whole batches with at most `most` examples each."""
    borders, end = [0], 0
    for length in lengths:
        if end + length - borders[-1] > most:
            borders.append(end)
        end += length
    return [*borders, end]
