"""The index against walking through the training data again: building, asking, bytes, and what is lost.

With share=1 in float32 the scores must be those of `Influence.scores`, which is asserted first, on a part of the data.
Beside each index stands a random Kronecker projection of the same bytes: gradients that the curvature has whitened,
projected on both sides by random orthogonal matrices, in the form of LoGra (Choe et al. 2024, arXiv 2405.13954), in
float32, and with four times the numbers, as if int8 lost nothing. Models and data are those of bench_influence.py, and
so are FASTIF_BENCH_SCALE and FASTIF_DATA.

`make bench-index` keeps the figures.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastif
from benchmarks.conftest import DEVICE
from benchmarks.influence.bench_influence import DAMPING, DATA, Work, cnn, gpt, mlp
from fastif.index.sampling import compare
from fastif.measure import Measure

SHARES = (0.01, 0.04, 0.16)  # of the numbers; a quarter of that of the bytes, in int8
BYTES = (0.0025, 0.01, 0.04)  # of float32 gradients, for projections
QUERIES = (1, 10, 100)

pytestmark = [
    pytest.mark.skipif(DATA is None, reason="FASTIF_DATA names no folder with data sets"),
    pytest.mark.filterwarnings("ignore"),
]


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """A result, its processor seconds and its peak MiB."""
    with Measure(DEVICE) as measured:
        start = time.process_time()
        result = work()
        seconds = time.process_time() - start
    return result, seconds, (measured.peak_bytes or 0) / 2**20


def repeated(query: tuple[Tensor, Tensor], q: int) -> tuple[Tensor, Tensor]:
    """q queries, the same ones again where there are fewer."""
    x, y = (part.repeat(-(-q // len(part)), *[1] * (part.dim() - 1))[:q] for part in query)
    return x, y


def orthogonal(size: int, few: int, draw: torch.Generator) -> Tensor:
    """A random projection [size, few] whose columns are orthogonal: it errs less than a Gaussian one."""
    return torch.linalg.qr(torch.randn(size, few, generator=draw)).Q * (size / few) ** 0.5


def projected(work: Work, influence: Any, share: float) -> Tensor:
    """Scores of projections with `share` of the numbers, times n; both sides are whitened by the root of f(Λ)."""
    curvatures, draw = influence.curvature, torch.Generator().manual_seed(0)
    total: Any = 0.0
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    for name, estimator in curvatures.items():
        _, o, d = estimator.eigenbasis().eigenvalues.shape
        rows, columns = (max(1, round(size * share**0.5)) for size in (o, d))
        matrices[name] = orthogonal(o, rows, draw), orthogonal(d, columns, draw)

    def project(data: Any) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [] for name in curvatures}
        with influence.passes.running(None):
            for _, _, gradients in influence.passes.gradients(data, "projection"):
                for name, g in gradients.items():
                    basis = curvatures[name].eigenbasis()
                    white = basis.rotate(g).formed()[:, 0] * basis.inverse[0].sqrt()
                    left, right = matrices[name]
                    parts[name].append((left.T @ white @ right).flatten(1))
        return {name: torch.cat(rows) for name, rows in parts.items()}

    query, train = project(work.query), project(work.train)
    for name in curvatures:
        total = total + query[name] @ train[name].T
    return total


@pytest.mark.parametrize("make", [mlp, cnn, gpt], ids=lambda f: f.__name__)
def test_index(benchmark, capsys, make):
    work = make()
    n = len(work.train[0])
    influence = fastif.Influence(
        work.model,
        work.loss,  # pyright: ignore[reportArgumentType]
        fastif.EKFAC(DAMPING, fisher="empirical"),
        layers=work.layers,
        batch_size=work.batch,
        progress=False,
    ).fit(work.train)
    exact = influence.scores(work.query, work.train)
    with tempfile.TemporaryDirectory() as folder:
        some = tuple(x[:100] for x in work.train)
        scores = fastif.Index.build(influence, some, folder, share=1, dtype="float32").scores(work.query)
        wanted = exact[:, :100]
        assert float((scores - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    walks = {q: timed(lambda q=q: influence.scores(repeated(work.query, q), work.train)) for q in QUERIES}
    size = sum(torch.Size(shape).numel() for shape in work_shapes(influence))
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "index"
            index, seconds, peak = timed(
                lambda out=out, share=share: fastif.Index.build(influence, work.train, out, share=share)
            )
            index.scores(repeated(work.query, 1))  # its checksums are looked at once
            asked = {q: timed(lambda q=q, index=index: index.scores(repeated(work.query, q)))[1] for q in QUERIES}
            found = compare(exact, index.scores(work.query))
            rows.append(
                {
                    "contender": "fastif.Index, int8", "share": share, "bytes": index.nbytes / n / (4 * size),
                    "bytes_each": index.nbytes / n, "build": seconds, "peak_mib": peak, "asked": asked,
                    "r": found.r, "rho": found.rho, "top": found.top,
                }
            )  # fmt: skip
    for share in BYTES:
        for name, more in (("projection, float32", 1), ("projection, as if int8 lost nothing", 4)):
            found = compare(exact, projected(work, influence, more * share))
            rows.append({"contender": name, "bytes": share, "r": found.r, "rho": found.rho, "top": found.top})
    alone, together = one_pass(work, influence)
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        n=n, q=len(work.query[0]), parameters=size, rows=rows, one_pass={"apart": alone, "together": together},
        walks={q: walk[1] for q, walk in walks.items()},
    )  # fmt: skip
    with capsys.disabled():
        print(f"\n{make.__name__}: {n} train x {len(work.query[0])} queries, {size:,} parameters; a walk s: ", end="")
        print(", ".join(f"{q} queries {walk[1]:.2f}" for q, walk in walks.items()))
        for row in rows:
            print(f"  {row['contender']:34} {100 * row['bytes']:.2f} % bytes: r {row['r']:.3f}", end="")
            print(f" rho {row['rho']:.3f} top {row['top']:.2f}", end="")
            if "build" in row:
                asked = ", ".join(f"{q}: {s:.3f}" for q, s in row["asked"].items())
                print(f"; build {row['build']:.2f} s, asked {asked}", end="")
            print()
        print(f"  scores, self-influence and index apart {alone:.2f} s, from one walk {together:.2f} s")


def one_pass(work: Work, influence: Any) -> tuple[float, float]:
    """Seconds of scores, self-influence and an index, each on its own and from one walk, with the same answers."""

    def apart(folder: str) -> tuple[Tensor, Tensor]:
        fastif.Index.build(influence, work.train, folder, self_influence=True)
        return influence.scores(work.query, work.train), influence.self_influence(work.train)

    def together(folder: str) -> Any:
        return fastif.answer(influence, work.train, work.query, scores=True, self_influence=True, out=folder)

    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        (scores, own), alone, _ = timed(lambda: apart(f"{first}/index"))
        found, one, _ = timed(lambda: together(f"{second}/index"))
    torch.testing.assert_close(found.scores, scores, rtol=1e-3, atol=1e-5 * float(scores.abs().max()))
    torch.testing.assert_close(found.self_influence, own, rtol=1e-3, atol=1e-5 * float(own.max()))
    return alone, one


def work_shapes(influence: Any) -> list[Any]:
    return [estimator.eigenbasis().eigenvalues.shape for estimator in influence.curvature.values()]
