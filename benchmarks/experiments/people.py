"""Invented people are removed from a language model that knows them by heart, and the model is held against retraining.

python -m benchmarks.experiments.people                          # goes on where it was cut off
python -m benchmarks.figures.keep keep runs/people/results.json people

A GPT of two layers learns 200 invented people (`invented_people`) from nothing; 5 % of them are removed (`--share`).
Beside `fastif.remove`: fine-tuning on the retained, GradDiff and NPO. What has settings is tuned on training data alone
and on ANOTHER forget set, as many other people: of the settings that leave at least 95 % of the utility (training texts
of the retained, and facts) that a network retrained without those others has, the one with the smallest
Kolmogorov–Smirnov distance of truth ratios to it; where none leaves as much, the one that leaves most. Then it is run
once on the people in question. Definitions: docs/math.md (32). CPU seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.experiments.invented_people import LENGTH, Part, World, invent, take
from benchmarks.influence.bench_influence import Transformer
from fastif import EKFAC, samplers
from fastif.evaluation import answers, baselines, without
from fastif.files import write_whole
from fastif.journal import Journal
from fastif.measure import environment
from fastif.model.losses import per_sample

WIDTH, DEPTH, HEADS = 64, 2, 4
LR, BATCH, EPOCHS = 3e-3, 64, 30
BETA = 0.1  # of NPO, as in the paper
LEAST = 0.95  # of the retrained network's utility
SHARE_OF_CURVATURE = 0.2  # of the texts

Data = tuple[Tensor, Tensor]
State = dict[str, Tensor]
Method = Callable[[nn.Module, Data, Tensor, int], State]


def network(words: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Transformer(words, LENGTH, WIDTH, DEPTH, HEADS)


def losses_of(model: nn.Module, data: Data, rows: Tensor) -> Tensor:
    return per_sample("causal_lm", model(data[0][rows]), data[1][rows], len(rows))


def train(kept: Tensor, seed: int, data: Data, words: int) -> nn.Module:
    """By Adam on the mean over texts of the sum over their answers' words, without weight decay."""
    model, draw = network(words, seed), Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), LR, (0.9, 0.98))
    steps = EPOCHS * -(-len(kept) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    for _ in range(EPOCHS):
        for rows in kept[torch.randperm(len(kept), generator=draw)].split(BATCH):
            optimizer.zero_grad()
            losses_of(model, data, rows).mean().backward()
            optimizer.step()
            schedule.step()
    return model.eval()


# ------------------------------------------------------------------------------------------------------------- methods


def fine_tuning(model: nn.Module, data: Data, removed: Tensor, seed: int, *, lr: float, epochs: int) -> State:
    """Goes on training on the retained texts."""
    kept, draw = without(len(data[0]), removed), Generator().manual_seed(seed)
    parts = (part for _ in range(epochs) for part in kept[torch.randperm(len(kept), generator=draw)].split(BATCH))
    return _descended(model, (losses_of(model, data, rows).mean() for rows in parts), lr)


def grad_diff(model: nn.Module, data: Data, removed: Tensor, seed: int, *, lr: float, epochs: int) -> State:
    """Descends ℓ(retained) − ℓ(removed), as many of the retained as of the removed in a batch (Liu et al. 2022)."""
    pairs = _pairs(len(data[0]), removed, epochs, seed)
    return _descended(
        model, (losses_of(model, data, kept).mean() - losses_of(model, data, gone).mean() for gone, kept in pairs), lr
    )


def npo(model: nn.Module, data: Data, removed: Tensor, seed: int, *, lr: float, epochs: int) -> State:
    """Descends (2/β) log(1 + (π/π_ref)^β) of the removed, beside ℓ(retained) (Zhang et al. 2024). docs/math.md (32)."""
    with torch.no_grad():
        reference = dict(zip(removed.tolist(), losses_of(model, data, removed).tolist(), strict=True))

    def losses() -> Iterator[Tensor]:
        for gone, kept in _pairs(len(data[0]), removed, epochs, seed):
            before = torch.tensor([reference[row] for row in gone.tolist()])
            ratios = before - losses_of(model, data, gone)  # log π/π_ref
            yield 2 / BETA * F.softplus(BETA * ratios).mean() + losses_of(model, data, kept).mean()

    return _descended(model, losses(), lr)


def one_step(model: nn.Module, data: Data, removed: Tensor, seed: int, *, damping: float) -> State:
    """Formula (3) over all layers with EK-FAC."""
    curvature = EKFAC(damping, fisher="monte_carlo")
    return _newton(model, data, removed, seed, steps=1, line_search=False, curvature=curvature)


def with_search(model: nn.Module, data: Data, removed: Tensor, seed: int, *, steps: int) -> State:
    """`fastif.remove` as it is: steps that lower the retained objective."""
    return _newton(model, data, removed, seed, steps=steps)


def _newton(model: nn.Module, data: Data, removed: Tensor, seed: int, **how: Any) -> State:
    """Random texts carry the curvature: `SHARE_OF_CURVATURE` of them."""
    subset = partial(samplers.random, k=round(SHARE_OF_CURVATURE * len(data[0])))
    how |= dict(layers="*", loss="causal_lm", weight_decay=0.0, subset=subset)
    return baselines.newton_steps(model, data, removed, seed, **how)


def mended(model: nn.Module, data: Data, removed: Tensor, seed: int, *, method: Method, lr: float) -> State:
    """Another method, and an epoch of fine-tuning on the retained after it."""
    model.load_state_dict(method(model, data, removed, seed))
    return fine_tuning(model, data, removed, seed, lr=lr, epochs=1)


METHODS: dict[str, dict[str, Method]] = {
    "remove: with search": {"3 steps": partial(with_search, steps=3)},
    "remove: one step": {f"damping {d:g}": partial(one_step, damping=d) for d in (0.003, 0.01, 0.03, 0.1)},
    "remove: one step, then fine-tuning": {
        f"damping {d:g}, lr {lr:g}": partial(mended, method=partial(one_step, damping=d), lr=lr)
        for d in (0.001, 0.002, 0.004, 0.008)
        for lr in (1e-3, 2e-3)
    },
    "fine-tuning": {
        f"lr {lr:g}, {epochs} epochs": partial(fine_tuning, lr=lr, epochs=epochs)
        for lr in (1e-3, 3e-3)
        for epochs in (1, 3)
    },
    "GradDiff": {
        f"lr {lr:g}, {epochs} epochs": partial(grad_diff, lr=lr, epochs=epochs)
        for lr in (1e-4, 3e-4, 1e-3)
        for epochs in (5, 10, 20)
    },
    "NPO": {
        f"lr {lr:g}, {epochs} epochs": partial(npo, lr=lr, epochs=epochs)
        for lr in (1e-4, 3e-4, 1e-3)
        for epochs in (5, 10, 20)
    },
    **{
        f"{name}, then fine-tuning": {
            f"lr {lr:g}, {epochs} epochs, lr {last:g}": partial(
                mended, method=partial(method, lr=lr, epochs=epochs), lr=last
            )
            for lr in (1e-4, 3e-4, 1e-3)
            for epochs in (10, 20)
            for last in (1e-3, 2e-3)
        }
        for name, method in (("GradDiff", grad_diff), ("NPO", npo))
    },
}


def _pairs(n: int, removed: Tensor, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the removed in a new order each epoch, and as many of the retained at random."""
    kept, draw = without(n, removed), Generator().manual_seed(seed)
    for _ in range(epochs):
        for gone in removed[torch.randperm(len(removed), generator=draw)].split(BATCH // 2):
            yield gone, kept[torch.randint(len(kept), (len(gone),), generator=draw)]


def _descended(model: nn.Module, losses: Iterator[Tensor], lr: float) -> State:
    optimizer = torch.optim.Adam(model.parameters(), lr, (0.9, 0.98))
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


# ------------------------------------------------------------------------------------------------------------ judgement


class Judge(NamedTuple):
    """What is asked of a network without the people `gone`."""

    world: World
    gone: Tensor  # persons

    @property
    def removed(self) -> Tensor:
        """Rows of the training texts."""
        return torch.isin(self.world.owner, self.gone).nonzero()[:, 0]

    def _people(self, gone: bool) -> Part:
        return take(self.world.people, torch.isin(self.world.people.owner, self.gone) == gone)

    def ratios(self, model: nn.Module) -> Tensor:
        part = self._people(True)
        return answers.truth_ratios(model, part.other, part.wrong)

    def utility(self, model: nn.Module, otherwise: bool) -> float:
        """Over the retained people and the facts as they were learnt; `otherwise`: in words never learnt of them, too.

        Of the people, every fourth text.
        """
        kept = self._people(False)
        twice, once = (take(kept, here.nonzero()[::4, 0]) for here in (kept.twice, ~kept.twice))
        parts = [(part.first, part.other, part.wrong) for part in (twice, self.world.facts)]
        if otherwise:
            parts.append((once.other, once.other, once.wrong))
        return answers.utility(model, parts)

    def figures(self, model: nn.Module) -> dict[str, Any]:
        part, strangers = self._people(True), self.world.strangers
        return {
            "ratios": self.ratios(model).tolist(),
            "utility": self.utility(model, True),
            "probability": float(answers.answer_probabilities(model, part.first).mean()),
            "strength": float(answers.extraction_strengths(model, part.first).mean()),
            "probability of strangers": float(answers.answer_probabilities(model, strangers.first).mean()),
            "strength of strangers": float(answers.extraction_strengths(model, strangers.first).mean()),
        }


def distance(a: Tensor, b: Tensor) -> float:
    """Kolmogorov–Smirnov: the largest difference of the two samples' distribution functions."""
    at = torch.cat([a, b])
    shares = [torch.searchsorted(values.sort().values, at, right=True) / len(values) for values in (a, b)]
    return float((shares[0] - shares[1]).abs().max())


def choose(tried: Mapping[str, Mapping[str, float]], utility: float) -> str:
    """The rule of this module's first lines: `tried` by setting the utility and the distance."""
    enough = {name: found for name, found in tried.items() if found["utility"] >= LEAST * utility}
    if not enough:
        return max(tried, key=lambda name: tried[name]["utility"])
    return min(enough, key=lambda name: enough[name]["distance"])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.05, help="of the people that are removed")
    parser.add_argument("--seeds", type=int, default=2, help="retrainings without them")
    parser.add_argument("--methods", nargs="+", help="default all")
    parser.add_argument("--out", type=Path, default=Path("runs/people"))
    asked = parser.parse_args(arguments)
    world = invent(asked.people)
    order = torch.randperm(asked.people, generator=Generator().manual_seed(1))
    size = max(1, round(asked.share * asked.people))
    judge, other = Judge(world, order[:size]), Judge(world, order[size : 2 * size])
    methods = {name: grid for name, grid in METHODS.items() if asked.methods is None or name in asked.methods}
    settings = {"people": asked.people, "share": asked.share, "seeds": asked.seeds, "methods": [*methods]}
    settings |= {"epochs": EPOCHS, "grids": {name: [*grid] for name, grid in methods.items()}}
    journal = Journal(asked.out / "rows.jsonl", settings, resume=True)
    data, n = world.train, len(world.owner)

    def trained(name: str, kept: Tensor, seed: int) -> tuple[nn.Module, float]:
        """A network, from where it was kept if it was, and the CPU seconds of its training."""
        model, path, took = network(world.words), asked.out / f"{name}.safetensors", journal.found("network")
        if (name,) in took and path.exists():
            model.load_state_dict(load_file(path))
            return model.eval(), took[name,]
        began = time.process_time()
        model = train(kept, seed, data, world.words)
        seconds = time.process_time() - began
        asked.out.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
        journal.append("network", seconds, (name,))
        return model, seconds

    def run(method: Method, at: Judge) -> tuple[nn.Module, float]:
        own, began = copy.deepcopy(before), time.process_time()
        state = method(own, data, at.removed, 0)
        seconds = time.process_time() - began
        own.load_state_dict(state)
        return own.eval(), seconds

    before, _ = trained("trained", torch.arange(n), 0)
    retrained = [trained(f"retrained-{s}", without(n, judge.removed), s + 1) for s in range(asked.seeds)]
    of_others, _ = trained("retrained-others", without(n, other.removed), 1)
    retraining = sum(seconds for _, seconds in retrained) / asked.seeds
    most, wanted = other.utility(of_others, False), other.ratios(of_others)
    tried, rows = journal.found("tried"), journal.found("row")

    def row(name: str, model: nn.Module, seconds: float | None, **more: Any) -> None:
        if (name,) not in rows:
            rows[name,] = {"method": name, "seconds": seconds, **judge.figures(model), **more}
            journal.append("row", rows[name,], (name,))

    row("nothing removed", before, None)
    for number, (model, seconds) in enumerate(retrained, 1):
        row(f"retrained {number}", model, seconds)
    for name, grid in methods.items():
        for setting, method in grid.items():
            if len(grid) > 1 and (name, setting) not in tried:
                model, _ = run(method, other)
                tried[name, setting] = {
                    "utility": other.utility(model, False), "distance": distance(other.ratios(model), wanted),
                }  # fmt: skip
                journal.append("tried", tried[name, setting], (name, setting))
                print(name, setting, tried[name, setting], flush=True)
        if (name,) not in rows:
            own = {setting: found for (method, setting), found in tried.items() if method == name}
            chosen = choose(own, most) if own else next(iter(grid))
            row(name, *run(grid[chosen], judge), chosen=chosen)
    names = ["nothing removed", *(f"retrained {number}" for number in range(1, asked.seeds + 1)), *methods]
    ordered = [dict(rows[name,]) for name in names]
    against = [torch.tensor(found["ratios"]) for found in ordered[1 : 1 + asked.seeds]]
    for found in ordered:
        ratios = torch.tensor(found.pop("ratios"))
        same = [found["method"] == f"retrained {number}" for number in range(1, asked.seeds + 1)]
        pairs = zip(against, same, strict=True)
        found["forget quality"] = [None if own else answers.forget_quality(ratios, other) for other, own in pairs]
        found["share"] = None if found["seconds"] is None else found["seconds"] / retraining
    meta = {
        **settings, "removed": len(judge.gone), "removed texts": len(judge.removed), "texts": n, "words": world.words,
        "ratios": int(torch.isin(world.people.owner, judge.gone).sum()),
        "parameters": sum(p.numel() for p in before.parameters()), "seconds_of_a_retraining": retraining,
        "utility of tuning": most, "tried": [{"method": m, "setting": s, **found} for (m, s), found in tried.items()],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **environment(torch.device("cpu")),
    }  # fmt: skip
    results = json.loads(json.dumps({"meta": meta, "rows": ordered}, allow_nan=False))
    asked.out.mkdir(parents=True, exist_ok=True)
    write_whole(asked.out / "results.json", json.dumps(results, indent=1))
    journal.finish()
    return results


if __name__ == "__main__":
    for line in main()["rows"]:
        print(f"{line['method']:35}", {key: value for key, value in line.items() if key != "method"})
