"""fastif where people already work: a Trainer of transformers or Lightning, k-center in the place of others'.

Nothing of a third party is imported before it is asked for: `anomalib` and `sklearn` are modules of this package.
"""

from typing import Any

from fastif.integrations.active import next_batch
from fastif.integrations.trainer import data_of, influence_of, loss_of

__all__ = [
    "LightningLog",  # pyright: ignore[reportUnsupportedDunderAll]  both are imported when they are asked for
    "TrainerLog",  # pyright: ignore[reportUnsupportedDunderAll]
    "data_of",
    "influence_of",
    "loss_of",
    "next_batch",
]


def __getattr__(name: str) -> Any:
    if name == "TrainerLog":  # a class of transformers' own kind
        from fastif.integrations.trainer_log import TrainerLog

        return TrainerLog
    if name == "LightningLog":  # one of Lightning's
        from fastif.integrations.lightning_log import LightningLog

        return LightningLog
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
