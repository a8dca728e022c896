"""The index: training gradients once, any number of queries.

Every example's gradient is kept layer by layer, cut off where the scores that the fitted curvature gives feel it least.
Scores from it have the sign, the units and the indices of `Influence.scores`. docs/math.md (26).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastif.data.batches import count
from fastif.fingerprints import fingerprint
from fastif.index.building import append, build, check_state, encoder_of, load_state, remove
from fastif.index.encoder import Encoder, ready, walkable
from fastif.index.factors import Stored
from fastif.index.folder import Folder, Ids
from fastif.index.merging import merge
from fastif.index.reading import Top, asked, join_numbers, own_blocks, own_columns, products, sum_of
from fastif.index.sampling import Measured, own_part_of
from fastif.influence.influence import Influence
from fastif.influence.scoring import best_of_ranks, compute_scores, of_all_ranks
from fastif.influence.sharing import compare_setups
from fastif.influence.tiles import best_of, check_groups
from fastif.ranks import ALONE, Ranks, together


class Index:
    """Training gradients on disk, from which scores are read without the training data.

    >>> from tempfile import TemporaryDirectory
    >>> from fastif import EKFAC, Influence
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    >>> train = torch.randn(40, 2), torch.arange(40) % 3
    >>> influence = Influence(model, curvature=EKFAC(), progress=False).fit(train)
    >>> with TemporaryDirectory() as folder:
    ...     _ = Index.build(influence, train, folder, share=1, dtype="float32")
    ...     index = Index(folder, Influence(model, curvature=EKFAC(), progress=False))
    ...     scores = index.scores((train[0][:2], train[1][:2]))
    >>> torch.allclose(scores, influence.scores((train[0][:2], train[1][:2]), train), rtol=1e-4, atol=1e-7)
    True

    Args:
        folder: that `Index.build` wrote.
        influence: what computes the queries' gradients: the Influence of the index, or one with the same arguments that
            is not fitted, which then takes the curvature's state from the folder. Without it, only what needs no query
            can be asked for. Of several ranks each reads a run of the blocks, and all get the result: every rank makes
            the same calls, as it does of the Influence. Without an Influence, a rank works on its own.

    Raises FileNotFoundError for a folder without an index; `fastif.files.Damaged`, a ValueError, for files that are
    not what was written; ValueError for another model and for another curvature.
    """

    def __init__(self, folder: Path | str, influence: Influence | None = None):
        self._folder = Folder(folder)
        self.influence = influence
        self._made: Encoder | None = None  # the metrics of the fit that queries were last asked with
        if influence is not None:
            if influence.n == 0:
                state = load_state(self._folder)
                try:
                    influence.load_state_dict(state)
                except ValueError as error:
                    raise ValueError(
                        f"{folder} is an index of another model, or with other arguments: {error}"
                    ) from error
            else:
                check_state(self._folder, ready(influence))

    @classmethod
    def build(
        cls,
        influence: Influence,
        train: Any,
        out: Path | str,
        *,
        share: float = 0.04,
        dtype: Stored = "int8",
        self_influence: bool = False,
        ids: Sequence[str] | Tensor | None = None,
        resume: bool = False,
        key: str | None = None,
        threshold: float | Index | None = None,
    ) -> Index:
        """Walks through the training data once, after a sample of it, and writes the index.

        Args:
            influence: fitted, at one model, with estimators whose state is all that solving needs: not CG and LiSSA.
                Its `memory` bounds what stands beside model and data, its `seed` draws the sample.
            train: the training data.
            out: the folder.
            share: of the gradients' numbers, what is kept, in (0, 1]; 1 keeps all, which of t positions is t (o + d)
                numbers of a layer at most, of min(o, d) factors. One threshold on σ² per number decides in all layers
                and examples; it is found on a sample of them, and nothing is lost of a gradient with one position that
                is kept at all. Gradients of fewer numbers than the share are kept as they are.
            dtype: of the vectors: "int8" and "float16", each with a scale, or "float32".
            self_influence: keep each example's exact score on itself, too: further work in every layer.
            ids: of the examples, strings or int64 [n], which `top` gives back.
            resume: go on with a job that was cut off; the files end with the same bits. One of other settings is
                refused, each difference named.
            key: as for `Influence.scores` with out=.
            threshold: another index, whose threshold is taken in the place of one that is found for the share, or that
                number (`Index.threshold`): for indexes of parts of the data, built by jobs of their own, that `merge`
                puts together. Where estimators have no eigenbasis, the number alone is not enough for one rule.

        Of several ranks each makes the blocks of its run of training examples, in one folder that all share. From one
        state of the curvature (`Influence.state_dict`) the files have the bits of one process, and a job that was cut
        off goes on with any number of ranks.

        Raises ValueError for CG and LiSSA, several checkpoints, a share that keeps nothing and
        a folder that holds an index already; `fastif.folder_lock.FolderInUse` where somebody else writes to it.
        """
        options: dict[str, Any] = dict(share=share, dtype=dtype, self_influence=self_influence)
        options |= dict(resume=resume, key=key)
        with influence.ranks.together("Index.build"):
            fitted, data = ready(influence), walkable(influence, train)
            number = threshold.threshold if isinstance(threshold, Index) else threshold
            compare_setups(
                fitted.setup, "Index.build", {"train": data, "out": str(out), "threshold": number, **options}
            )
            like = threshold._folder if isinstance(threshold, Index) else threshold
            build(fitted, data, Path(out), ids=ids, threshold=like, **options)
            return cls(out, influence)

    @classmethod
    def merge(
        cls,
        folders: Sequence[Path | str],
        out: Path | str,
        influence: Influence | None = None,
        *,
        resume: bool = False,
    ) -> Index:
        """One index of several, of parts of the training data: the examples of the first, then those of the second.

        They must be finished and of the same model, state of the curvature, share, threshold and type; build the others
        with threshold= the first. Their blocks are copied, without what was removed from them. `measured` is that of
        the part with the lowest r.

        Raises ValueError where something differs, with both values, for ids that repeat, and where `out` holds an index
        unless the same merging is resumed.
        """
        ranks = ALONE if influence is None else influence.ranks
        with ranks.together("Index.merge"):
            merge([Path(folder) for folder in folders], Path(out), resume, ranks)
            return cls(out, influence)

    @together
    def append(
        self, more: Any, *, ids: Sequence[str] | Tensor | None = None, resume: bool = False, key: str | None = None
    ) -> Index:
        """Adds examples that the model was trained on, too, at the threshold of the index; they are numbered on from
        `total`. Arguments as for `build`; without resume=True an append that ended early is taken back first."""
        influence = self._influence()
        fitted, data = ready(influence), walkable(influence, more)
        compare_setups(fitted.setup, "append", {"more": data, "resume": resume, "key": key})
        append(self._folder, fitted, data, ids=ids, resume=resume, key=key)
        return self

    @together
    def remove(self, examples: Tensor) -> Index:
        """Takes examples out, int64 [m] their numbers; the others keep theirs. Nothing of them stays in the blocks.

        A file keeps its curvature and its measured error, in which they had their part.
        """
        remove(self._folder, examples, self.ranks)
        return self

    # ---------------------------------------------------------------------------------------------------- what it holds

    @property
    def path(self) -> Path:
        return self._folder.path

    @property
    def ranks(self) -> Ranks:
        """The processes among which the reading of blocks is divided: those of the Influence."""
        return ALONE if self.influence is None else self.influence.ranks

    @property
    def examples(self) -> Tensor:
        """The numbers of the training examples that it holds, int64 [n]: what columns of scores are of."""
        return self._folder.examples

    @property
    def n(self) -> int:
        """Training examples that it holds."""
        return len(self._folder.examples)

    @property
    def total(self) -> int:
        """The same with those that were removed."""
        return self._folder.total

    @property
    def layers(self) -> dict[str, tuple[int, int, int]]:
        """Blocks of parameters and their g matrices [o, d]."""
        return {name: (shape[0], shape[1], shape[2]) for name, shape, _ in self._folder.manifest["layers"]}

    @property
    def settings(self) -> dict[str, Any]:
        """What determined it."""
        return self._folder.manifest["settings"]

    @property
    def threshold(self) -> float:
        """σ² per number of a factor below which it was dropped; 0: all is kept."""
        return self._folder.manifest["threshold"]

    @property
    def measured(self) -> Measured | None:
        """Its error as it was found when it was built, between examples drawn at random; None of fewer than eight, and
        until the build has ended."""
        found = self._folder.manifest["measured"]
        return None if found is None else Measured(**found)

    @property
    def finished(self) -> bool:
        return not self._folder.missing()

    @property
    def nbytes(self) -> int:
        """Of its blocks on disk."""
        return self._folder.nbytes

    def share(self) -> float:
        """The numbers that are kept, of those of the gradients that may differ from zero; all blocks are read."""
        kept = sum(
            part.right.numel() + part.left.numel() for block in self._folder.blocks() for part in block.factors.values()
        )
        return kept / (self.n * self._folder.manifest["numbers"])

    @together
    def self_influence(self) -> Tensor:
        """Each example's score on itself, [n], as `Influence.self_influence`.

        Where it was built with self_influence=True exact, and no model is needed; else of what is kept of a gradient,
        without what was dropped.
        """
        self._folder.check_finished()
        self._compare("self_influence", {})
        if self.settings["own"]:
            return join_numbers([b.own for b in own_blocks(self._folder, self.ranks) if b.own is not None], self.ranks)
        encoder = self._encoder()
        parts = list[Tensor]()
        for block in own_blocks(self._folder, self.ranks):
            parts.append(encoder.self_influence(block.factors))
        return join_numbers(parts, self.ranks)

    def _compare(self, op: str, arguments: Mapping[str, Any]) -> None:
        """Raises ValueError, on all ranks, where one has another model, index or arguments than the first."""
        if self.ranks.world > 1:
            compare_setups(self._influence().setup, op, arguments)
            self.ranks.compare(op, {"index": self._folder.job, "examples": fingerprint([self.examples])})

    def ids(self) -> Ids:
        """Of the examples that it holds, where they were given."""
        if self._folder.manifest["parts"][0]["settings"]["ids"] is None:
            return None
        parts = [block.ids for block in self._folder.blocks()]
        if isinstance(parts[0], Tensor):
            return torch.cat([part for part in parts if isinstance(part, Tensor)])
        return [one for part in parts if isinstance(part, list) for one in part] if parts[0] is not None else None

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        folder = self._folder
        done = f"{len(folder.runs) - len(folder.missing())} of {len(folder.runs)} blocks"
        stored = self.settings["stored"]
        return f"Index({str(folder.path)!r}, n={self.n}, {stored}, {self.nbytes / 2**20:.1f} MiB, {done})"

    # ---------------------------------------------------------------------------------------------------------- queries

    @overload
    def scores(self, query: Any, *, by: Literal["all"] = "all", query_groups: Tensor | None = None) -> Tensor: ...
    @overload
    def scores(self, query: Any, *, by: Literal["layer"], query_groups: Tensor | None = None) -> dict[str, Tensor]: ...
    @together
    def scores(
        self, query: Any, *, by: Literal["all", "layer"] = "all", query_groups: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Scores [q, n], as `Influence.scores` gives them, columns in the order of `examples`.

        Args:
            query: data with labels.
            by: "layer": the part of every block in them, {block: [q, n]}.
            query_groups: int64 [q]; rows are then groups of queries, [groups, n].
        """
        if by not in ("all", "layer"):
            raise ValueError(f"scores: by must be one of 'all', 'layer', got {by!r}")
        query = walkable(self._influence(), query)
        self._compare("scores", {"query": query, "by": by, "query_groups": query_groups})
        begin, n = own_columns(self._folder, self.ranks)
        out: dict[str, Tensor] = {}
        for first, start, parts in self._tiles(query, query_groups):
            for name, values in parts.items():
                into = name if by == "layer" else ""
                if into not in out:
                    out[into] = values.new_zeros((self._rows(query, query_groups), n))
                out[into][first : first + len(values), start - begin : start - begin + values.shape[1]] += values
        if self.ranks.world > 1:
            out = of_all_ranks(ready(self._influence()), out, columns=True)
        return out if by == "layer" else out[""]

    @together
    def top(self, query: Any, k: int, *, largest: bool = True, rerank: int = 0, train: Any | None = None) -> Top:
        """The k training examples with the largest scores for each query, as `Influence.top` gives them.

        Args:
            rerank: compute the scores of so many of each query's best exactly, and take the k best of these; it needs
                `train`, of which these examples alone go through the model.
            train: the training data of the index.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.n:
            raise ValueError(f"top: k must be an integer in [1, n={self.n}], got k={k}")
        if rerank and not k <= rerank <= self.n:
            raise ValueError(f"top: rerank must be 0 or in [k={k}, n={self.n}], got {rerank}")
        if rerank and train is None:
            raise ValueError("top: rerank= needs train=, the training data of the index")
        query = walkable(self._influence(), query)
        self._compare("top", {"query": query, "k": k, "largest": largest, "rerank": rerank})
        held: dict[int, tuple[Tensor, Tensor]] = {}
        for first, start, parts in self._tiles(query, None):
            held[first] = best_of(held.get(first), sum_of(parts), start, rerank or k, largest)
        found = [torch.cat(parts) for parts in zip(*(held[first] for first in sorted(held)), strict=True)]
        own = (found[0], found[1]) if found else None
        values, places = best_of_ranks(self.ranks, own, rerank or k, largest)
        if rerank:
            values, places = self._reranked(query, train, places, k, largest)
        ids = self.ids()
        plain = ids.tolist() if isinstance(ids, Tensor) else ids
        named = None if plain is None else [[plain[place] for place in row] for row in places.tolist()]
        return Top(values, self.examples[places], named)

    def _reranked(self, query: Any, train: Any, places: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
        """The k best of each query's `places` by their exact scores."""
        influence = self._influence()
        data = walkable(influence, train)
        if data.n != self.total:
            raise ValueError(f"top: train must be the {self.total} training examples of the index, got {data.n}")
        known = self._folder.manifest["parts"]
        if len(known) == 1 and data.identity.fingerprint != known[0]["settings"]["train"]:
            raise ValueError("top: train is not the training data of the index: its examples or batches differ")
        chosen, back = places.unique(return_inverse=True)
        fitted = ready(influence)
        compare_setups(fitted.setup, "top", {"train": data})
        mine = own_part_of(data, self.examples[chosen], self.ranks)
        own = None if mine is None else compute_scores(fitted.alone, query, mine).values[""].to(self.ranks.device)
        exact = self.ranks.join("exact scores", own, self.ranks.device, dim=1).cpu()
        values = exact.gather(1, back)
        order = places.argsort(1)  # ties go to the lower index
        values, places = values.gather(1, order), places.gather(1, order)
        best = values.argsort(dim=1, descending=largest, stable=True)[:, :k]
        return values.gather(1, best), places.gather(1, best)

    def _tiles(self, query: Any, groups: Tensor | None) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """First row, first column and parts by layer of the scores, block by block of the index; of several ranks each
        has those of its own blocks."""
        self._folder.check_finished()
        influence = self._influence()
        fitted, total = ready(influence), self._rows(query, groups)
        groups = None if groups is None else groups.cpu()
        encoder, (begin, n) = self._encoder(), own_columns(self._folder, self.ranks)
        if n == 0:
            return
        # Of the memory a half is for queries, whole and thin, the rest for a block and what is made of it.
        with closing(encoder.queries(query, total, groups, fitted.memory * 3 // 10)) as blocks:
            for first, held in blocks:
                start, queries = begin, asked(encoder, self._folder, held, self.n, first)
                for block in own_blocks(self._folder, self.ranks):
                    yield first, start, products(block.factors, queries, first)
                    start += len(block.examples)

    def _encoder(self) -> Encoder:
        fitted = ready(self._influence())
        if self._made is None or self._made.fitted is not fitted:
            self._made = encoder_of(self._folder, fitted)
        return self._made

    def _rows(self, query: Any, groups: Tensor | None) -> int:
        q = count(query, self._influence().passes.batch_size)
        if groups is None:
            return q
        check_groups("query_groups", groups, q)
        return int(groups.max()) + 1

    def _influence(self) -> Influence:
        if self.influence is None:
            raise ValueError(
                f"index: queries need the model: Index({str(self.path)!r}, influence) with an Influence of the same "
                "model and arguments, fitted or not"
            )
        return self.influence
