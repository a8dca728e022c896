"""The job that builds an index: what is missing is computed, block by block; one that was cut off goes on.

Of several ranks each makes a run of the missing blocks. The first writes everything else, and the others see it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastif.data.batches import Walked
from fastif.data.tensor_files import load_tensors, save_tensors
from fastif.files import Damaged, canonical
from fastif.fingerprints import fingerprint
from fastif.index.encoder import Encoded, Encoder, refuse_products, worth_of
from fastif.index.factors import Factors, Stored, dtype_named
from fastif.index.folder import CURVATURE, EXACT, MANIFEST, Folder, Ids, IndexBlock
from fastif.index.sampling import draw, look, measure
from fastif.influence.fitted import Fitted
from fastif.influence.score_job import Part, borders_of, fit_settings
from fastif.influence.shared_folder import held, share_of_all
from fastif.journal import refuse_differences
from fastif.model.gradients import Gradients
from fastif.ranks import Ranks
from fastif.renamed import warn_outside

BLOCK_BYTES = 32 << 20  # of a block, as a sample has it, where a single batch does not take more
WORST = 0.9  # of the correlation with exact scores, below which a warning says so
_SHARED = ("loss", "model", "model code", "curvature", "estimators", "dtype", "autocast", "allow_train_mode")
See = Callable[[int, Mapping[str, Gradients]], None]  # examples from a number on


def build(
    fitted: Fitted,
    train: Walked,
    path: Path,
    *,
    share: float,
    dtype: Stored,
    self_influence: bool,
    ids: Sequence[str] | Tensor | None,
    resume: bool,
    key: str | None,
    threshold: float | Folder | None = None,
    see: See | None = None,
) -> Folder:
    """Computes what is missing of the index in `path`; `Index.build` documents it.

    `see` is shown every gradient, of several ranks those of the blocks that are this one's.
    """
    stored, ranks = dtype_named(dtype), fitted.setup.ranks
    refuse_products(fitted)
    if isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"index: share must be a number in (0, 1], got {share!r}")
    worth: dict[str, float] | None = None
    if isinstance(threshold, Folder):
        worth, threshold = threshold.manifest["worth"], float(threshold.manifest["threshold"])
    if threshold is not None and not 0 <= threshold < float("inf"):
        raise ValueError(f"index: threshold must be a finite number >= 0, got {threshold!r}")
    given = check_ids(ids, train.n)
    settings, own = settings_of(fitted, train, key)
    asked = {**settings, "share": float(share), "stored": dtype, "own": self_influence}
    own["ids"] = fingerprint_of_ids(given)
    ranks.compare("Index.build", {**asked, **own, "threshold": threshold})
    path.mkdir(parents=True, exist_ok=True)
    with held(path, ranks):
        (begun, *_) = ranks.meet("whether an index is there", (path / MANIFEST).exists())
        if begun and not resume:
            raise ValueError(f"{path} holds an index already; resume the job, append to it, or choose another folder")
        if begun:
            folder = Folder(path)
            refuse_differences(
                path, {**folder.manifest["settings"], **folder.manifest["parts"][0]["settings"]}, {**asked, **own}
            )
            check_state(folder, fitted)
            if threshold not in (None, folder.manifest["threshold"]):
                raise ValueError(
                    f"{path} holds an index with the threshold {folder.manifest['threshold']!r}, got {threshold!r}"
                )
        else:
            if any(path.glob("block-*.safetensors")):
                raise ValueError(f"{path} holds blocks of an index but no {MANIFEST} that says of what; remove them")
            if ranks.rank == 0:
                save_tensors(path / CURVATURE, fitted.state_dict(), settings["curvature state"])
            if worth is None:
                worth = worth_of(fitted, train, draw(train.n, fitted.setup.seed))
            encoder = Encoder.of(fitted, stored, worth)
            cut, exact = look(encoder, train, share, fitted.setup.seed, threshold)
            if ranks.rank == 0:
                (path / EXACT).unlink(missing_ok=True)  # of another job, which ended before its manifest
                if exact is not None:
                    save_tensors(path / EXACT, {"exact": exact}, settings["curvature state"])
            layers = [[name, [*metric.shape], cut.tables[name]] for name, metric in encoder.metrics.items()]
            borders = _borders(train, cut.bytes)
            Folder.write_manifest(
                path,
                {
                    "settings": asked,
                    "layers": layers,
                    "worth": worth,
                    "threshold": cut.threshold,
                    "numbers": cut.numbers,
                    "measured": None,
                    "parts": [{"settings": own, "bytes": cut.bytes, "borders": borders}],
                    "removed": [],
                },
                ranks,
            )
            folder = Folder(path)
        encoder = encoder_of(folder, fitted)
        _write_missing(folder, encoder, train, 0, given, see)
        _write_measured(folder, encoder, train)
    return folder


def append(
    folder: Folder,
    fitted: Fitted,
    more: Walked,
    *,
    ids: Sequence[str] | Tensor | None,
    resume: bool,
    key: str | None,
) -> None:
    """Further examples; `Index.append` documents it."""
    ranks = fitted.setup.ranks
    given = check_ids(ids, more.n)
    settings, own = settings_of(fitted, more, key)
    own["ids"] = fingerprint_of_ids(given)
    ranks.compare("Index.append", {**settings, **own})
    with held(folder.path, ranks):
        _read_together(folder, ranks)
        check_state(folder, fitted)
        refuse_differences(
            folder.path,
            {name: folder.manifest["settings"][name] for name in _SHARED},
            {name: settings[name] for name in _SHARED},
        )
        parts = folder.manifest["parts"]
        if resume and len(parts) > 1 and canonical(parts[-1]["settings"]) == canonical(own):
            first = parts[-1]["borders"][0]
        else:
            if not resume:
                parts = _without_unfinished(folder, ranks)
            if ranks.rank == 0:
                folder.check_finished()
                check_ids_with(folder, given)
            first = folder.total
            borders = [first + border for border in _borders(more, parts[0]["bytes"])]
            part = {"settings": own, "bytes": parts[0]["bytes"], "borders": borders}
            folder.write(ranks, parts=[*parts, part])
        _write_missing(folder, encoder_of(folder, fitted), more, first, given, None)


def encoder_of(folder: Folder, fitted: Fitted) -> Encoder:
    """As the index was built."""
    encoder = Encoder.of(fitted, dtype_named(folder.manifest["settings"]["stored"]), folder.manifest["worth"])
    return encoder.with_threshold(folder.manifest["threshold"])


def _without_unfinished(folder: Folder, ranks: Ranks) -> list[Any]:
    """Takes back an append that ended early, as with data of which a batch is NaN; the parts that are left."""
    *others, last = folder.manifest["parts"]
    runs = [run for run in folder.runs if run.start >= last["borders"][0]]
    unfinished = bool(others) and any(run in folder.missing() for run in runs) if ranks.rank == 0 else None
    (unfinished, *_) = ranks.meet("whether an append ended early", unfinished)
    if not unfinished:
        return folder.manifest["parts"]
    if ranks.rank == 0:  # blocks first: those that are there belong to the part that the manifest has last
        for run in runs:
            folder.path_of(run).unlink(missing_ok=True)
    folder.write(ranks, parts=others)
    return others


def remove(folder: Folder, examples: Tensor, ranks: Ranks) -> None:
    """Takes examples out of the files; `Index.remove` documents it."""
    if isinstance(examples, Tensor):
        ranks.compare("Index.remove", {"examples": fingerprint([examples])})
    with held(folder.path, ranks):
        _read_together(folder, ranks)
        if ranks.rank == 0:
            folder.check_finished()
        total, there = folder.total, folder.examples
        if not isinstance(examples, Tensor) or examples.dtype != torch.int64 or examples.dim() != 1:
            raise TypeError("index: remove takes the numbers of examples, an int64 tensor [m]")
        gone = examples.unique()
        unknown = gone[~torch.isin(gone, torch.arange(total))]
        if len(unknown) or len(gone) != len(examples):
            what = f"{int(unknown[0])}" if len(unknown) else "one of them twice"
            raise ValueError(f"index: remove takes distinct numbers in [0, {total}), got {what}")
        if len(gone) and torch.isin(there, gone).all():
            raise ValueError(f"index: remove would leave nothing of {len(there)} examples; remove the folder")
        # First the manifest: from then on they are never read, whatever becomes of the rest of the work.
        folder.write(ranks, removed=sorted({*folder.manifest["removed"], *gone.tolist()}))
        touched = [run for run in folder.runs if bool(((gone >= run.start) & (gone < run.stop)).any())]
        for run in share_of_all(touched, ranks):
            folder.write_block(run, folder.read_block(run))


def _read_together(folder: Folder, ranks: Ranks) -> None:
    """The manifest, before any rank changes it."""
    folder.read()
    ranks.meet("reading the index")


def _borders(data: Walked, each: float) -> list[int]:
    """Of the blocks, in which an example takes `each` bytes."""
    return borders_of(data.lengths, max(*data.lengths, 1, int(BLOCK_BYTES / max(each, 1))))


def _write_missing(folder: Folder, encoder: Encoder, data: Walked, first: int, ids: Ids, see: See | None) -> None:
    """Blocks of the data whose first example has the number `first`, those that are not there yet."""
    ranks, stop = encoder.fitted.setup.ranks, first + data.n
    runs = [run for run in folder.runs if first <= run.start < stop]
    # The first rank looks, before any of them writes.
    found = {run for run in runs if not folder.path_of(run).exists()} if ranks.rank == 0 else None
    (missing, *_) = ranks.meet("what is missing of the index", found)
    for run in share_of_all([run for run in runs if run not in missing], ranks):
        folder.read_block(run)  # refuses what is damaged
    walk = share_of_all(runs if see is not None else [run for run in runs if run in missing], ranks)
    if not walk:
        return
    starts = [*accumulate((len(run) for run in walk), initial=0)]
    own = folder.manifest["settings"]["own"]
    under_way: list[Encoded] = []
    position = filled = 0
    for n, gradients in _walked(encoder.fitted, data, [range(run.start - first, run.stop - first) for run in walk]):
        number = bisect_right(starts, position) - 1
        run = walk[number]
        if see is not None:
            see(run.start - first + position - starts[number], gradients)
        if run in missing:
            under_way.append(encoder.encode(gradients, own))
        del gradients
        position, filled = position + n, filled + n
        if filled == len(run):
            if run in missing:
                _write(folder, run, under_way, ids, first)
            under_way, filled = [], 0
    if position != starts[-1]:
        raise ValueError("index: the data gave fewer examples than at its first pass")


def _write_measured(folder: Folder, encoder: Encoder, train: Walked) -> None:
    """The error of the finished blocks, once."""
    ranks, path = encoder.fitted.setup.ranks, folder.path / EXACT
    exact = load_tensors(path)[1]["exact"] if ranks.rank == 0 and path.exists() else None
    (exact, *_) = ranks.meet("exact scores of a sample, as they were kept", exact)
    if exact is not None and folder.manifest["measured"] is None:
        measured = measure(encoder, folder, train, exact)
        folder.write(ranks, measured=None if measured is None else measured._asdict())
        if measured is not None and measured.r < WORST and ranks.rank == 0:
            warn_outside(
                f"index: its scores have {measured} with exact ones; a larger share, dtype='float32' or a larger "
                "damping may bring them nearer, and top(rerank=) computes the best exactly",
                UserWarning,
            )
    if ranks.rank == 0:
        path.unlink(missing_ok=True)


def _walked(fitted: Fitted, data: Walked, runs: list[range]) -> Iterator[tuple[int, Mapping[str, Gradients]]]:
    part = Part(data, fitted.passes.batch_size, runs)
    with fitted.passes.running(fitted.setup.states[0]):
        for _, n, gradients in fitted.passes.gradients(part, "index"):
            yield n, gradients
            del gradients


def _write(folder: Folder, run: range, encoded: list[Encoded], ids: Ids, first: int) -> None:
    names = [layer[0] for layer in folder.manifest["layers"]]
    factors = {name: Factors.cat([part.factors[name] for part in encoded]) for name in names}
    mine = None if ids is None else ids[run.start - first : run.stop - first]
    examples = torch.arange(run.start, run.stop)
    own = [part.own for part in encoded if part.own is not None]
    try:
        folder.write_block(run, IndexBlock(examples, torch.cat(own) if own else None, factors, mine))
    except OSError as error:
        done = len(folder.runs) - len(folder.missing())
        why = f"{error.strerror or error}; {done} of {len(folder.runs)} blocks are kept in {folder.path}"
        raise OSError(error.errno, f"{why}, and the same job goes on from there when it is resumed") from error


# ------------------------------------------------------------------------------------------------------------- settings


def settings_of(fitted: Fitted, train: Walked, key: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What determines the index: what all its parts share, and what one part is made of."""
    found = fit_settings(fitted.setup, train, key)
    shared = {name: found.pop(name) for name in _SHARED}
    shared["curvature state"] = fingerprint(fitted.state_dict().values())
    return shared, {**found, "n": train.n, "memory": fitted.memory}


def check_state(folder: Folder, fitted: Fitted) -> None:
    """Raises ValueError where the curvature is not that of the index."""
    now, then = fingerprint(fitted.state_dict().values()), folder.manifest["settings"]["curvature state"]
    if now != then:
        raise ValueError(
            f"{folder.path} is an index of another curvature: its state was {then}, that of this Influence is {now}; "
            "an Influence of the same arguments that is not fitted takes the state from the folder"
        )


def load_state(folder: Folder) -> dict[str, Tensor]:
    """The curvature's state."""
    path = folder.path / CURVATURE
    if not path.is_file():
        raise FileNotFoundError(f"{folder.path} has no {CURVATURE}")
    about, state = load_tensors(path)
    if about != folder.manifest["settings"]["curvature state"]:
        raise Damaged(path, "it is of another index", "remove the folder and build the index anew")
    return state


def check_ids(ids: Sequence[str] | Tensor | None, n: int) -> Ids:
    """Ids of n examples, strings or int64. Raises ValueError for those that repeat."""
    if ids is None:
        return None
    if isinstance(ids, Tensor):
        if ids.dtype != torch.int64 or ids.shape != (n,):
            raise TypeError(f"index: ids must be strings, or int64 [{n}], got {ids.dtype} {list(ids.shape)}")
        checked, plain = ids.cpu().clone(), ids.tolist()
    else:
        checked = plain = [*ids]
        if not all(isinstance(one, str) for one in plain):
            raise TypeError(f"index: ids must be strings, or an int64 tensor [{n}]")
        if len(plain) != n:
            raise ValueError(f"index: ids must be one for each of {n} examples, got {len(plain)}")
    check_distinct(plain)
    return checked


def check_ids_with(folder: Folder, ids: Ids) -> None:
    """Whether those of further examples go with those that are there."""
    known: list[Any] = []
    for block in folder.blocks():
        kind = type(block.ids)
        if kind is not type(ids):
            raise TypeError(
                f"index: ids must be of the kind that the index has, {kind.__name__}, got {type(ids).__name__}"
            )
        if block.ids is not None:
            known += block.ids.tolist() if isinstance(block.ids, Tensor) else block.ids
    if ids is not None:
        check_distinct([*known, *(ids.tolist() if isinstance(ids, Tensor) else ids)])


def check_distinct(ids: list[Any]) -> None:
    """Raises ValueError for ids of which one is there twice."""
    if len(set(ids)) < len(ids):
        seen: set[Any] = set()
        first = next(one for one in ids if one in seen or seen.add(one))
        raise ValueError(f"index: ids must be distinct, {first!r} is there twice")


def fingerprint_of_ids(ids: Ids) -> str | None:
    if ids is None:
        return None
    return fingerprint(
        [ids if isinstance(ids, Tensor) else torch.tensor(list("\0".join(ids).encode()), dtype=torch.uint8)]
    )
