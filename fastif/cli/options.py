"""Options that several commands have, each said once."""

from pathlib import Path
from typing import Annotated

import typer

from fastif.cli.config import read_config
from fastif.model.losses import LOSSES, MEASUREMENTS

METAVAR = "MODULE:FUNCTION"
FUNCTION = (
    "A function of yours, also as path/to/file.py:FUNCTION. It takes nothing and returns "
    "(model, train, query): a trained torch.nn.Module in eval mode, and data with labels. Or "
)
Script = Annotated[str | None, typer.Argument(metavar=METAVAR, help=FUNCTION + "--model.", show_default=False)]
AskingScript = Annotated[str | None, typer.Argument(metavar=METAVAR, help=FUNCTION + "--query.", show_default=False)]
FOLDER = "Instead of a script"
Model = Annotated[
    Path | None,
    typer.Option(
        help="Folder with a language model or a classifier of texts or images, as transformers saves it.",
        rich_help_panel=FOLDER,
        show_default=False,
    ),
]
Train = Annotated[
    Path | None,
    typer.Option(help="Its training examples, .jsonl or .csv.", rich_help_panel=FOLDER, show_default=False),
]
Query = Annotated[
    Path | None, typer.Option(help="Queries, .jsonl or .csv.", rich_help_panel=FOLDER, show_default=False)
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        help="Column of the texts; twice for a classifier of pairs of texts.",
        rich_help_panel=FOLDER,
        show_default="text",
    ),
]
Label = Annotated[
    str | None,
    typer.Option(
        help="Column of a classifier's labels, names or numbers; lists of them where it was trained so.",
        rich_help_panel=FOLDER,
        show_default=False,
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        help="Column of what stands before a language model's text and does not count in the loss.",
        rich_help_panel=FOLDER,
        show_default=False,
    ),
]
Image = Annotated[
    str | None,
    typer.Option(
        help="Column of image files, relative to the table's folder.", rich_help_panel=FOLDER, show_default=False
    ),
]
Id = Annotated[
    str | None,
    typer.Option("--id", help="Column of names of the examples.", rich_help_panel=FOLDER, show_default="row numbers"),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Cut texts to so many tokens.", rich_help_panel=FOLDER, show_default="none: too long is an error"
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        callback=read_config,
        is_eager=True,
        help="A run.toml: its options, where they are not given here.",
        show_default=False,
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
Loss = Annotated[
    str | None,
    typer.Option(help=f"One of {', '.join(LOSSES)}.", show_default="cross_entropy; with --model that of its training"),
]
Asked = Annotated[str, typer.Option(help=f"Asked of queries: one of {', '.join(MEASUREMENTS)}.")]
BatchSize = Annotated[int, typer.Option(help="For data without batches of its own.")]
OwnBatchSize = Annotated[
    int | None, typer.Option(help="For data without batches of its own.", show_default="256; with --model 16")
]
Pages = Annotated[
    int, typer.Option(help="Pages that explain the first queries of --model, with the texts' tokens or the images.")
]
Memory = Annotated[int, typer.Option(help="MiB for query gradients, a quarter of it for slices of a batch.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a job in the same folder.")]
Key = Annotated[str | None, typer.Option(help="A name of your own for what of your code cannot be fingerprinted.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
