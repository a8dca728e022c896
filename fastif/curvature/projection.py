"""Random projection: the curvature of a whole network in a few hundred dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from fastif.curvature import limits
from fastif.curvature.damping import TrainingDamping, check_positive, constant_damping
from fastif.curvature.directions import Directions
from fastif.curvature.exact.cholesky import factorize
from fastif.curvature.matrix_free.iterations import check_iterations
from fastif.curvature.protocol import BlockWork, Cost, Exchanged, FitData, FitWork, JointCurvature, Shape, check_fisher
from fastif.model.gradients import Gradients
from fastif.model.losses import Fisher
from fastif.renamed import warn_renamed

_WORD = 32  # signs that one hash gives


class RandomProjection(JointCurvature):
    """Sᵀ(K + λI)⁻¹S in the place of (G + λI)⁻¹: gradients are projected to φ = S g before anything else is done.

    S = (±1)/√k has `dimension` rows k over all parameters of all blocks, and K = Σ_i w_i Σ_s φ_is φ_isᵀ, the curvature
    as the projected gradients see it. Scores are φ_qᵀ(K + λI)⁻¹φ_t/n (TRAK, Park et al. 2023, arXiv 2303.14186); as k
    grows they go to those of the whole matrix. Of a query k numbers are kept, of the curvature k². The signs are
    hashes of (seed, block, entry, row): the same on every device, in every batch, and whatever else is covered.
    docs/math.md (20).

    Args:
        dimension: k.
        damping: absolute λ > 0; or a `TrainingDamping`, its γ + 1/τ (see `damping_used`).
        fisher: which gradients K is made of, as for `KFAC`.
        seed: of the signs.
    """

    passes = 1

    def __init__(
        self,
        dimension: int = 512,
        damping: float | TrainingDamping = 1e-3,
        fisher: Fisher = "empirical",
        seed: int = 0,
    ):
        check_positive("RandomProjection", damping, (TrainingDamping,))
        check_iterations("RandomProjection", 0.5, dimension=dimension)
        check_fisher("RandomProjection", fisher)
        self.dimension, self.damping, self.seed = dimension, damping, seed
        self.fisher: Fisher = fisher
        self._moment: Tensor | None = None  # K, float64 [k, k]
        self._factor: Tensor | None = None

    def begin(self, shapes: Mapping[str, Shape], data: FitData | None) -> None:
        del data
        self._shapes, self._moment, self._factor = dict(shapes), None, None
        self._held: dict[str, Tensor] = {}  # S by block

    def observe(self, gradients: Mapping[str, Gradients], weights: Tensor, column: int, pass_index: int) -> None:
        del column, pass_index
        rows = self.project(gradients).double()
        moment = (rows * weights.to(rows)[:, None]).T @ rows
        self._moment = moment if self._moment is None else self._moment.add_(moment)

    def sums(self, pass_index: int) -> dict[str, Tensor]:
        del pass_index
        return {} if self._moment is None else {"moment": self._moment}

    def take_sums(self, pass_index: int, sums: dict[str, Tensor]) -> None:
        del pass_index
        self._moment = sums["moment"]

    def end(self, pass_index: int) -> None:
        """Makes the factor. Raises NotPositiveDefinite where K holds NaN or Inf."""
        del pass_index
        _ = self.factor

    @property
    def moment(self) -> Tensor:
        """K, float64 [k, k]."""
        if self._moment is None:
            raise ValueError("RandomProjection: not fitted; call Influence.fit first")
        return self._moment

    @property
    def damping_used(self) -> float:
        """λ: the number given, or that of a `TrainingDamping`."""
        return constant_damping(self.damping)

    @property
    def factor(self) -> Tensor:
        """Lower Cholesky factor of K + λI, float64 [k, k]."""
        if self._factor is None:
            self._factor = factorize(self.moment, self.damping_used, "RandomProjection")[0]
        return self._factor

    def project(self, gradients: Mapping[str, Gradients]) -> Tensor:
        """φ_i = Σ_blocks S g_i, [n, k]; the gradients are not formed where their factors are smaller."""
        parts = [self.project_block(name, g) for name, g in gradients.items()]
        return torch.stack(parts).sum(0)

    def project_block(self, name: str, gradients: Gradients) -> Tensor:
        """The part S g_i of one block, [n, k]."""
        like = gradients.rows(0, 1).formed()
        return torch.cat([gradients.dots(signs).T for signs in self._signs(name, like)], 1)

    def projected(self, gradients: Mapping[str, Gradients]) -> Tensor:
        """The old name of `project`."""
        warn_renamed("RandomProjection.projected", "RandomProjection.project")
        return self.project(gradients)

    def projected_block(self, name: str, gradients: Gradients) -> Tensor:
        """The old name of `project_block`."""
        warn_renamed("RandomProjection.projected_block", "RandomProjection.project_block")
        return self.project_block(name, gradients)

    def _signs(self, name: str, like: Tensor) -> Iterator[Tensor]:
        """S of a block, [rows, g, o, d], as many rows at a time as may stand."""
        shape = self._shapes[name]
        size = math.prod(shape)
        if name in self._held:
            yield self._held[name].to(like)
            return
        words = -(-self.dimension // _WORD)
        each = max(1, limits.SIGNS_MADE // (size * _WORD))
        made: list[Tensor] = []
        for begin in range(0, words, each):
            s = signs(self.seed, name, size, begin, min(each, words - begin), like.device)
            s = s[: self.dimension - begin * _WORD].to(like.dtype) / self.dimension**0.5
            s = s.view(-1, *shape)
            yield s
            if self._holds:
                made.append(s)
        if self._holds:
            self._held[name] = torch.cat(made)

    @property
    def _holds(self) -> bool:
        """Whether all signs are few enough to be made once."""
        return self.dimension * sum(math.prod(shape) for shape in self._shapes.values()) <= limits.SIGNS_KEPT

    def _solve_rows(self, rows: Tensor) -> Tensor:
        """(K + λI)⁻¹ φ for rows φ [m, k]."""
        return torch.cholesky_solve(rows.double().T, self.factor).T.to(rows)

    def solve(self, rhs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sᵀ(K + λI)⁻¹S rhs."""
        flat = {name: value.reshape(-1, math.prod(self._shapes[name])) for name, value in rhs.items()}
        rows = torch.stack(
            [torch.cat([v @ s.flatten(1).T for s in self._signs(name, v)], 1) for name, v in flat.items()]
        ).sum(0)
        solved = self._solve_rows(rows)
        out: dict[str, Tensor] = {}
        for name, value in flat.items():
            total, begin = torch.zeros_like(value), 0
            for s in self._signs(name, value):
                total += solved[:, begin : begin + len(s)] @ s.flatten(1)
                begin += len(s)
            out[name] = total.reshape(rhs[name].shape)
        return out

    def sq_norms(self, gradients: Mapping[str, Gradients]) -> Tensor:
        rows = self.project(gradients)
        return (rows * self._solve_rows(rows)).sum(1)

    def directions(self, gradients: Mapping[str, Gradients]) -> dict[str, Directions]:
        solved = self._solve_rows(self.project(gradients))
        return {name: Projected(solved, self, name, len(gradients)) for name in gradients}

    def state_dict(self) -> dict[str, Tensor]:
        return {"moment": self.moment, "signs": torch.tensor([self.dimension, self.seed])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        dimension, seed = state["signs"].tolist()
        if (dimension, seed) != (self.dimension, self.seed):
            raise ValueError(
                f"RandomProjection: the state is of dimension={dimension}, seed={seed}, not of "
                f"dimension={self.dimension}, seed={self.seed}"
            )
        self._moment, self._factor = state["moment"], None

    def cost(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Cost:
        largest, k = max(block.size for block in blocks.values()), self.dimension
        standing = min(max(limits.SIGNS_MADE, largest * _WORD), largest * (k + _WORD))
        every = k * sum(block.size for block in blocks.values())
        formed = sum(block.positions * block.size for block in blocks.values())
        return Cost(
            held=2 * 8 * k**2 + (every * fit.item if every <= limits.SIGNS_KEPT else 0),
            making=standing * (8 + fit.item) + 2 * 8 * k**2,
            operations=2 * fit.n * fit.columns * (formed + every + k**2) + k**3 / 3,
            learned=8 * k**2 + (every * fit.item if every <= limits.SIGNS_KEPT else 0),
            observing=standing * (8 + fit.item),
        )

    def exchanged(self, blocks: Mapping[str, BlockWork], fit: FitWork) -> Exchanged:
        """K; every rank makes the factor."""
        del blocks, fit
        return Exchanged(summed=8 * self.dimension**2)


@dataclass(frozen=True)
class Projected:
    """A block's part in scores with queries: (K + λI)⁻¹ φ_q, which all blocks share."""

    solved: Tensor  # [q, k]
    projection: RandomProjection
    name: str
    sharing: int  # blocks

    def __len__(self) -> int:
        return len(self.solved)

    @property
    def nbytes(self) -> int:
        return -(-self.solved.nbytes // self.sharing)

    @property
    def error(self) -> float:
        return 0.0

    def dots(self, train: Gradients) -> Tensor:
        return self.solved @ self.projection.project_block(self.name, train).T


def signs(seed: int, name: str, size: int, first: int, words: int, device: torch.device) -> Tensor:
    """±1 as int8 [32 words, size]: rows 32 first, … of the projection of a block, by integer arithmetic alone.

    Bit b of hash(entry, word) is the sign of row 32 word + b; the hash is two rounds of MurmurHash3's finaliser, keyed
    by the seed and the block's name.
    """
    key = int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    low, high = key & 0xFFFFFFFF, key >> 32
    entries = torch.arange(size, device=device, dtype=torch.int64)
    base = _mixed((entries ^ (entries >> 32) * 0x27D4EB2F) + low)
    word = torch.arange(first, first + words, device=device, dtype=torch.int64)
    hashes = _mixed(base[None, :] ^ _mixed(word * 0x9E3779B1 + high)[:, None])
    bits = torch.arange(_WORD, device=device, dtype=torch.int64)
    return ((hashes[:, None, :] >> bits[:, None]) & 1).to(torch.int8).mul_(2).sub_(1).flatten(0, 1)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of the numbers below 2³² in which every bit depends on all; int64 products may wrap."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
