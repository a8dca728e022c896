"""Indexes of parts of the training data, put together as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastif.data.tensor_files import save_tensors
from fastif.files import canonical
from fastif.index.building import check_distinct, load_state
from fastif.index.folder import CURVATURE, MANIFEST, Folder, Ids
from fastif.influence.shared_folder import held, share_of_all
from fastif.ranks import Ranks


def merge(paths: Sequence[Path], out: Path, resume: bool, ranks: Ranks) -> None:
    """The indexes one after another; `Index.merge` documents it. Of several ranks each copies a run of the blocks."""
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"index: merge takes at least two distinct folders, got {[str(path) for path in paths]}")
    ranks.compare("Index.merge", {"folders": [str(path) for path in paths], "out": str(out), "resume": resume})
    parts = [Folder(path) for path in paths]
    _check_alike(parts)
    if ranks.rank == 0:
        for part in parts:
            part.check_finished()
        _check_ids(parts)
    out.mkdir(parents=True, exist_ok=True)
    with held(out, ranks):
        merged, starts = _manifest_of(parts)
        (begun, *_) = ranks.meet("whether an index is there", (out / MANIFEST).exists())
        if begun and not (resume and canonical(_without_format(Folder(out))) == canonical(merged)):
            what = "of other parts" if resume else "already; resume the merging, or choose another folder"
            raise ValueError(f"index: merge: {out} holds an index {what}")
        if not begun:
            if ranks.rank == 0:
                save_tensors(out / CURVATURE, load_state(parts[0]), merged["settings"]["curvature state"])
            Folder.write_manifest(out, merged, ranks)
        folder = Folder(out)
        copies = [(part, run, start) for part, start in zip(parts, starts, strict=True) for run in part.runs]
        found = {*folder.missing()} if ranks.rank == 0 else None
        (missing, *_) = ranks.meet("what is missing of the index", found)
        todo = [(*copy, into) for copy, into in zip(copies, folder.runs, strict=True) if into in missing]
        for part, run, start, into in share_of_all(todo, ranks):
            block = part.read_block(run)
            folder.write_block(into, block._replace(examples=block.examples + start))


def _manifest_of(parts: Sequence[Folder]) -> tuple[dict[str, Any], list[int]]:
    """That of the whole, and the number that the first example of every part gets."""
    starts, runs, removed, start = list[int](), list[dict[str, Any]](), list[int](), 0
    for part in parts:
        starts.append(start)
        runs += [{**one, "borders": [start + border for border in one["borders"]]} for one in part.manifest["parts"]]
        removed += [start + example for example in part.manifest["removed"]]
        start += part.total
    measured = [part.manifest["measured"] for part in parts]
    worst = None if None in measured else min(measured, key=lambda one: one["r"])
    numbers = max(part.manifest["numbers"] for part in parts)
    merged = {**_without_format(parts[0]), "numbers": numbers, "measured": worst, "parts": runs, "removed": removed}
    return merged, starts


def _without_format(folder: Folder) -> dict[str, Any]:
    """The manifest without what `Folder.write_manifest` adds."""
    return {name: folder.manifest[name] for name in folder.manifest if name != "format"}


def _check_alike(parts: Sequence[Folder]) -> None:
    """Raises ValueError where one is of another model, curvature, share, threshold or type than the first."""
    first, *others = parts
    for other in others:
        for name, theirs in _determined(other).items():
            ours = _determined(first).get(name)
            if canonical(theirs) != canonical(ours):
                hint = f"; build it with threshold={ours!r}" if name == "threshold" else ""
                raise ValueError(
                    f"index: merge: {other.path} has another {name} than {first.path}: {theirs!r} and {ours!r}{hint}"
                )


def _determined(folder: Folder) -> dict[str, Any]:
    manifest = folder.manifest
    names = {"stored": "dtype", "own": "self_influence"}
    settings: dict[str, Any] = manifest["settings"]
    found = {names.get(name, name): value for name, value in settings.items()}
    return {
        **found,
        "threshold": manifest["threshold"],
        "list of layers": manifest["layers"],
    }


def _check_ids(parts: Sequence[Folder]) -> None:
    """Raises ValueError for ids that repeat, and TypeError where not all parts have ids of one kind."""
    every: list[Ids] = [block.ids for part in parts for block in part.blocks()]
    named = [ids.tolist() if isinstance(ids, Tensor) else ids for ids in every if ids is not None]
    kinds = {type(ids).__name__ for ids in every}
    if len(kinds) > 1:
        raise TypeError(f"index: merge: the ids of all parts must be of one kind, got {', '.join(sorted(kinds))}")
    check_distinct([one for ids in named for one in ids])
