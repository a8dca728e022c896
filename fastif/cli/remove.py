"""`fastif remove`."""

import csv
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fastif.cli.arguments import check, device_named, split, writable
from fastif.cli.options import BatchSize, Device, Quiet
from fastif.cli.script import called, function_named, returned
from fastif.data.batches import count
from fastif.evaluation.settings import SAMPLERS, check_budgets, choose_samplers
from fastif.files import whole, write_whole
from fastif.model.losses import LOSSES
from fastif.ranks import find_ranks
from fastif.removal import Certificate, Removal, remove
from fastif.report.evaluations import as_json
from fastif.report.verification import verify_removal

STATE, RECORD = "removed.safetensors", "removal.json"
_COLUMNS = ("train", "index", "indices")  # of a CSV file that name training examples


def remove_command(
    script: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function of yours, also as path/to/file.py:FUNCTION. It takes nothing and returns (model, train, "
            "query): a trained classifier or language model, and labelled data; query is what was held out of the "
            "training.",
        ),
    ],
    indices: Annotated[
        Path,
        typer.Option(
            help="The examples to remove, counted in train: .txt with one number a line, .npy, or .csv with a column "
            "train, such as `fastif query --out` writes."
        ),
    ],
    out: Annotated[Path, typer.Option(help=f"Folder for {STATE} and {RECORD}.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Also verification.html: what the network still knows of the examples.")
    ] = False,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Names or patterns of layers that may move, comma separated or repeated.", show_default="the head"
        ),
    ] = None,
    refit_head: Annotated[
        bool,
        typer.Option(
            "--refit-head",
            help="One influence step of --layers, as long as it foretells, and the head refitted behind it.",
        ),
    ] = False,
    unseen: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="A function of yours that takes nothing and returns labelled data that the model was not trained on, "
            "drawn like train: with --refit-head the steps of --layers go on until the removed examples look like it. "
            "Not the query data, by which --verify judges.",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            help=f"That the model was trained with, one of {', '.join(LOSSES)}. Layers of language models (causal_lm) "
            "and token classifiers move with --layers; bce and mse are for the head alone."
        ),
    ] = "cross_entropy",
    sampler: Annotated[
        str, typer.Option(help=f"Of the examples that carry the curvature: one of {', '.join(SAMPLERS)}.")
    ] = "logit",
    k: Annotated[
        str | None, typer.Option(help="How many it draws: a number or a percentage.", show_default="all")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="At most so many.", show_default="6; with --epsilon what it takes")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of the training.")] = 5e-4,
    damping: Annotated[float, typer.Option(help="Added to the curvature's diagonal beside it.")] = 0.0,
    epsilon: Annotated[
        float | None, typer.Option(help="For a certificate of the head, with --noise.", show_default=False)
    ] = None,
    delta: Annotated[float, typer.Option(help="For a certificate.")] = 1e-5,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation that a certificate adds to the head; drawn by the operating system's randomness.",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchSize = 256,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="For what a sampler draws, and torch in your function.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Remove training examples from a model of your own, and verify that they are gone."""
    check("batch-size", batch_size, batch_size >= 1, ">= 1")
    check("seed", seed, 0 <= seed < 2**63, "in [0, 2^63)")
    check("steps", steps, steps is None or steps >= 1, ">= 1")
    if (epsilon is None) != (noise is None):
        raise ValueError("--epsilon and --noise make a certificate together: give both or none")
    certificate = None if epsilon is None or noise is None else Certificate(epsilon, delta, noise)
    check("loss", loss, loss in LOSSES, f"one of {', '.join(LOSSES)}")
    if verify and loss != "cross_entropy":
        raise ValueError(
            f"--verify judges classifiers with one label per example, not --loss {loss}: leave it out, and compare "
            "with evaluation.answers (texts) or networks of your own"
        )
    ((_, function),) = choose_samplers([sampler])
    gone = read_indices(indices)
    where = device_named(device)
    if (out / RECORD).exists():
        raise ValueError(f"{out} holds a removal already; choose another folder")
    torch.manual_seed(seed)
    model, train, query = returned(script, function_named(script))
    data = None if unseen is None else called(unseen, function_named(unseen))
    torch.manual_seed(seed)  # what a sampler draws from under a certificate
    n = count(train, batch_size)
    settings: dict[str, Any] = {"steps": steps, "loss": loss, "weight_decay": weight_decay, "damping": damping}
    settings["refit_head"] = refit_head
    budget = None if k is None else check_budgets([k], n)[0]
    first = find_ranks().rank == 0  # which alone verifies, prints and writes
    with writable(out) if first else nullcontext():
        removal = remove(
            model,
            train,
            gone,
            layers=None if layers is None else split(layers),
            subset=None if budget is None else partial(function, k=budget),
            certificate=certificate,
            batch_size=batch_size,
            device=where,
            # Under a certificate the noise must not come from a seed that is known.
            generator=None if certificate is not None else torch.Generator().manual_seed(seed),
            unseen=data,
            progress=not quiet,
            **settings,
        )
        about = {"script": script, "indices": str(indices), "removed": len(gone), "n": n, "layers": layers}
        about |= {
            "sampler": None if budget is None else sampler,
            "k": budget,
            "seed": seed,
            "unseen": unseen,
            **settings,
        }
        if not first:
            return
        _write(out, removal, about, gone)
        if verify:
            found = verify_removal(model, removal, train, gone, query, batch_size=batch_size, out=out, about=about)
            if not quiet:
                print(found)
    if not quiet:
        objective = f", objective {removal.history[-1].objective:.6g}" if removal.history else ""
        print(f"{len(gone):,} of {n:,} examples, {len(removal.history)} steps{objective}: {out / STATE}")
        if removal.certified is not None:
            print(removal.certified)


def read_indices(path: Path) -> torch.Tensor:
    """int64, each once, ascending."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} for --indices")
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
            if values.dtype.kind not in "iu":
                raise ValueError(f"its numbers are {values.dtype}")
            found = [int(value) for value in values.reshape(-1)]
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                table = csv.DictReader(file)
                column = next((name for name in _COLUMNS if name in (table.fieldnames or ())), None)
                if column is None:
                    raise ValueError(f"it has none of the columns {', '.join(_COLUMNS)}")
                found = [int(row[column]) for row in table]
        else:
            found = [int(line) for line in path.read_text(encoding="utf-8").split()]
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path} holds no indices: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no indices: it is empty")
    return torch.tensor(sorted(set(found)), dtype=torch.int64)


def _write(out: Path, removal: Removal, about: dict[str, Any], gone: torch.Tensor) -> None:
    """The state dict alone is for release: with a certificate, what led to it is not."""
    from safetensors.torch import save

    state = {name: value.detach().cpu().clone().contiguous() for name, value in removal.state_dict.items()}
    with whole(out / STATE) as unfinished:
        unfinished.write_bytes(save(state))
    record = {
        "about": about,
        "removed": gone.tolist(),
        "certified": None if removal.certified is None else str(removal.certified),
        "steps": [
            as_json({name: value for name, value in step._asdict().items() if name != "parameters"})
            for step in removal.history
        ],
    }
    write_whole(out / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
