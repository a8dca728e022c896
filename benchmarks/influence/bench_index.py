"""The index against walking through the training data again: building, asking, bytes, and what is lost.

With share=1 in float32 the scores must be those of `Influence.scores`, which is asserted first, on a part of the data.
Beside each index stands a random Kronecker projection of the same bytes: gradients that the curvature has whitened,
projected on both sides by random orthogonal matrices, in the form of LoGra (Choe et al. 2024, arXiv 2405.13954), in
float32, and with four times the numbers, as if int8 lost nothing. Libraries that are installed take part, too:
index_peers.py. Models and data are those of bench_influence.py, and so are FASTIF_BENCH_SCALE and FASTIF_DATA.

FASTIF_BENCH=large takes a ResNet-9 and a GPT of ten million parameters instead, of fewer examples, with one share and
no projections; FASTIF_BENCH=whole with FASTIF_BENCH_SCALE=1 the MLP and the CNN with all examples, likewise;
FASTIF_BENCH=texts with FASTIF_BENCH_SCALE=1 that GPT with ten thousand texts, of which 2,500 carry the curvature, and a
single query, half an hour;
FASTIF_BENCH=growth the growth with n to a million examples, whose factors are drawn at random, beside a copy's rate.

`make bench-index` keeps the figures, and with FASTIF_BENCH those of the others.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastif
from benchmarks.influence.bench_influence import DAMPING, DATA, Work, cnn, gpt, gpt10m, gpt10m_whole, mlp, resnet9, size
from benchmarks.influence.index_peers import QUERIES, installed, logra, repeated, stored_pairs, timed, trak
from fastif.index.factors import Factors
from fastif.index.folder import CURVATURE, Folder, IndexBlock
from fastif.index.sampling import compare

SHARES = (0.01, 0.04, 0.16)  # of the numbers; a quarter of that of the bytes, in int8
BYTES = (0.0025, 0.01, 0.04)  # of float32 gradients, for projections
BENCH = os.environ.get("FASTIF_BENCH", "")
MODELS = {"growth": (), "large": (resnet9, gpt10m), "whole": (mlp, cnn), "texts": (gpt10m_whole,)}.get(
    BENCH, (mlp, cnn, gpt)
)
MOST = size(1250)  # training examples of the large ones
GROWTH = (10_000, 100_000, 1_000_000)

pytestmark = [
    pytest.mark.skipif(DATA is None, reason="FASTIF_DATA names no folder with data sets"),
    pytest.mark.filterwarnings("ignore"),
]


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


def peers(make: Callable[[], Work]) -> list[Callable[[Work, Tensor, float, str], dict[str, Any]]]:
    """The libraries' indexes that take part: dattri's of networks for images; without FASTIF_BENCH all of them."""
    found = [logra] if make is mlp and installed("dattri") else []
    if not BENCH:
        found += [trak] if make in (mlp, cnn) and installed("dattri") else []
        found += [stored_pairs] if installed("dattri_llm") else []
    return found


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_index(benchmark, capsys, make):
    work = make()
    shares, stored, queries = SHARES, BYTES, QUERIES
    if BENCH:
        shares, stored = SHARES[1:2], ()
    if BENCH == "large":
        queries = QUERIES[:2]
        work = work._replace(train=(work.train[0][:MOST], work.train[1][:MOST]))
    if BENCH == "texts":
        queries = QUERIES[:1]
        work = work._replace(query=repeated(work.query, 1))
    n = len(work.train[0])
    influence = fastif.Influence(
        work.model,
        work.loss,  # pyright: ignore[reportArgumentType]
        fastif.EKFAC(DAMPING, fisher="empirical"),
        layers=work.layers,
        batch_size=work.batch,
        progress=False,
    ).fit(work.train, subset=partial(fastif.samplers.random, k=min(n, 2500)) if BENCH == "texts" else None)
    walks = {q: timed(lambda q=q: influence.scores(repeated(work.query, q), work.train)) for q in queries}
    exact = walks[1][0] if BENCH == "texts" else influence.scores(work.query, work.train)
    with tempfile.TemporaryDirectory() as folder:
        few = 16 if BENCH == "texts" else 100
        some = tuple(x[:few] for x in work.train)
        scores = fastif.Index.build(influence, some, folder, share=1, dtype="float32").scores(work.query)
        wanted = exact[:, :few]
        assert float((scores - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    numbers = sum(torch.Size(shape).numel() for shape in work_shapes(influence))
    rows: list[dict[str, Any]] = []
    for share in shares:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "index"
            index, seconds, peak = timed(
                lambda out=out, share=share: fastif.Index.build(influence, work.train, out, share=share)
            )
            index.scores(repeated(work.query, 1))  # its checksums are looked at once
            asked = {q: timed(lambda q=q, index=index: index.scores(repeated(work.query, q)))[1] for q in queries}
            found = compare(exact, index.scores(work.query))
            rows.append(
                {
                    "contender": "fastif.Index, int8", "share": share, "bytes": index.nbytes / n / (4 * numbers),
                    "bytes_each": index.nbytes / n, "build": seconds, "peak_mib": peak, "asked": asked,
                    "r": found.r, "rho": found.rho, "top": found.top,
                }
            )  # fmt: skip
    for share in stored:
        for name, more in (("projection, float32", 1), ("projection, as if int8 lost nothing", 4)):
            found = compare(exact, projected(work, influence, more * share))
            rows.append({"contender": name, "bytes": share, "r": found.r, "rho": found.rho, "top": found.top})
    for peer in peers(make):
        with tempfile.TemporaryDirectory() as folder:
            row = peer(work, exact, rows[0]["bytes_each"], folder)
        rows.append({**row, "bytes": row["bytes_each"] / (4 * numbers)})
    once = None
    if BENCH != "texts":
        alone, together = one_pass(work, influence)
        once = {"apart": alone, "together": together}
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        n=n, q=len(work.query[0]), parameters=numbers, rows=rows, one_pass=once,
        walks={q: walk[1] for q, walk in walks.items()},
    )  # fmt: skip
    with capsys.disabled():
        print(
            f"\n{make.__name__}: {n} train x {len(work.query[0])} queries, {numbers:,} parameters; a walk s: ", end=""
        )
        print(", ".join(f"{q} queries {walk[1]:.2f}" for q, walk in walks.items()))
        for row in rows:
            print(f"  {row['contender']:34} {100 * row['bytes']:.2f} % bytes: r {row['r']:.3f}", end="")
            print(f" rho {row['rho']:.3f} top {row['top']:.2f}", end="")
            if "build" in row:
                asked = ", ".join(f"{q}: {s:.3f}" for q, s in row["asked"].items())
                print(f"; build {row['build']:.2f} s, asked {asked}", end="")
            print()
        if once is not None:
            apart, one = once["apart"], once["together"]
            print(f"  scores, self-influence and index apart {apart:.2f} s, from one walk {one:.2f} s")


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


@pytest.mark.skipif(BENCH != "growth", reason="FASTIF_BENCH=growth")
def test_growth(benchmark, capsys):
    """Asking an index of n examples, whose factors are drawn at random: seconds of one query, and the rate of reading
    beside that of a copy. The digits' network, two factors of an example in each of its layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    few = torch.randn(100, 64), torch.randint(0, 10, (100,))
    influence = fastif.Influence(model, curvature=fastif.EKFAC(DAMPING), progress=False).fit(few)
    rows: list[dict[str, Any]] = []
    for n in GROWTH:
        with tempfile.TemporaryDirectory() as path:
            index = drawn_index(influence, few, Path(path), n)
            index.scores((few[0][:1], few[1][:1]))  # its checksums are looked at once
            asked = min(timed(lambda index=index: index.scores((few[0][:1], few[1][:1])))[1] for _ in range(3))
            rows.append({"n": n, "bytes": index.nbytes, "seconds": asked, "copied": copied(index.nbytes)})
            assert index.scores((few[0][:1], few[1][:1])).shape == (1, n)
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info["growth"] = rows
    with capsys.disabled():
        for row in rows:
            rate = row["bytes"] / row["seconds"]
            share = rate / row["copied"]
            print(f"\n  {row['n']:>9,} examples, {row['bytes'] / 2**20:.0f} MiB: one query in", end="")
            print(f" {row['seconds']:.3f} s, {rate / 1e9:.2f} GB/s, {share:.0%} of a copy's", end="")


def drawn_index(influence: Any, few: tuple[Tensor, Tensor], path: Path, n: int, rank: int = 2) -> fastif.Index:
    """An index of n examples with random int8 factors, `rank` of each layer."""
    built = fastif.Index.build(influence, few, path / "small")
    out, draw = path / "large", torch.Generator().manual_seed(0)
    out.mkdir()
    (out / CURVATURE).write_bytes((path / "small" / CURVATURE).read_bytes())
    manifest = Folder(path / "small").manifest
    shapes = {name: shape for name, shape, _ in manifest["layers"]}
    each = sum(rank * (o + d + 4) + 4 for _, o, d in shapes.values())
    borders = [*range(0, n, max(1, (32 << 20) // each)), n]
    Folder.write_manifest(out, {
        **{name: value for name, value in manifest.items() if name != "format"},
        "parts": [{**manifest["parts"][0], "borders": borders}],
    })  # fmt: skip
    folder = Folder(out)
    integers = lambda *shape: torch.randint(-127, 128, shape, dtype=torch.int8, generator=draw)  # noqa: E731
    for run in folder.runs:
        m, ranks = len(run) * rank, torch.full((len(run), 1), rank, dtype=torch.int32)
        factors = {
            name: Factors(ranks.clone(), integers(m, o), integers(m, d), torch.ones(m))
            for name, (_, o, d) in shapes.items()
        }
        folder.write_block(run, IndexBlock(torch.arange(run.start, run.stop), None, factors))
    return fastif.Index(out, built.influence)


def copied(size: int) -> float:
    """Bytes per second of a copy of so many, read and written, of 256 MiB at most."""
    values = torch.ones(min(size, 256 << 20), dtype=torch.int8)
    into = torch.empty_like(values)
    into.copy_(values)
    return len(values) / min(timed(lambda: into.copy_(values))[1] for _ in range(5))
