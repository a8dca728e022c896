"""The eigenvectors of a block, for a damping that is a function of its eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor

from fastif.curvature.damping import Damping, NotPositiveDefinite, TrainingDamping, sufficient
from fastif.curvature.exact.cholesky import check_finite

_ROWS = 512  # Rows that are looked through for entries at a time.


class SpectralFactor:
    """f(G) for f of a `TrainingDamping`, by eigenvectors in float64 beside the block; a `Factor` of its inverse.

    Rows and columns of zeros (of inputs that are always 0) are eigenvectors by themselves and left out: they cost time,
    and LAPACK may fail over many of them.
    """

    in_place, corrected = False, False

    def __init__(self, values: Tensor, vectors: Tensor, rows: Tensor | None, size: int, rule: TrainingDamping):
        self.damping = rule.of_flat_directions
        self._vectors = vectors  # columns [p, p]
        self._rows = rows  # int64 [p], those that are not zero; None: all
        self._size = size
        self._gains = rule.filter(values)  # f, float64 [p]
        self._outside = rule.at(0.0)

    @classmethod
    def make(cls, block: Tensor, damping: Damping, name: str) -> SpectralFactor:
        """Raises NotPositiveDefinite for NaN and Inf, and for an eigenvalue below −γ by more than rounding.

        Rounding is P·eps times the largest diagonal entry, eps that of the block's own dtype, as in `diagnose`.
        """
        assert isinstance(damping, TrainingDamping)
        size = len(block)
        check_finite(block, name)
        rounding = size * torch.finfo(block.dtype).eps * max(0.0, block.diagonal().max().item())
        rows: Tensor | None = torch.cat([(part != 0).any(1) for part in block.split(_ROWS)]).nonzero()[:, 0]
        if len(rows) == size:
            rows = None
        matrix = block if rows is None else block[rows[:, None], rows]
        vectors = torch.empty(matrix.shape, dtype=torch.float64, device=block.device).mT.copy_(matrix)
        del matrix
        values = vectors.new_empty(len(vectors))
        try:
            if len(vectors):
                torch.linalg.eigh(vectors, out=(values, vectors))
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise NotPositiveDefinite(
                f"{name} [{size}, {size}] has no eigenvectors that LAPACK finds ({error}), which {damping} needs; a "
                "number as damping would do with a Cholesky factor"
            ) from error
        lowest = values.min().item() if len(values) else 0.0
        if not lowest + damping.weight_decay >= -rounding:
            raise NotPositiveDefinite(
                f"{name} [{size}, {size}] with damping {damping} has the negative eigenvalue {lowest:.3g}, along which "
                f"training runs away; weight_decay {sufficient(lowest):g} would do, or matrix='ggn'"
            )
        return cls(values, vectors, rows, size, damping)

    @classmethod
    def stand_in(cls, block: Tensor, name: str) -> SpectralFactor:
        """That of a block of zeros, with f = 1."""
        del name
        vectors = torch.eye(len(block), dtype=torch.float64, device=block.device)
        return cls(vectors.new_zeros(len(block)), vectors, None, len(block), TrainingDamping(1.0))

    @staticmethod
    def footprint(size: int, item: int) -> tuple[int, int]:
        """Bytes held, of the block of `item` bytes an entry and its eigenvectors, and what LAPACK takes beside them."""
        return size**2 * (item + 8), 2 * 8 * size**2

    def solve(self, columns: Tensor) -> Tensor:
        """f(G) columns."""
        if self._rows is None:
            return self._vectors @ (self._vectors.mT @ columns).mul_(self._gains[:, None])
        solved = columns * self._outside
        solved[self._rows] = self._vectors @ (self._vectors.mT @ columns[self._rows]).mul_(self._gains[:, None])
        return solved

    def sq_norms(self, columns: Tensor) -> Tensor:
        """|f(G)^½ v|² of each column v: half the work of `solve`."""
        some = columns if self._rows is None else columns[self._rows]
        norms = (self._vectors.mT @ some).square_().mul_(self._gains[:, None]).sum(0)
        if self._rows is not None:
            zero = torch.ones(self._size, dtype=torch.bool, device=columns.device).index_fill_(0, self._rows, False)
            norms += self._outside * columns[zero].square().sum(0)
        return norms

    def logdet(self) -> float:
        """log det of f(G)⁻¹."""
        return -self._all_gains().log().sum().item()

    def condition(self) -> float:
        """The largest over the smallest eigenvalue of f(G)."""
        gains = self._all_gains()
        return (gains.max() / gains.min()).item()

    def lower(self) -> Tensor:
        raise ValueError(
            "ExactBlock.factor: a TrainingDamping is applied by eigenvectors, there is no Cholesky factor; inverse() "
            "is the filter as a matrix"
        )

    def inverse(self) -> Tensor:
        """f(G)."""
        return self.solve(torch.eye(self._size, dtype=torch.float64, device=self._vectors.device))

    def take(self, inputs: Tensor, roots: Tensor) -> bool:
        del inputs, roots
        return False

    def release(self) -> None: ...

    def _all_gains(self) -> Tensor:
        outside = self._gains.new_full((self._size - len(self._gains),), self._outside)
        return torch.cat([self._gains, outside])
