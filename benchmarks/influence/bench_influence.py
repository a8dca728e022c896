"""EK-FAC influence against kronfluence and dattri: the same work, the same answer, CPU time and peak memory.

Both sides get the model, the training data, the queries and the empirical Fisher, so that scores must agree; that is
asserted first, on a part of the data. Then fastif does all of it, and the peers two smaller parts: their time is
a constant (eigenvectors) plus a multiple of the number of training examples, and is drawn on to the full number.
FASTIF_BENCH_SCALE multiplies every number of examples (default 1). Needs FASTIF_DATA, a folder with the data sets.

`make bench-influence` keeps the figures.
"""

from __future__ import annotations

import copy
import csv
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import fastif
from benchmarks.conftest import DEVICE
from benchmarks.influence.operations import counted, products_per_second, seconds_of
from fastif.measure import Measure

DATA = os.environ.get("FASTIF_DATA")
SCALE = float(os.environ.get("FASTIF_BENCH_SCALE", "1"))
DAMPING = 1e-3
CLOCK = "cpu_seconds" if DEVICE.type == "cpu" else "wall_seconds"  # what ratios are taken of

pytestmark = [
    pytest.mark.skipif(DATA is None, reason="FASTIF_DATA names no folder with data sets"),
    pytest.mark.filterwarnings("ignore"),
]


class Work(NamedTuple):
    model: nn.Module
    loss: str
    layers: list[str]
    train: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    parts: tuple[int, int]  # training examples that peers are given
    batch: int


# ----------------------------------------------------------------------------------------------------------- the models


def trained(model: nn.Module, x: Tensor, y: Tensor, loss: str, epochs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    model = model.to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            summed(loss, model(x[rows].to(DEVICE)), y[rows].to(DEVICE)).div(len(rows)).backward()
            optimizer.step()
    return model.eval()


def summed(loss: str, logits: Tensor, y: Tensor) -> Tensor:
    if loss == "causal_lm":
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="sum", ignore_index=-100)
    return F.cross_entropy(logits, y, reduction="sum")


def size(n: int) -> int:
    return max(8, int(n * SCALE))


def image_work(model: nn.Module, name: str, n: int, q: int, parts: tuple[int, int], batch: int) -> Work:
    data = fastif.data.load(name, DATA)
    n, q = size(n), size(q)
    model = trained(model, data.x_train[:n], data.y_train[:n], "cross_entropy")
    layers = [k for k, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    train, query = (data.x_train[:n], data.y_train[:n]), (data.x_test[:q], data.y_test[:q])
    return Work(model, "cross_entropy", layers, train, query, (size(parts[0]), size(parts[1])), batch)


def mlp() -> Work:
    sizes = (784, 256, 128, 10)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return image_work(nn.Sequential(nn.Flatten(), *layers[:-1]), "fashion-mnist", 10_000, 500, (500, 1000), 250)


def cnn() -> Work:
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    return image_work(model, "fashion-mnist", 10_000, 500, (250, 500), 250)


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = convolution(width, width), convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


def convolution(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def resnet9() -> Work:
    w = 32
    model = nn.Sequential(
        *(convolution(3, w), convolution(w, 2 * w), nn.MaxPool2d(2), Residual(2 * w)),
        *(convolution(2 * w, 4 * w), nn.MaxPool2d(2), convolution(4 * w, 4 * w), nn.MaxPool2d(2), Residual(4 * w)),
        *(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(4 * w, 10)),
    )
    return image_work(model, "cifar10", 5000, 200, (250, 1000), 50)


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before(x)).chunk(3, 2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)  # [n, h, t, e]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int = 128, depth: int = 4, heads: int = 4):
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


def gpt() -> Work:
    return text_work(2000, 100, (100, 300), 128, 4, 4)


def gpt10m() -> Work:
    """Of ten million parameters in its blocks."""
    return text_work(1250, 100, (100, 300), 384, 6, 6)


def gpt10m_whole() -> Work:
    """The same, with the texts of BANKING77 but for a few."""
    return text_work(9_990, 4, (100, 300), 384, 6, 6)


def text_work(n: int, q: int, parts: tuple[int, int], width: int, depth: int, heads: int) -> Work:
    length = 24
    folder = next(f for f in (Path(DATA or "."), Path(DATA or ".") / "banking77") if (f / "train.csv").is_file())
    with (folder / "train.csv").open(encoding="utf-8") as file:
        texts = [row["text"].lower().split()[:length] for row in csv.DictReader(file)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    n, q = size(n), size(q)
    texts = [texts[i] for i in order[: n + q]]
    words = {word: number for number, word in enumerate(sorted({w for t in texts for w in t}), 1)}
    tokens = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor([words[word] for word in text])
    labels = tokens.masked_fill(tokens == 0, -100)
    network = Transformer(len(words) + 1, length, width, depth, heads)
    model = trained(network, tokens[:n], labels[:n], "causal_lm", epochs=2)
    layers = [k for k, m in model.named_modules() if isinstance(m, nn.Linear) and k.startswith("blocks.")]
    sizes = (size(parts[0]), size(parts[1]))
    return Work(model, "causal_lm", layers, (tokens[:n], labels[:n]), (tokens[n:], labels[n:]), sizes, 50)


# ---------------------------------------------------------------------------------------------------------- contenders


class Stages(NamedTuple):
    """CPU seconds and peak MiB of the three stages."""

    seconds: dict[str, float]
    wall: dict[str, float]
    peaks: dict[str, float]
    scores: Tensor  # [q, n], without the 1/n
    own: Tensor | None  # self-scores [n], likewise

    @property
    def peak(self) -> float:
        return max(self.peaks.values())


def staged(
    stages: dict[str, Callable[[], Any]],
) -> tuple[dict[str, float], dict[str, float], dict[str, float], dict[str, Any]]:
    cpu, wall, peaks, results = {}, {}, {}, {}
    for name, work in stages.items():
        with Measure(DEVICE) as measured:
            start = time.process_time()
            results[name] = work()
            cpu[name] = time.process_time() - start
        wall[name] = measured.seconds
        peaks[name] = (measured.peak_bytes or 0) / 2**20
    return cpu, wall, peaks, results


def run_fastif(work: Work, n: int, separable: float | None = None, memory: int = 1 << 27) -> Stages:
    train = tuple(x[:n] for x in work.train)
    influence = fastif.Influence(
        work.model,
        work.loss,  # pyright: ignore[reportArgumentType]
        fastif.EKFAC(DAMPING, fisher="empirical", separable=separable),
        layers=work.layers,
        batch_size=work.batch,
        memory=memory,
        progress=False,
    )
    cpu, wall, peaks, results = staged(
        {
            "fit": lambda: influence.fit(train),
            "scores": lambda: influence.scores(work.query, train),
            "self": lambda: influence.self_influence(train),
        }
    )
    return Stages(cpu, wall, peaks, results["scores"] * n, results["self"] * n)


def run_kronfluence(work: Work, n: int) -> Stages:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Summed(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return summed(work.loss, model(batch[0]), batch[1])

        def compute_measurement(self, batch, model):
            return summed(work.loss, model(batch[0]), batch[1])

        def get_influence_tracked_modules(self):
            return work.layers

    train, query = TensorDataset(*(x[:n] for x in work.train)), TensorDataset(*work.query)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = Summed()
        analyzer = Analyzer(
            "bench", prepare_model(copy.deepcopy(work.model), task), task, cpu=DEVICE.type == "cpu",
            disable_tqdm=True, output_dir=folder,
        )  # fmt: skip
        factors = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        score = ScoreArguments(damping_factor=DAMPING)
        sizes = {"per_device_train_batch_size": work.batch, "score_args": score, "overwrite_output_dir": True}
        cpu, wall, peaks, _ = staged(
            {
                "fit": lambda: analyzer.fit_all_factors(
                    "f", train, per_device_batch_size=work.batch, factor_args=factors, overwrite_output_dir=True
                ),
                "scores": lambda: analyzer.compute_pairwise_scores(
                    "s", "f", query, train, per_device_query_batch_size=work.batch, **sizes
                ),
                "self": lambda: analyzer.compute_self_scores("t", "f", train, **sizes),
            }
        )
        own = analyzer.load_self_scores("t")["all_modules"]
        return Stages(cpu, wall, peaks, analyzer.load_pairwise_scores("s")["all_modules"], own)


def run_dattri(work: Work, n: int) -> Stages:
    """EK-FAC of dattri 0.3: linear layers, mean loss per batch; there are no self-scores."""
    from dattri.algorithm.influence_function import IFAttributorEKFAC
    from dattri.task import AttributionTask

    model = copy.deepcopy(work.model)

    def loss(parameters, batch):
        logits = torch.func.functional_call(model, parameters, batch[0])
        return F.cross_entropy(logits, batch[1])

    task = AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])
    attributor = IFAttributorEKFAC(task, module_name=work.layers, damping=DAMPING)
    load = lambda data: torch.utils.data.DataLoader(TensorDataset(*data), batch_size=work.batch)  # noqa: E731
    train, query = load([x[:n] for x in work.train]), load(work.query)
    cpu, wall, peaks, results = staged(
        {"fit": lambda: attributor.cache(train), "scores": lambda: attributor.attribute(train, query)}
    )
    return Stages(cpu, wall, peaks, results["scores"].T, None)


SHORT = {resnet9: 64, gpt: 16}  # MiB of memory, where the queries' gradients are most of the peak
PEERS = {"kronfluence": run_kronfluence, "dattri": run_dattri}


def necessary(work: Work, n: int) -> dict[str, float]:
    """Processor seconds of what an exact EK-FAC cannot do without: four bare forward and backward passes, to the first
    covered layer; eigenvectors; and the matrix products that are left of fastif's, at the rate of a large one."""
    influence = fastif.Influence(
        work.model, work.loss, fastif.EKFAC(DAMPING, fisher="empirical"), layers=work.layers,
        batch_size=work.batch, progress=False,
    )  # fmt: skip
    shapes = [layer.shape for layer in influence.plan(work.train).layers.values()]
    model, outputs = copy.deepcopy(work.model).requires_grad_(False), []
    model.get_submodule(work.layers[0]).register_forward_hook(lambda m, i, o: outputs.append(o.requires_grad_()))
    each = influence.passes.at_a_time(min(n, work.batch))

    def one_pass():
        for x, y in zip(*(part[:n].split(each) for part in work.train), strict=True):
            outputs.clear()
            summed(work.loss, model(x.to(DEVICE)), y.to(DEVICE)).backward()

    with counted() as of_pass:
        one_pass()
    with counted() as of_all:
        run_fastif(work, n)
    products = (of_all.get_total_flops() - 4 * of_pass.get_total_flops()) / products_per_second()
    moments = [torch.eye(size, dtype=torch.float64, device=DEVICE) + 1 / size for _, o, d in shapes for size in (o, d)]
    moments = [moment + 1e-3 * torch.randn_like(moment) for moment in moments]
    bases = seconds_of(lambda: [torch.linalg.eigh(moment) for moment in moments])
    return {"passes": 4 * seconds_of(one_pass), "eigenvectors": bases, "products": products}


def drawn_on(small: dict[str, float], large: dict[str, float], parts: tuple[int, int], n: int) -> dict[str, float]:
    """Times at n examples, from two parts: a constant and a multiple of the number."""
    a, b = parts
    slopes = {stage: max(0.0, (large[stage] - small[stage]) / (b - a)) for stage in large}
    return {stage: large[stage] + slopes[stage] * (n - b) for stage in large}


def correlation(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None
    assert b is not None
    return float(torch.corrcoef(torch.stack([a.flatten().float(), b.flatten().float()]))[0, 1])


@pytest.mark.parametrize("make", [mlp, cnn, resnet9, gpt], ids=lambda f: f.__name__)
def test_influence(benchmark, capsys, make):
    pytest.importorskip("kronfluence")
    work = make()
    n = len(work.train[0])
    names = ["kronfluence", "dattri"] if make is mlp else ["kronfluence"]
    peers: dict[str, dict[str, Any]] = {}
    ours_part = run_fastif(work, work.parts[1])
    for name in names:
        if name == "dattri":
            pytest.importorskip("dattri")
        small, large = (PEERS[name](work, part) for part in work.parts)
        agreement = correlation(large.scores, ours_part.scores)
        if name == "kronfluence":
            assert agreement >= 0.9999, f"{name}: correlation {agreement}"
            assert correlation(large.own, ours_part.own) >= 0.9999
        cpu = drawn_on(small.seconds, large.seconds, work.parts, n)
        wall = drawn_on(small.wall, large.wall, work.parts, n)
        peers[name] = {
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "peak_mib": large.peak,
            "correlation": agreement,
        }
    exact = run_fastif(work, n)
    ours: dict[str, dict[str, Any]] = {
        "exact": {"cpu_seconds": exact.seconds, "wall_seconds": exact.wall, "peak_mib": exact.peak}
    }
    if make is mlp:
        made = run_fastif(work, n, separable=1e-4)
        error = float((made.scores - exact.scores).norm() / exact.scores.norm())
        assert error <= 1e-4
        ours["separable"] = {
            "cpu_seconds": made.seconds, "wall_seconds": made.wall, "peak_mib": made.peak, "relative_error": error,
        }  # fmt: skip
    if make in SHORT:
        made = run_fastif(work, n, memory=SHORT[make] << 20)
        assert torch.allclose(made.scores, exact.scores, rtol=1e-3, atol=1e-5 * float(exact.scores.abs().max()))
        ours[f"memory={SHORT[make]} MiB"] = {
            "cpu_seconds": made.seconds, "wall_seconds": made.wall, "peak_mib": made.peak,
        }  # fmt: skip
    floor = necessary(work, n)
    ratio = {
        f"{peer} / {kind}": sum(theirs[CLOCK].values())
        / sum(seconds for stage, seconds in mine[CLOCK].items() if stage in theirs[CLOCK])
        for peer, theirs in peers.items()
        for kind, mine in ours.items()
    }
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        n=n, q=len(work.query[0]), parameters=sum(p.numel() for p in work.model.parameters()), parts=work.parts,
        batch=work.batch, stage_peaks_mib=exact.peaks, fastif=ours, peers=peers, ratio=ratio,
        necessary=floor, share_of_limit=sum(floor.values()) / sum(ours["exact"][CLOCK].values()),
    )  # fmt: skip
    with capsys.disabled():
        print(f"\n{make.__name__}: {n} train x {len(work.query[0])} queries")
        for name, row in {**ours, **peers}.items():
            stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in row[CLOCK].items())
            print(f"  {name:12} s: {stages}; peak {row['peak_mib']:.0f} MiB")
        print("  necessary    s: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in floor.items()))
        print("  " + ", ".join(f"{name}: {value:.1f}x" for name, value in ratio.items()))


SIZES = {"n": (500, 1000, 2000, 4000, 8000), "q": (8, 32, 128, 512), "width": (64, 128, 256, 512, 1024)}
PEER_SIZES = {"n": (250, 500, 1000), "q": (8, 32, 128), "width": (64, 128, 256)}
USUAL = {"n": 1000, "q": 64, "width": 256}


@pytest.mark.parametrize("axis", list(SIZES))
def test_growth(benchmark, capsys, axis):
    """All three stages together on a 784-width-width-10 net, one size at a time."""
    pytest.importorskip("kronfluence")
    data = fastif.data.load("fashion-mnist", DATA)
    rows = []
    for contender, run, sizes in (("fastif", run_fastif, SIZES), ("kronfluence", run_kronfluence, PEER_SIZES)):
        for value in sizes[axis]:
            at = {**USUAL, axis: value if axis == "width" else size(value)}
            w, q, n = at["width"], at["q"], at["n"]
            torch.manual_seed(0)
            layers = (nn.Linear(784, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10))
            model = nn.Sequential(nn.Flatten(), *layers).eval()
            train, query = (data.x_train[:n], data.y_train[:n]), (data.x_test[:q], data.y_test[:q])
            made = run(Work(model, "cross_entropy", ["1", "3", "5"], train, query, (n, n), 250), n)
            rows.append({"contender": contender, **at, "cpu": sum(made.seconds.values()), "peak_mib": made.peak})
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(axis=axis, rows=rows)
    with capsys.disabled():
        print(f"\ngrowth with {axis}")
        for row in rows:
            print(f"  {row['contender']:12} {axis} = {row[axis]:6,}: {row['cpu']:8.2f} s, {row['peak_mib']:.0f} MiB")
