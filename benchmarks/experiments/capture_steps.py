"""What `fastif.capture` adds to the training steps of a small GPT: python -m benchmarks.experiments.capture_steps

CPU time of a step with AdamW, least of several, in one process: plain; with norms; with norms and products; with all
kept and norms asked for afterwards. Norms are held against autograd's of single examples first.
"""

import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fastif

BATCH, LENGTH, STEPS = 8, 64, 6


def make() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    size = dict(vocab_size=2000, n_positions=LENGTH, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return model, torch.randint(0, 2000, (BATCH, LENGTH))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def step(model: nn.Module, ids: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model, ids).backward()
    optimizer.step()


def timed(around, ask) -> float:
    model, ids = make()
    optimizer = torch.optim.AdamW(model.parameters())
    best = float("inf")
    with around(model) as captured:
        for _ in range(STEPS):
            start = time.process_time()
            step(model, ids, optimizer)
            ask(captured)
            best = min(best, time.process_time() - start)
    return best


def verify() -> None:
    model, ids = make()
    with fastif.capture(model, keep="numbers") as captured:
        loss_of(model, ids).backward()
        norms = captured.norms()
    for i in range(BATCH):
        grads = torch.autograd.grad(loss_of(model, ids[i : i + 1]), list(model.parameters()))
        torch.testing.assert_close(norms[i], torch.stack([g.square().sum() for g in grads]).sum().sqrt())


if __name__ == "__main__":
    torch.set_num_threads(1)
    verify()
    directions = {name: torch.randn(1, *p.shape) for name, p in make()[0].named_parameters()}
    linear = dict(layers=("*.attn.*", "*.mlp.*"))
    own = {key: value for key, value in directions.items() if ".attn." in key or ".mlp." in key}
    ways = {
        "plain": (nullcontext, lambda _: None),
        "norms": (lambda m: fastif.capture(m, keep="numbers"), lambda c: c.norms()),
        "norms and products": (lambda m: fastif.capture(m, keep="numbers", directions=directions), lambda c: c.dots()),
        "all kept, norms": (lambda m: fastif.capture(m), lambda c: c.norms()),
        "norms, attention and MLP alone": (lambda m: fastif.capture(m, keep="numbers", **linear), lambda c: c.norms()),
        "products, attention and MLP alone": (
            lambda m: fastif.capture(m, keep="numbers", directions=own, **linear),
            lambda c: c.dots(),
        ),
    }
    plain = None
    for name, (around, ask) in ways.items():
        seconds = timed(around, ask)
        plain = seconds if plain is None else plain
        print(f"{name:36s}{seconds * 1000:8.0f} ms {seconds / plain:6.2f}×")
