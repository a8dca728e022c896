"""What scores do not depend on, and what it costs to hold every batch against the pass before.

python -m benchmarks.experiments.checks --out runs/checks.json
python -m benchmarks.figures.keep keep runs/checks.json checks

The same scores of small trained networks are computed again with another batch size, number of threads and bound on
memory, and by a process that was started anew and read the fitted state from a file; in float32, as users have it, and
in float64, where only rounding is left. The transformer's texts are padded to the longest of their batch: another batch
size is another padding, too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastif
from fastif.data.batches import as_loader
from fastif.data.checksums import checksums
from fastif.measure import environment
from fastif.model.losses import Loss

N, Q, BATCH = 120, 6, 32
SIDE = 32  # of the images that `linear` sees

ESTIMATORS: dict[str, Callable[[], Any]] = {
    "KFAC": fastif.KFAC,
    "EKFAC": fastif.EKFAC,
    "Shampoo": fastif.Shampoo,
    "Diagonal": fastif.Diagonal,
    "ExactBlock": fastif.ExactBlock,
    "CG": fastif.CG,
    "LiSSA": lambda: fastif.LiSSA(damping=1e-1),  # by default it takes 800 steps here
    "Arnoldi": fastif.Arnoldi,
    "DataInf": fastif.DataInf,
    "RandomProjection": lambda: fastif.RandomProjection(64),
}
WITH_DATA = ("CG", "LiSSA")  # these multiply with the data's curvature, keep none of it, and are fitted again
CHANGES: dict[str, dict[str, Any]] = {
    "batch size": {"batch": 7},
    "threads": {"threads": 2},
    "memory": {"memory": 1 << 16},
}
NETWORKS = ("mlp", "cnn", "transformer")


class Problem(NamedTuple):
    """A trained network with its data; `batches` cuts data as its users would."""

    model: nn.Module
    loss: Loss
    train: Any
    query: Any
    batches: Callable[[Any, int], Any]


class Reader(nn.Module):
    """A transformer's encoder over padded words, with a class for each text."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 12)
        self.layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.layer(self.table(input_ids), src_key_padding_mask=attention_mask == 0)
        kept = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * kept).sum(1) / kept.sum(1))


def padded(texts: list[tuple[Tensor, int]]) -> tuple[dict[str, Tensor], Tensor]:
    ids = nn.utils.rnn.pad_sequence([words for words, _ in texts], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(words) for words, _ in texts], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([label for _, label in texts])


def problem(name: str, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    if name == "transformer":
        texts = [(torch.randint(1, 30, (int(torch.randint(3, 15, ())),)), i % 3) for i in range(N + Q)]
        model, cut = Reader(), lambda part, size: DataLoader(part, batch_size=size, collate_fn=padded)
        train, query = texts[:N], texts[N:]
    else:
        shape, layers = ((1, 8, 8), [nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()])
        body = (
            [*layers, nn.Linear(24, 3)]
            if name == "cnn"
            else [nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)]
        )
        x, y = torch.randn(N + Q, *shape, dtype=dtype), torch.randint(0, 3, (N + Q,))
        model, cut = nn.Sequential(*body), lambda part, size: as_loader(part, size)
        train, query = (x[:N], y[:N]), (x[N:], y[N:])
    model = model.to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):
        for inputs, labels in cut(train, BATCH):
            outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
            optimizer.zero_grad()
            nn.functional.cross_entropy(outputs, labels).backward()
            optimizer.step()
    return Problem(model.eval(), "cross_entropy", train, query, cut)


def scored(
    p: Problem, estimator: Any, *, batch: int = BATCH, threads: int = 1, state: Path | None = None, **given: Any
):
    """Scores [q, n], and the fitted state; with a state, nothing is fitted."""
    torch.set_num_threads(threads)
    try:
        influence = fastif.Influence(p.model, p.loss, estimator, batch_size=batch, progress=False, **given)
        train = p.batches(p.train, batch)
        if state is None:
            influence.fit(train)
        else:
            influence.load_state_dict(torch.load(state))
        return influence.scores(p.batches(p.query, batch), train).double(), influence
    finally:
        torch.set_num_threads(1)


def again(name: str, dtype: torch.dtype, kind: str, state: Path, out: Path) -> None:
    """In a process of its own: everything is made anew, but what was fitted is read."""
    torch.set_num_threads(1)
    scores, _ = scored(problem(name, dtype), ESTIMATORS[kind](), state=None if kind in WITH_DATA else state)
    torch.save(scores, out)


def varied(name: str, dtype: torch.dtype, kind: str, folder: Path) -> dict[str, float]:
    """By what was changed, how far scores moved at most, as a share of the largest of them."""
    p = problem(name, dtype)
    first, influence = scored(p, ESTIMATORS[kind]())
    found = {change: scored(p, ESTIMATORS[kind](), **given)[0] for change, given in CHANGES.items()}
    state, out = folder / "state.pt", folder / "scores.pt"
    torch.save(influence.state_dict(), state)
    process = multiprocessing.get_context("spawn").Process(target=again, args=(name, dtype, kind, state, out))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{kind} on {name}: the process that was started anew failed"
    found["restart"] = torch.load(out)
    largest = float(first.abs().max())
    assert largest > 0
    return {change: float((scores - first).abs().max()) / largest for change, scores in found.items()}


def linear() -> Problem:
    """Large inputs and next to no work on them."""
    x, y = torch.randn(4_000, 3, SIDE, SIDE), torch.randint(0, 10, (4_000,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 10))
    return Problem(model, "cross_entropy", (x, y), (x[:10], y[:10]), lambda part, size: as_loader(part, size))


def cost_of_looking(p: Problem, repeats: int = 5) -> dict[str, float]:
    """Seconds of one thread: checksums of all training examples, and the two passes of EK-FAC that they are part of."""
    torch.set_num_threads(1)
    best: dict[str, float] = dict.fromkeys(("checksums", "fit", "scores"), float("inf"))
    data, query = (list(p.batches(part, BATCH if isinstance(part, list) else 256)) for part in (p.train, p.query))

    def clocked(key: str, work: Callable[[], object]) -> None:
        start = time.process_time()
        work()
        best[key] = min(best[key], time.process_time() - start)

    for _ in range(repeats):
        influence = fastif.Influence(p.model, p.loss, fastif.EKFAC(), progress=False)
        clocked("checksums", lambda: [checksums(x, y) for x, y in data])
        clocked("fit", lambda: influence.fit(data))  # noqa: B023
        clocked("scores", lambda: influence.scores(query, data))  # noqa: B023
    return best


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimators", nargs="*", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path("runs/checks.json"))
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in given.estimators:
            for name in given.networks:
                for dtype in (torch.float32, torch.float64):
                    moved = varied(name, dtype, kind, Path(folder))
                    rows.append(
                        {"estimator": kind, "network": name, "dtype": str(dtype).removeprefix("torch."), **moved}
                    )
                    print(json.dumps(rows[-1]), flush=True)
    looking = {name: cost_of_looking(linear() if name == "linear" else problem(name, torch.float32))
               for name in ("linear", *given.networks)}  # fmt: skip
    print(json.dumps(looking, indent=1))
    results = {
        "meta": {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "examples": N, "queries": Q,
            "batch": BATCH, **environment(torch.device("cpu")),
        },
        "rows": rows, "looking": looking,
    }  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
