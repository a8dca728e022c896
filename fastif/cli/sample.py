"""`fastif sample`."""

import zipfile
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from fastif.cli.arguments import check, writable
from fastif.evaluation.settings import SAMPLERS, check_budgets, choose_samplers
from fastif.files import whole
from fastif.samplers.draw import draw, missing_inputs


def sample_command(
    sampler: Annotated[str, typer.Argument(help=f"One of {', '.join(SAMPLERS)}.")],
    out: Annotated[Path, typer.Option(help="FILE.npz or FILE.safetensors for indices and weights.")],
    k: Annotated[str, typer.Option(help="How many examples: a number or a percentage.")],
    features: Annotated[Path | None, typer.Option(help="n × d, .npy or .safetensors with a tensor features.")] = None,
    logits: Annotated[Path | None, typer.Option(help="n × c, .npy or .safetensors with a tensor logits.")] = None,
    labels: Annotated[Path | None, typer.Option(help="n numbers, .npy or .safetensors with a tensor labels.")] = None,
    seed: Annotated[int, typer.Option(help="For samplers that draw.")] = 0,
) -> None:
    """Choose examples, with weights, from saved features, logits and labels."""
    ((name, function),) = choose_samplers([sampler])
    if out.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"--out must end in .npz or .safetensors, got {out}")
    check("seed", seed, 0 <= seed < 2**63, "in [0, 2^63)")
    paths = {"features": features, "logits": logits, "labels": labels}
    given = {what: read_array(path, what) for what, path in paths.items() if path is not None}
    if not given:
        raise ValueError("give at least one of --features, --logits, --labels")
    for what, values in given.items():
        if values.ndim == 0:
            raise ValueError(f"--{what} must hold one entry per example, got a single number in {paths[what]}")
    lengths = {what: len(values) for what, values in given.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the files must hold as many examples each, got {lengths}")
    n = next(iter(lengths.values()))
    picker = partial(function, k=check_budgets([k], n)[0])
    for what in missing_inputs(picker, given):
        raise ValueError(f"the sampler {name} needs --{what}")
    try:
        subset = draw(picker, n=n, **given, generator=torch.Generator().manual_seed(seed), op="sample")
    except TypeError as error:
        raise ValueError(str(error)) from error
    with writable(out.parent):
        _write_subset(out, subset.indices, subset.weights)
    print(f"{len(subset.indices)} of {n} examples, weights sum to {float(subset.weights.sum()):.4g}: {out}")


def read_array(path: Path, name: str) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} for --{name}")
    if path.suffix == ".npy":
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a numeric .npy file: {error}") from error
    if path.suffix != ".safetensors":
        raise ValueError(f"--{name} must be a .npy or .safetensors file, got {path}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} has no tensor {name}, or is damaged: {error}") from error


def _write_subset(path: Path, indices: Tensor, weights: Tensor) -> None:
    with whole(path) as partial:
        if path.suffix == ".npz":
            np.savez(partial, indices=indices.numpy(), weights=weights.numpy())
        else:
            from safetensors.torch import save

            partial.write_bytes(save({"indices": indices.contiguous(), "weights": weights.contiguous()}))
