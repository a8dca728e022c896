"""Small trainings with a log, for the tests of replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastif.replay import TrainingLog

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
}


def data(
    n: int = 24, d: int = 3, c: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = 1.2 * torch.randn(c, d, generator=g, dtype=torch.float64)
    y = torch.arange(n) % c
    return (centres[y] + torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype), y


def network(activation: type[nn.Module] = nn.GELU, d: int = 3, c: int = 3, width: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, width), activation(), nn.Linear(width, c)).double()


def batches(kept: Tensor, size: int, epochs: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [part for _ in range(epochs) for part in kept[torch.randperm(len(kept), generator=draw)].split(size)]


def train(
    model: nn.Module,
    make: Callable[[Any], torch.optim.Optimizer],
    examples: tuple[Tensor, Tensor],
    order: list[Tensor],
    *,
    weights: Tensor | None = None,
    log: TrainingLog | None = None,
    peak: float = 2.0,
    given: bool = False,
) -> nn.Module:
    """Trains the model in place on the batches `order`, with a learning rate that rises and falls.

    Args:
        weights: of every example's loss, [n].
        given: whether the log is told the weights.
    """
    x, y = examples
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 1 + (peak - 1) * (1 - abs(2 * t / max(1, len(order)) - 1))
    )
    for rows in order:
        own = torch.ones(len(rows), dtype=x.dtype) if weights is None else weights[rows]
        optimizer.zero_grad()
        (F.cross_entropy(model(x[rows]), y[rows], reduction="none") * own).mean().backward()
        if log is None:
            optimizer.step()
        else:
            log.step(optimizer, rows, own if given else None)
        schedule.step()
    return model


def recorded(
    make: Callable[[Any], torch.optim.Optimizer],
    examples: tuple[Tensor, Tensor],
    order: list[Tensor],
    *,
    every: int = 7,
    build: Callable[[], nn.Module] = network,
    **how: Any,
) -> tuple[nn.Module, TrainingLog]:
    model = build()
    log = TrainingLog(model, every=every)
    train(model, make, examples, order, log=log, **how)
    return model, log


def losses(model: nn.Module, examples: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(examples[0]), examples[1], reduction="none")


class Transformer(nn.Module):
    """One block of attention over tokens, as language models have it: outputs with `.logits`, tied embeddings."""

    def __init__(self, tokens: int = 7, width: int = 4):
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, tokens, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Any:
        h = self.embed(input_ids)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return {"logits": self.out(F.silu(h))}


WIDE = data(60, d=40, dtype=torch.float32)  # of the network `wide`, whose vectors outweigh everything else
MANY = data(12, d=40, seed=1, dtype=torch.float32)


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))


def logs_of(
    number: int, optimizer: str = "Nesterov", every: int = 6, epochs: int = 3, size: int = 10
) -> tuple[Any, nn.Module]:
    """Logs of that network on halves of WIDE, pair after pair, or a lone one on all of it, and the last network."""
    logs, model, (x, y) = list[TrainingLog](), wide(), WIDE
    for place in range(number):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(place // 2))
        kept = order if number == 1 else order[place % 2 * 30 :][:30]
        model = wide()
        log, chosen = TrainingLog(model, every=every), OPTIMIZERS[optimizer](model.parameters())
        for rows in batches(kept, size, epochs, seed=place):
            chosen.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            log.step(chosen, rows)
        logs.append(log)
    return (logs[0] if number == 1 else logs), model


def language_model(
    make: Callable[[Any], torch.optim.Optimizer], epochs: int
) -> tuple[Transformer, Tensor, TrainingLog]:
    """A small one trained on eight texts of five random words, [8, 5], a text's loss its sum; in float32."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (8, 5))
    model = Transformer()
    log, optimizer = TrainingLog(model, every=2), make(model.parameters())
    for rows in batches(torch.arange(8), 4, epochs):
        optimizer.zero_grad()
        logits = model(tokens[rows])["logits"][:, :-1]
        (F.cross_entropy(logits.mT, tokens[rows, 1:], reduction="sum") / 4).backward()
        log.step(optimizer, rows)
    return model, tokens, log
