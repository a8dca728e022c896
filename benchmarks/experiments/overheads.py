"""What recording a training costs it: a Trainer's, Lightning's and an own loop's log, and `fastif.capture`.

python -m benchmarks.experiments.overheads --out runs/overheads
python -m benchmarks.figures.keep keep runs/overheads/results.json overheads

The training is of a small GPT with AdamW, over texts of one length. First of all each log is held against its
training, which is run again from it, and the captured gradients and norms against autograd's, text by text. Then
trainings with and without take turns, in one process with one thread, so that what else the machine does meets both; a
row has the median of each and of their ratios turn by turn. Seconds are those of the processor, on a GPU those of the
clock, from a training's first step to its end. Bytes of a log are those that it holds; those of a step the peak of what
is allocated in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastif
from fastif.files import write_whole
from fastif.measure import Measure, environment

AGREE = 1e-4  # of captured gradients and norms, relative to the largest
_MEMORY = 2 << 30  # bytes, of the states that a log is run again with


class Sizes(NamedTuple):
    """Of the network and its training."""

    layers: int = 4
    width: int = 128
    words: int = 1000
    batch: int = 8
    length: int = 64
    steps: int = 40  # of a training that is timed
    every: int = 20  # steps from one checkpoint to the next
    turns: int = 5  # trainings with and without
    looks: int = 15  # steps with and without a capture


def make_model(sizes: Sizes) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = dict(vocab_size=sizes.words, n_positions=sizes.length, n_embd=sizes.width, n_layer=sizes.layers, n_head=4)
    still = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**size, **still))


def make_texts(sizes: Sizes, steps: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, sizes.words, (sizes.batch * steps, sizes.length), generator=draw)


def loss_of(outputs: Any, batch: Any) -> Tensor:
    """The mean over a text's tokens, [n]."""
    ids = batch["labels"]
    losses = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def as_batch(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids}


class Clock:
    """Processor seconds from `start` to `stop`; those of the clock on a GPU, whose work is waited for."""

    seconds: float

    def __init__(self, device: torch.device):
        self._device = device
        self._began: float | None = None

    def start(self) -> None:
        """The first call counts: hooks of trainings come at every step."""
        if self._began is None:
            self._began = self._now()

    def stop(self) -> None:
        assert self._began is not None
        self.seconds = self._now() - self._began

    def _now(self) -> float:
        if self._device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self._device)
        return time.perf_counter()


# ------------------------------------------------------------------------------------------------- trainings and logs


class Training(NamedTuple):
    """A training that is ready to run."""

    run: Callable[[Clock], Any]
    model: nn.Module
    log: Callable[[], fastif.TrainingLog]
    loss: Callable[[], Any]  # what the log's weights are of


def own_loop(sizes: Sizes, steps: int, device: torch.device, logged: bool, folder: Path) -> Training:
    del folder
    model, ids = make_model(sizes).to(device), make_texts(sizes, steps).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    log = fastif.TrainingLog(model, every=sizes.every)

    def run(clock: Clock) -> None:
        clock.start()
        for rows in torch.arange(len(ids)).split(sizes.batch):
            optimizer.zero_grad()
            loss_of(model(input_ids=ids[rows]), as_batch(ids[rows])).mean().backward()
            if logged:
                log.step(optimizer, rows)
            else:
                optimizer.step()
        if logged:
            _ = log.final
        clock.stop()

    return Training(run, model, lambda: log, lambda: loss_of)


def trainer(sizes: Sizes, steps: int, device: torch.device, logged: bool, folder: Path) -> Training:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from fastif.integrations import TrainerLog

    model = make_model(sizes)
    quiet = dict(report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no")
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=sizes.batch,
        num_train_epochs=1,
        use_cpu=device.type == "cpu",
        **quiet,  # pyright: ignore[reportArgumentType]
    )
    made = Trainer(model, arguments, train_dataset=[as_batch(row) for row in make_texts(sizes, steps)])  # pyright: ignore[reportArgumentType]
    recorder = TrainerLog(made, every=sizes.every) if logged else None

    class Timing(TrainerCallback):  # the last of the callbacks
        def __init__(self, clock: Clock):
            self.clock = clock

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.clock.start()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.clock.stop()

    def run(clock: Clock) -> None:
        made.add_callback(Timing(clock))
        made.train()

    return Training(run, model, lambda: recorder.log, lambda: recorder.loss)  # pyright: ignore[reportOptionalMemberAccess]


def lightning(sizes: Sizes, steps: int, device: torch.device, logged: bool, folder: Path) -> Training:
    import lightning.pytorch
    from torch.utils.data import DataLoader

    from fastif.integrations import LightningLog

    class Module(lightning.pytorch.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = make_model(sizes).train()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss_of(self.network(input_ids=batch), as_batch(batch)).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class Timing(lightning.pytorch.Callback):
        clock: Clock

        def on_train_batch_start(self, *_: Any) -> None:
            self.clock.start()

        def on_train_end(self, *_: Any) -> None:
            self.clock.stop()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    timing, module, texts = Timing(), Module(), make_texts(sizes, steps)
    recorder = LightningLog(every=sizes.every, model=module.network) if logged else None
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    made = lightning.pytorch.Trainer(
        max_epochs=1,
        callbacks=[*([] if recorder is None else [recorder]), timing],
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1,
        default_root_dir=str(folder),
        **quiet,
    )
    loader = DataLoader(texts, batch_size=sizes.batch, shuffle=True)  # pyright: ignore[reportArgumentType]

    def run(clock: Clock) -> None:
        timing.clock = clock
        made.fit(module, loader)

    return Training(run, module.network, lambda: recorder.training_log, lambda: loss_of)  # pyright: ignore[reportOptionalMemberAccess]


LOOPS: dict[str, tuple[Callable[..., Training], str]] = {
    "Trainer of transformers, `TrainerLog`": (trainer, "accelerate"),
    "Trainer of Lightning, `LightningLog`": (lightning, "lightning"),
    "your own loop, `TrainingLog`": (own_loop, "torch"),
}


def bytes_of(log: fastif.TrainingLog) -> tuple[int, int]:
    """Of a checkpoint, and of what is noted of all steps."""
    point = log.point(0)
    noted = sum(8 * len(step.rows) + 8 * (step.weights is not None) * len(step.rows) + 16 for step in log.steps)
    numbers = sum(8 * len(group) for step in log.steps for group in step.numbers)
    return sum(part.nbytes for part in (point.at, *point.state)), noted + numbers


def verify_log(make: Callable[..., Training], sizes: Sizes, device: torch.device, folder: Path) -> float:
    """Runs a short training again from its log; raises fastif.NotReproduced. How far its checkpoints were off."""
    made = make(sizes, 4, device, True, folder)
    made.run(Clock(device))
    texts = as_batch(make_texts(sizes, 4))
    replay = fastif.Replay(made.log(), made.model, texts, made.loss(), memory=_MEMORY, progress=False)
    replay.verify()
    assert replay.deviations is not None
    return max(replay.deviations)


def time_log(name: str, sizes: Sizes, device: torch.device, folder: Path) -> dict[str, Any]:
    make, _ = LOOPS[name]
    deviation = verify_log(make, sizes._replace(every=2), device, folder)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    checkpoint = noted = 0
    for turn in range(sizes.turns + 1):
        for logged in (False, True) if turn % 2 else (True, False):
            made = make(sizes, sizes.steps, device, logged, folder)
            clock = Clock(device)
            made.run(clock)
            if turn:  # the first ones load what they need
                seconds[logged].append(clock.seconds)
            if logged:
                checkpoint, noted = bytes_of(made.log())
    ratios = [after / before for before, after in zip(seconds[False], seconds[True], strict=True)]
    return {
        "loop": name,
        "deviation": deviation,
        "plain_seconds": median(seconds[False]) / sizes.steps,
        "logged_seconds": median(seconds[True]) / sizes.steps,
        "ratio": median(ratios),
        "ratios": ratios,
        "checkpoint_bytes": checkpoint,
        "step_bytes": noted / sizes.steps,
        "model_bytes": sum(parameter.nbytes for parameter in made.model.parameters()),
    }


# ------------------------------------------------------------------------------------------------------------- capture


class Way(NamedTuple):
    """A way to look at the steps of a training."""

    name: str
    layers: Sequence[str] | None
    options: dict[str, Any] | None  # None: not at all
    ask: Callable[[Any], Any]


def ways(sizes: Sizes, device: torch.device) -> list[Way]:
    draw = torch.Generator().manual_seed(2)
    named = make_model(sizes).named_parameters()
    directions = {name: torch.randn(1, *p.shape, generator=draw).to(device) for name, p in named}
    found = [Way("plain", None, None, lambda _: None)]
    for layers in (None, ("*.attn.*", "*.mlp.*")):
        own = {name: v for name, v in directions.items() if layers is None or ".attn." in name or ".mlp." in name}
        found += [
            Way("norms", layers, dict(keep="numbers"), lambda c: c.norms()),
            Way(
                "norms, and products with a direction", layers, dict(keep="numbers", directions=own), lambda c: c.dots()
            ),
            Way("everything kept, norms asked for afterwards", layers, dict(keep="factors"), lambda c: c.norms()),
        ]
    return found


def verify_capture(sizes: Sizes, device: torch.device) -> float:
    """The largest difference from autograd's gradients of single texts, and of their norms, relative to the largest."""
    model, ids = make_model(sizes).to(device), make_texts(sizes, 1).to(device)
    names = [name for name, _ in model.named_parameters()]
    with fastif.capture(model) as captured:
        loss_of(model(input_ids=ids), as_batch(ids)).mean().backward()
        gradients, norms = captured.gradients(), captured.norms()
    with fastif.capture(model, keep="numbers") as captured:
        loss_of(model(input_ids=ids), as_batch(ids)).mean().backward()
        again = captured.norms()
    error = 0.0
    for i in range(len(ids)):
        own = loss_of(model(input_ids=ids[i : i + 1]), as_batch(ids[i : i + 1])).sum()
        wanted = dict(zip(names, torch.autograd.grad(own, list(model.parameters())), strict=True))
        norm = float(torch.stack([value.square().sum() for value in wanted.values()]).sum().sqrt())
        for name, value in wanted.items():
            error = max(error, float((gradients[name][i] - value).abs().max()) / max(1e-6, float(value.abs().max())))
        error = max(error, abs(float(norms[i]) / norm - 1), abs(float(again[i]) / norm - 1))
    if not error <= AGREE:
        raise AssertionError(f"overheads: captured gradients differ from autograd's by {error:.2g} (at most {AGREE})")
    return error


def time_captures(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """Steps of each way in turns."""
    ids = make_texts(sizes, 1).to(device)
    asked = ways(sizes, device)
    with ExitStack() as stack:
        ready: list[tuple[Way, nn.Module, torch.optim.Optimizer, Any]] = []
        for way in asked:
            model = make_model(sizes).to(device).train()
            looking = nullcontext() if way.options is None else fastif.capture(model, way.layers, **way.options)
            ready.append((way, model, torch.optim.AdamW(model.parameters()), stack.enter_context(looking)))

        def step(way: Way, model: nn.Module, optimizer: torch.optim.Optimizer, captured: Any) -> None:
            optimizer.zero_grad()
            loss_of(model(input_ids=ids), as_batch(ids)).mean().backward()
            way.ask(captured)
            optimizer.step()

        for one in ready:
            step(*one)  # the first settles how layers are read
        seconds: list[list[float]] = [[] for _ in ready]
        for _ in range(sizes.looks):
            for one, into in zip(ready, seconds, strict=True):
                clock = Clock(device)
                clock.start()
                step(*one)
                clock.stop()
                into.append(clock.seconds)
        rows: list[dict[str, Any]] = []
        for one, took in zip(ready, seconds, strict=True):
            with torch.no_grad():
                one[1](input_ids=ids[:1])  # what is kept of the last step goes
            one[2].zero_grad()
            with Measure(device, exact=True) as work:
                step(*one)
            ratios = [after / before for before, after in zip(seconds[0], took, strict=True)]
            rows.append(
                {
                    "way": one[0].name,
                    "layers": None if one[0].layers is None else list(one[0].layers),
                    "seconds": median(took),
                    "ratio": median(ratios),
                    "ratios": ratios,
                    "peak_bytes": work.peak_bytes,
                }
            )
    return rows


# ---------------------------------------------------------------------------------------------------------------- main


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in Sizes()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/overheads"))
    asked = parser.parse_args(arguments)
    sizes, device = Sizes(*(getattr(asked, name) for name in Sizes._fields)), torch.device(asked.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    versions = {name: found for name in ("transformers", "lightning") if (found := _version(name))}
    logs: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, (_, package) in LOOPS.items():
                if _version(package):
                    logs.append(time_log(name, sizes, device, Path(folder)))
                    print(json.dumps(logs[-1]), flush=True)
        difference = verify_capture(sizes, device)
        captures = time_captures(sizes, device)
        for row in captures:
            print(json.dumps(row), flush=True)
        parameters = sum(p.numel() for p in make_model(sizes).parameters())
        meta = {**sizes._asdict(), "parameters": parameters, "difference": difference, "libraries": versions}
        results = {"meta": {**meta, **environment(device)}, "logs": logs, "captures": captures}
    finally:
        torch.set_num_threads(threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    write_whole(asked.out / "results.json", json.dumps(results, indent=1))
    return results


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


if __name__ == "__main__":
    main()
