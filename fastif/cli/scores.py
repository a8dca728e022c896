"""`fastif scores`."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

from fastif.cli.arguments import check, device_named, interruptible, split, terminal, writable
from fastif.cli.config import write_config
from fastif.cli.explaining import PAGES, write_pages
from fastif.cli.fitting import (
    CURVATURE,
    CURVATURES,
    FISHERS,
    SHOWN,
    TOP,
    damping_of,
    estimator_of,
    fisher_of,
    fit_or_load,
    top_table,
    write_top,
)
from fastif.cli.options import (
    Asked,
    Config,
    Device,
    Id,
    Image,
    Key,
    Label,
    Loss,
    MaxLength,
    Memory,
    Model,
    OwnBatchSize,
    Pages,
    Prompt,
    Query,
    Quiet,
    Resume,
    Script,
    Text,
    Train,
    TrainingTime,
    WeightDecay,
)
from fastif.cli.problem import batch_of, check_given, given_by
from fastif.cli.sample import read_array
from fastif.curvature.limits import MEMORY
from fastif.data.batches import count
from fastif.evaluation.settings import check_budgets, choose_samplers
from fastif.files import canonical, checksum, load_array, save_array
from fastif.influence.influence import Influence
from fastif.influence.planning import Plan
from fastif.influence.score_folder import MANIFEST
from fastif.influence.score_job import BLOCK_BYTES, write_scores
from fastif.influence.shared_folder import held
from fastif.influence.tiles import By, check_groups, check_positions
from fastif.model.calls import dtype_of
from fastif.model.losses import MEASUREMENTS


def scores_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the scores.")],
    script: Script = None,
    model: Model = None,
    train: Train = None,
    query: Query = None,
    text: Text = None,
    label: Label = None,
    prompt: Prompt = None,
    image: Image = None,
    id: Id = None,
    max_length: MaxLength = None,
    curvature: Annotated[str, typer.Option(help=f"One of {', '.join(CURVATURES)}.")] = "ekfac",
    damping: Annotated[
        str | None,
        typer.Option(
            help="Added to the curvature's diagonal: a number, auto, or training (see --training-time).",
            show_default="ekfac, kfac, data-inf auto; lissa 1e-2; others 1e-3",
        ),
    ] = None,
    training_time: TrainingTime = None,
    weight_decay: WeightDecay = None,
    fisher: Annotated[
        str | None,
        typer.Option(
            help=f"Gradients for it: one of {', '.join(FISHERS)}.",
            show_default="exact; of language models monte_carlo; data-inf, random-projection empirical",
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Names or patterns of layers, comma separated or repeated.", show_default="all; for exact the head"
        ),
    ] = None,
    loss: Loss = None,
    measurement: Asked = "loss",
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Sampler of the examples that carry the curvature, see `sample`.", show_default="all examples"
        ),
    ] = None,
    k: Annotated[str | None, typer.Option(help="How many it picks: a number or a percentage.")] = None,
    by: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(get_args(By))}: scores, or their parts by block of parameters, or by "
            "position of the training examples."
        ),
    ] = "all",
    query_groups: Annotated[
        Path | None,
        typer.Option(help="A group for each query, .npy or .safetensors with a tensor query-groups: rows are groups."),
    ] = None,
    low_rank: Annotated[
        int | None,
        typer.Option(
            help="Keep only so many singular vectors of each query's gradient: less memory.", show_default="all"
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(hidden=True)] = None,
    batch_size: OwnBatchSize = None,
    memory: Memory = MEMORY >> 20,
    top: Annotated[
        int | None,
        typer.Option(help="Training examples per query in top.csv, the most helpful first.", show_default=str(TOP)),
    ] = None,
    self_influence: Annotated[
        bool, typer.Option("--self-influence", help="Write self_influence.npy, too: each example's score on itself.")
    ] = False,
    pages: Pages = SHOWN,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="For samplers, what the curvature draws, and torch in your function.")] = 0,
    resume: Resume = False,
    key: Key = None,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Scores of training examples for queries, for a model of your own: from a script, or from a folder and files.

    fastif scores own.py:problem --out scores

    fastif scores --model FOLDER --train train.jsonl --query query.jsonl --text text --label label --out scores

    A score is the predicted rise of a query's loss if the training example is removed: positive means that it helps.
    They are written block by block; fastif.ScoreFolder(FOLDER) reads them in Python.
    """
    began = time.perf_counter()
    damping_ = damping_of(damping, training_time, weight_decay)
    estimator_of(curvature, damping_, fisher, seed)  # refuses now, not after the model was loaded
    files: dict[str, Any] = dict(text=text, label=label, prompt=prompt, image=image, id=id, max_length=max_length)
    check_given(script, loss, model=model, train=train, query=query, **files)
    size = batch_of(batch_size, model)
    check("memory", memory, memory >= 1, ">= 1")
    check("top", top, top is None or top >= 0, ">= 0")
    check("pages", pages, pages >= 0, ">= 0")
    check("seed", seed, 0 <= seed < 2**63, "in [0, 2^63)")
    check("measurement", measurement, measurement in MEASUREMENTS, f"one of {', '.join(MEASUREMENTS)}")
    check("by", by, by in get_args(By), f"one of {', '.join(get_args(By))}")
    low_rank = rank if low_rank is None else low_rank  # --rank is its old name
    check("low-rank", low_rank, low_rank is None or low_rank >= 1, ">= 1")
    for name, given in (("query-groups", query_groups), ("low-rank", low_rank)):
        check(name, given, by == "all" or given is None, f"left out with --by {by}")
    if (sampler is None) != (k is None):
        raise ValueError("--sampler and --k go together: which examples carry the curvature, and how many")
    groups = None if query_groups is None else read_array(query_groups, "query-groups")
    if groups is not None:
        check("query-groups", groups.dtype, groups.dtype == torch.int64, "int64")
    where, patterns = device_named(device), None if layers is None else split(layers)
    picker = None if sampler is None else choose_samplers([sampler])[0]
    if not resume and (out / MANIFEST).exists():
        raise ValueError(f"{out} holds scores already: go on with --resume, or choose another folder")
    torch.manual_seed(seed)
    given = given_by(
        script, loss, model=model, train=train, query=query, batch_size=size, one_length=by == "token", **files
    )
    influence = Influence(
        given.model,
        given.loss,  # pyright: ignore[reportArgumentType]
        estimator_of(curvature, damping_, fisher_of(fisher, curvature, given.loss), seed),
        layers=patterns,
        measurement=measurement,  # pyright: ignore[reportArgumentType]
        batch_size=size,
        memory=memory << 20,
        device=where,
        seed=seed,
        progress=not quiet,
    )
    n, q = count(given.train, size), count(given.query, size)
    top = min(TOP, n) if top is None else top
    check("top", top, top <= n, f"at most the {n} training examples")
    budget = None if k is None else check_budgets([k], n)[0]
    row, rows = "query", "queries"
    if groups is not None:
        check_groups("query_groups", groups, q)
        row, rows, q = "group", "groups of queries", int(groups.max()) + 1
    ranks = influence.ranks
    first = ranks.rank == 0  # which alone plans, prints and writes what is no block of scores
    if first and (not quiet or by == "token"):
        plan = influence.plan(given.train, given.query if by == "all" and groups is None else None, low_rank=low_rank)
        if by == "token":  # now, not after the fit
            check_positions({name: layer.positions for name, layer in plan.layers.items()})
        if not quiet:
            _print_plan(influence, plan, q, rows, by, out)
    with interruptible(out, (MANIFEST, CURVATURE)), writable(out) if first else nullcontext(), held(out, ranks):
        known = fit_or_load(influence, given.train, out / CURVATURE, resume, picker, budget, key)
        if first:
            write_config(context, out)
        scores = write_scores(
            influence.fitted,
            given.query,
            given.train,
            out,
            resume=resume,
            query_groups=groups,
            low_rank=low_rank,
            by=by,  # pyright: ignore[reportArgumentType]
            key=key,
        )
        best = scores.top(min(n, max(top, SHOWN))) if first and (top or not quiet) else None
        paths = [path for path in (out / "top.csv",) if top]
        if best is not None and top:
            write_top(paths[0], row, *best, top, given)
        if self_influence:
            paths.append(out / "self_influence.npy")
            about = checksum(canonical(scores.settings))
            if ranks.meet("whether it is kept", known and paths[-1].exists())[0]:
                load_array(paths[-1], str(dtype_of(given.model)).removeprefix("torch."), (n,), about)
            else:
                own = influence.self_influence(given.train)
                if first:
                    save_array(paths[-1], own.numpy(), about)
        told: list[Path] = []
        if pages and given.train_examples is not None and by == "all" and groups is None:
            influence.gather()  # the first rank turns the tokens of its pages by itself
            if first:
                told = write_pages(influence.fitted, scores, given, out / PAGES, pages)
    if best is not None and not quiet:
        console = terminal()
        console.print(top_table(row, rows, *best, n, given=given))
        if low_rank is not None:
            error = f"at most {scores.low_rank_error:.1e}"
            console.print(f"relative error of the queries' gradients at rank {low_rank}: {error}")
        names = ", ".join(path.name for path in (out / MANIFEST, *paths))
        console.print(f"[bold]{out}[/bold]: the scores, as fastif.ScoreFolder reads them; {names}", soft_wrap=True)
        if told:
            console.print(f"[bold]{told[0]}[/bold] and so on: the first {len(told)} queries, explained", soft_wrap=True)
        console.print(f"{time.perf_counter() - began:.1f} s in all")


def _print_plan(influence: Influence, plan: Plan, rows: int, named: str, by: str, out: Path) -> None:
    """The plan, with the size of scores that go to the disk block by block; its own peak has all of them in memory."""
    parts = {"layer": len(plan.layers), "token": max(layer.positions for layer in plan.layers.values())}
    size = rows * plan.n * parts.get(by, 1) * dtype_of(influence.model).itemsize
    if plan.score_bytes is not None and influence.device.type == "cpu":
        plan = plan._replace(score_bytes=plan.score_bytes - size + min(size, BLOCK_BYTES))
    print(plan)
    print(f"{rows:,} {named}; scores take {size / 2**20:.1f} MiB in {out}", flush=True)
