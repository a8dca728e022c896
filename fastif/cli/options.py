"""Options that several commands have, each said once."""

from typing import Annotated

import typer

from fastif.model.losses import LOSSES, MEASUREMENTS

Script = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        help="A function of yours, also as path/to/file.py:FUNCTION. It takes nothing and returns "
        "(model, train, query): a trained torch.nn.Module in eval mode, and data with labels.",
    ),
]
TrainingTime = Annotated[
    float | None,
    typer.Option(
        help="For --damping training: learning rates of all steps of SGD, summed, over 1 - momentum.",
        show_default=False,
    ),
]
WeightDecay = Annotated[
    float | None, typer.Option(help="For --damping training: that of the training.", show_default="0")
]
Loss = Annotated[str, typer.Option(help=f"One of {', '.join(LOSSES)}.")]
Asked = Annotated[str, typer.Option(help=f"Asked of queries: one of {', '.join(MEASUREMENTS)}.")]
BatchSize = Annotated[int, typer.Option(help="For data without batches of its own.")]
Memory = Annotated[int, typer.Option(help="MiB for query gradients, a quarter of it for slices of a batch.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a job in the same folder.")]
Key = Annotated[str | None, typer.Option(help="A name of your own for what of your code cannot be fingerprinted.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
